"""Place, Check, Fault, Missing: where a server is tested, one thing that must hold of it, and what can go wrong."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/data/tiny"
DEFAULT_SCRATCH = ROOT / ".servers"

# Threads that wait for each other on a busy CPU make tiny models many times slower; nothing is fetched from a hub.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Fault(Exception):
    """A check that failed, and why."""


class Missing(Exception):
    """A server that cannot be installed or built here, and why."""


@dataclass(frozen=True)
class Place:
    """A folder that keeps environments, builds, exports and logs from one run to the next."""

    scratch: Path

    def folder(self, name: str) -> Path:
        """A folder below scratch, made if it is not there."""
        path = self.scratch / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True)
class Check:
    """What of the export is held against the server; run returns figures, and raises Fault if it does not hold."""

    export: str
    what: str
    run: Callable[[], dict[str, Any]]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process started here."""
    return os.environ | QUIET | more


def demand(holds: bool, sentence: str) -> None:
    """Raise Fault with the sentence unless it holds."""
    if not holds:
        raise Fault(sentence)
