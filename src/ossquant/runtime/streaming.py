"""Experts that lie elsewhere, brought one by one to the device of the tokens: while one computes the next is copied.

Two buffers of one expert each take turns on the device, so what is held there does not grow with the experts.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

# the stored tensors of one expert, such as blocks, scales and biases
Parts = tuple[Tensor, ...]


class Experts(Protocol):
    """What computing asks for: told first which experts it takes, each once and in that order."""

    def expect(self, experts: Sequence[int]) -> None:
        """Hear what will be taken."""

    def take(self, expert: int) -> Parts:
        """The parts of an expert, until another is taken."""

    def done(self, expert: int) -> None:
        """Hear that all that is computed with an expert has been asked for."""


class AsStored:
    """Experts as they lie, whoever computes with them fetching them when he does."""

    def __init__(self, stacks: Parts) -> None:
        self._stacks = stacks

    def expect(self, experts: Sequence[int]) -> None:
        pass

    def take(self, expert: int) -> Parts:
        return tuple(stack[expert] for stack in self._stacks)

    def done(self, expert: int) -> None:
        pass


class Lanes(Protocol):
    """How copies run beside what is computed.

    early: whether asking for a copy costs no wait, so that it is asked for before what it runs beside.
    """

    early: bool

    def copy(self, source: Parts, buffer: Parts) -> None:
        """Fill a buffer, after all that was computed up to the last release."""

    def await_copies(self) -> None:
        """Let what is computed from here on see every copy so far."""

    def release(self) -> None:
        """Let copies from here on overwrite what was computed with so far."""


class InOrder:
    """Copies on a device without streams: each is done where it is asked for."""

    early = False

    def copy(self, source: Parts, buffer: Parts) -> None:
        _fill(source, buffer)

    def await_copies(self) -> None:
        pass

    def release(self) -> None:
        pass


class SideStream:
    """Copies on a CUDA stream of their own, which waits for the computing one and is waited for by events."""

    def __init__(self, device: torch.device, early: bool) -> None:
        self.early = early
        self._side, self._computing = _side_stream(device), torch.cuda.current_stream(device)
        self._released: Any = None

    def copy(self, source: Parts, buffer: Parts) -> None:
        self._side.wait_event(self._released)
        with torch.cuda.stream(self._side):
            _fill(source, buffer)
        for part in buffer:
            part.record_stream(self._side)  # a pass that breaks off does not free what is still being filled

    def await_copies(self) -> None:
        self._computing.wait_stream(self._side)

    def release(self) -> None:
        self._released = self._computing.record_event()


class CopiedAhead:
    """Experts that are copied to a device through two buffers, the next one while one computes.

    stacks are the experts' stored tensors, the expert being their first dimension.
    """

    def __init__(self, stacks: Parts, device: torch.device, lanes: Lanes | None = None) -> None:
        self._stacks, self._device = stacks, device
        self._lanes = lanes or _lanes(stacks, device)
        self._coming: Iterator[int] = iter(())
        self._empty: list[Parts] = []
        self._held: dict[int, Parts] = {}
        self._taken: int | None = None

    def expect(self, experts: Sequence[int]) -> None:
        self._coming, self._held, self._taken = iter(experts), {}, None
        self._empty = [tuple(torch.empty_like(stack[0], device=self._device) for stack in self._stacks)
                       for _ in experts[:2]]  # fmt: skip
        self._lanes.release()
        self._fetch()

    def take(self, expert: int) -> Parts:
        if expert != self._taken:
            self._give_up_taken()
            self._taken = expert
            self._lanes.await_copies()
            self._lanes.release()
            if self._lanes.early:
                self._fetch()
        return self._held[expert]

    def done(self, expert: int) -> None:
        if not self._lanes.early:
            self._fetch()

    def _give_up_taken(self) -> None:
        if self._taken is not None:
            self._empty.append(self._held.pop(self._taken))

    def _fetch(self) -> None:
        """Have the next expert copied into the buffer that is empty."""
        expert = next(self._coming, None)
        if expert is not None:
            buffer = self._empty.pop(0)
            self._lanes.copy(tuple(stack[expert] for stack in self._stacks), buffer)
            self._held[expert] = buffer


def experts_for(device: torch.device, stacks: Parts, ahead: bool = True) -> Experts:
    """Experts for computing on a device: as they lie, or copied there ahead where they lie elsewhere."""
    return CopiedAhead(stacks, device) if ahead and stacks[0].device != device else AsStored(stacks)


def _lanes(stacks: Parts, device: torch.device) -> Lanes:
    if device.type != "cuda" or stacks[0].device.type != "cpu":
        return InOrder()
    # the driver reads memory that is not page-locked while the caller waits
    return SideStream(device, early=stacks[0].is_pinned())


def _fill(source: Parts, buffer: Parts) -> None:
    for part, into in zip(source, buffer, strict=True):
        into.copy_(part, non_blocking=True)


@cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
