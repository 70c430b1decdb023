"""Comparison: head against base, metric by metric, and the verdict; its JSON, version 1."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ossquant.bench.metrics import Better

SCHEMA_VERSION = 1

Verdict = Literal["ok", "regressed", "failed", "inconclusive"]


@dataclass(frozen=True)
class Change:
    """How one statistic of a metric moved in one scenario; base and head hold a value a run, None where there is none.

    ratio is the geometric mean of head / base, low and high its interval at 1 - 2 alpha. p is that of a regression
    beyond max_regression, adjusted for the number of gated changes. What is not gated has no max_regression, no p and
    no verdict. why says why a verdict is inconclusive.
    """

    scenario: str
    metric: str
    statistic: str
    unit: str
    better: Better
    base: tuple[float | None, ...]
    head: tuple[float | None, ...]
    ratio: float | None
    low: float | None = None
    high: float | None = None
    max_regression: float | None = None
    p: float | None = None
    verdict: Verdict | None = None
    why: str = ""


@dataclass(frozen=True)
class Limit:
    """Whether head's value, the median over its runs, keeps to a bound in the metric's unit."""

    scenario: str
    metric: str
    statistic: str
    unit: str
    better: Better
    bound: float
    value: float
    verdict: Verdict


@dataclass(frozen=True)
class Side:
    """One side: what was measured, and the files or the command it comes from."""

    target: str
    model: str
    engine: str
    source: str


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says. alpha is what this look spends of a wrong answer's probability, on each side."""

    created: str
    ossquant: str
    gate: str
    base: Side
    head: Side
    pairs: int
    looks: tuple[int, ...]
    alpha: float
    verdict: Verdict
    changes: tuple[Change, ...]
    limits: tuple[Limit, ...]
    notes: tuple[str, ...]

    @property
    def gated(self) -> tuple[Change, ...]:
        """The changes that have a verdict."""
        return tuple(change for change in self.changes if change.verdict)

    def to_json(self) -> dict[str, Any]:
        """Give the object that `--json` prints."""
        return {"schema_version": SCHEMA_VERSION, "kind": "comparison", **asdict(self)}


def overall(verdicts: list[Verdict]) -> Verdict:
    """One verdict for all: one that regressed or failed decides, ok takes every one, and at least one."""
    order: tuple[Verdict, ...] = ("regressed", "failed", "inconclusive", "ok")
    return next((verdict for verdict in order if verdict in verdicts), "inconclusive")
