"""What becomes of experts on the host: locked only where copying is worth it, and every decision said."""

import gc
import time
from typing import Any

import pytest
import torch
from lazy import lazy_device
from made_experts import make_experts
from mlock import Mlock, locked_bytes

from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.host_experts import HostExperts, settle
from ossquant.runtime.host_trial import NEVER, crossing
from ossquant.runtime.pinned import PageLock, Refused

SLOW = 0.05  # seconds; more than the other device takes
TOOK_OVER = "experts on the host: page-locked; always copied over"


class SlowOnHost(NativeMxfp4Experts):
    """Experts that the host computes slowly."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        time.sleep(SLOW if hidden_states.device.type == "cpu" else 0)
        return super().forward(hidden_states, *args)


class SlowToCopy(NativeMxfp4Experts):
    """Experts that are slow to copy, the more so with many tokens."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        time.sleep(0 if hidden_states.device.type == "cpu" else SLOW + hidden_states.shape[0] / 5000)
        return super().forward(hidden_states, *args)


class WrongAhead(SlowOnHost):
    """Experts that get other numbers when they are copied ahead."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        return super().forward(hidden_states, *args) + (self.copied_ahead and hidden_states.device.type != "cpu")


class FailsAhead(SlowOnHost):
    """Experts that cannot be copied ahead."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        if self.copied_ahead and hidden_states.device.type != "cpu":
            raise RuntimeError("CUDA error: no such stream\nand a page of advice")
        return super().forward(hidden_states, *args)


class Rationed(Mlock):
    """A system that locks so many times, and no more."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def lock(self, address: int, nbytes: int) -> None:
        if len(self.held) == self.times:
            raise Refused("CUDA: out of memory")
        super().lock(address, nbytes)


def layers(kind: type[NativeMxfp4Experts], count: int = 3, in_files: int = 0) -> list[HostExperts]:
    """Experts of some layers, the first of which stay in the files."""
    return [HostExperts(make_experts(kind), lazy_device(), nth < in_files) for nth in range(count)]


def said(away: list[HostExperts], lock: PageLock | None) -> list[str]:
    return [str(settled) for settled in settle(away, lambda device: lock)]


def test_all_are_locked_where_copying_is_worth_it() -> None:
    """Every layer in host memory is locked until it is freed, and one line says so."""
    before, lock, away = locked_bytes(), Mlock(), layers(SlowOnHost)
    assert said(away, lock) == [TOOK_OVER]
    assert len(lock.held) == 3
    assert locked_bytes() - before == sum(lock.held.values())
    assert all(layer.experts.copied_ahead for layer in away)
    del away
    gc.collect()
    assert locked_bytes() == before


def test_nothing_stays_locked_where_it_is_not() -> None:
    """If copying is never faster the first layer is unlocked again, and no other one is locked."""
    before, lock, away = locked_bytes(), Mlock(), layers(SlowToCopy)
    (settled,) = settle(away, lambda device: lock)
    assert str(settled) == "experts on the host: computed there, as copying them over was never faster"
    assert settled.stream_from == NEVER
    assert list(settled.layers) == away
    assert not lock.held
    assert locked_bytes() == before


@pytest.mark.parametrize(
    ("times", "lines"),
    [
        (0, ["experts on the host: not page-locked (CUDA: out of memory); always copied over"]),
        (2, ["experts on the host, 2 of 3 layers: page-locked; always copied over",
             "experts on the host, 1 of 3 layers: not page-locked (CUDA: out of memory); always copied over"]),
    ],
)  # fmt: skip
def test_a_refusal_is_said(times: int, lines: list[str]) -> None:
    """What the driver refuses goes on unlocked, with its reason in the line."""
    lock, away = Rationed(times), layers(SlowOnHost)
    assert said(away, lock) == lines
    assert len(lock.held) == times


def test_experts_in_the_files_stay_there() -> None:
    """They are measured by themselves, and never locked."""
    lock, away = Mlock(), layers(SlowOnHost, in_files=2)
    where = [layer.experts.down_proj_blocks.data_ptr() for layer in away]
    assert said(away, lock) == [TOOK_OVER, "experts in the files: always copied over"]
    assert len(lock.held) == 1
    assert [layer.experts.down_proj_blocks.data_ptr() for layer in away[:2]] == where[:2]
    assert said(layers(SlowOnHost, 1, in_files=1), lock) == ["experts in the files: always copied over"]
    assert said([], lock) == []


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(WrongAhead, "copying ahead gives other numbers here"),
     (FailsAhead, "copying ahead fails: CUDA error: no such stream")],
)  # fmt: skip
@pytest.mark.parametrize("lock", (None, Mlock()))
def test_copying_ahead_is_tried_first(kind: type[NativeMxfp4Experts], fault: str, lock: PageLock | None) -> None:
    """Where it gives other numbers, or fails, all layers are copied in turn, which is said."""
    away = layers(kind)
    (line,) = said(away, lock)
    assert line.endswith(f"always copied over; one after the other, for {fault}")
    assert not any(layer.experts.copied_ahead for layer in away)


def test_a_threshold_is_said() -> None:
    """Between the ways lies a number of tokens."""
    (settled,) = settle(layers(SlowOnHost, 1), lambda device: None)
    between = type(settled)(settled.layers, settled.where, "page-locked", "", 37)
    assert str(between) == (
        "experts on the host: page-locked; computed there below 37 tokens, copied over from there on"
    )


@pytest.mark.parametrize(
    ("few", "many", "tokens"),
    [
        (-1e-3, 1.0, 0),  # faster with one token already
        (1e-3, 1e-3, NEVER),  # no better with many
        (1e-3, 2e-3, NEVER),
        (1e-3, -1e-3, 260),  # halfway from 1 to 64 tokens an expert, which 8 times as many give all of them
        (1e-3, 0.5e-3, 1016),
    ],
)
def test_where_the_lines_cross(few: float, many: float, tokens: int) -> None:
    """Both ways take time by the token; the threshold is where copying begins to win."""
    assert crossing(few, many, 8) == tokens
