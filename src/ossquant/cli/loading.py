"""Load a checkpoint for a command that speaks: where it sits is told on stderr before it does."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ossquant.errors import UsageError

if TYPE_CHECKING:
    from ossquant.runtime.load import Placement


@dataclass(frozen=True)
class Loaded:
    """A model, ready; times in seconds, warm_up None if it was not asked for."""

    model: Any
    tokenizer: Any
    placed: "Placement"
    load: float
    warm_up: float | None


def load(checkpoint: str, *, max_memory: str | None, warmup: bool = False, **options: Any) -> Loaded:
    """Load with load_model's options, and warm up if asked to."""
    limits = caps(max_memory)
    from ossquant.cli import render
    from ossquant.runtime.load import load_model, placement
    from ossquant.runtime.warmup import warm_up

    started = time.perf_counter()
    model, tokenizer = load_model(
        checkpoint, max_memory=limits, announce=render.note, progress=sys.stderr.isatty(), **options
    )
    loaded = time.perf_counter() - started
    placed = placement(model)
    render.note(str(placed))
    warm = warm_up(model, tokenizer) if warmup else None
    if warm is not None:
        render.note(f"warmed up in {warm:.1f} s")
    return Loaded(model, tokenizer, placed, loaded, warm)


def caps(max_memory: str | None) -> dict[int | str, int | str] | None:
    """Read 0=20GiB,cpu=60GiB. Raises UsageError."""
    if max_memory is None:
        return None
    caps: dict[int | str, int | str] = {}
    for part in max_memory.split(","):
        device, equals, cap = (word.strip() for word in part.partition("="))
        if not device or not equals:
            raise UsageError(f"--max-memory: '{part}' is no cap", hint="write it like 0=20GiB,cpu=60GiB")
        caps[int(device) if device.isdecimal() else device] = cap
    return caps
