"""A device's two streams, without a device: what is asked of either runs later, in any order that the waits allow."""

import random
from collections.abc import Callable

import torch

from ossquant.runtime.streaming import Parts


class TwoStreams:
    """Copies and computing, each in its own order; which of the two goes on is drawn by chance.

    An operation waits until so many of the other stream's are done.
    """

    def __init__(self, early: bool) -> None:
        self.early = early
        self.copies: list[tuple[int, Callable[[], None]]] = []
        self.computing: list[tuple[int, Callable[[], None]]] = []
        self.buffers: dict[int, int] = {}  # bytes by address
        self._released = self._copied = 0

    def copy(self, source: Parts, buffer: Parts) -> None:
        self.buffers |= {part.data_ptr(): part.nbytes for part in buffer}

        def fill() -> None:
            for part, into in zip(source, buffer, strict=True):
                into.copy_(part)

        self.copies.append((self._released, fill))

    def await_copies(self) -> None:
        self._copied = len(self.copies)

    def release(self) -> None:
        self._released = len(self.computing)

    def compute(self, operation: Callable[[], None]) -> None:
        """Ask for an operation on what was copied."""
        self.computing.append((self._copied, operation))

    def run(self, seed: int) -> None:
        """Do everything that was asked for."""
        done, queues, chance = [0, 0], (self.copies, self.computing), random.Random(seed)  # noqa: S311  a simulation
        while any(done[own] < len(queues[own]) for own in (0, 1)):
            ready = [
                own for own in (0, 1) if done[own] < len(queues[own]) and queues[own][done[own]][0] <= done[1 - own]
            ]
            own = chance.choice(ready)
            queues[own][done[own]][1]()
            done[own] += 1


def stacks(experts: int) -> Parts:
    """Stored tensors of some experts, all of them different."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2, 16), (4, 2), (4,), (3, 2, 16), (3, 2), (3,))
    return tuple(torch.randint(0, 256, (experts, *shape), dtype=torch.uint8, generator=generator) for shape in shapes)
