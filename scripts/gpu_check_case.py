"""Case, Findings, Setting: one check of scripts/gpu_check, what it found, and what it has to work with."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "tests/data/tiny"
HOST = "cpu"


@dataclass(frozen=True)
class Setting:
    """device is "cuda", or "cpu" for a dry run; tiny the small checkpoint; scratch a folder for large ones."""

    device: str
    tiny: Path
    scratch: Path

    @property
    def dry(self) -> bool:
        """Whether there is no GPU, so that the script alone is tested."""
        return self.device == HOST

    @property
    def main_device(self) -> str:
        """Where a whole model is put."""
        return HOST if self.dry else "cuda:0"

    @property
    def beside_host(self) -> str:
        """A device that refuses the host's tensors; in a dry run torch's lazy backend, which every build has."""
        return "lazy:0" if self.dry else "cuda:0"


class SkipCase(Exception):
    """A check that does not apply to this machine, and why."""


@dataclass
class Findings:
    """Figures by name, what was demanded of them, and what is wrong."""

    figures: dict[str, Any] = field(default_factory=dict)
    bounds: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.figures[name] = _plain(value)

    def between(self, name: str, value: float, low: float, high: float) -> None:
        """Keep a figure that must lie from low to high."""
        self.note(name, value)
        self.bounds[name] = [_plain(low), _plain(high)]
        if not low <= value <= high:  # which catches NaN
            self.faults.append(f"{name} is {value:.6g}, not {low:.6g} to {high:.6g}")

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Keep a figure that must not pass a bound, nor be negative or NaN."""
        self.between(name, value, 0, bound)

    def holds(self, name: str, value: bool) -> None:
        """Keep what must be true."""
        self.note(name, value)
        self.bounds[name] = True
        if not value:
            self.faults.append(f"{name}: no")


def _plain(value: Any) -> Any:
    """The same, as text if JSON has no number for it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Case:
    """One check. Those of one worker run in one process, one after the other; limit is in seconds."""

    name: str
    worker: str
    limit: float
    run: Callable[[Setting], Findings]

    @property
    def part(self) -> str:
        """The part that --parts chooses it by."""
        return self.name.split("/")[0]
