"""Result: what one bench run measured, and its JSON, version 1."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ossquant.bench.metrics import Better
from ossquant.errors import UsageError
from ossquant.units import nearest

SCHEMA_VERSION = 1

TargetKind = Literal["checkpoint", "endpoint"]
Source = Literal["usage", "tokenizer", "client"]


@dataclass(frozen=True)
class Metric:
    """One metric of a scenario. value is what is compared: the median over requests, or the figure of the whole run.

    count is the values behind it. Percentiles are None where there are too few: p99 from 300 requests up. source says
    who counted the tokens: the server's usage, a tokenizer on our side, or 'client' for clocks and chunks.
    """

    value: float
    unit: str
    better: Better
    count: int
    source: Source
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class Requests:
    """How many requests were sent, and how they ended; truncated ones are not among the succeeded."""

    sent: int
    succeeded: int
    failed: int
    truncated: int


@dataclass(frozen=True)
class Scenario:
    """One load shape. invalid says why the run is no result; unmeasured says of a metric why it is not there.

    shape has a 'kind': single, closed, open or multi-turn. seconds is the wall time. counts says where token counts
    come from, and what hides in them.
    """

    name: str
    shape: Mapping[str, Any]
    valid: bool
    invalid: tuple[str, ...]
    partial: bool
    requests: Requests
    seconds: float
    metrics: Mapping[str, Metric]
    counts: Mapping[str, Any] = field(default_factory=dict)
    unmeasured: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What was measured: a checkpoint in this process, or an endpoint by its URL."""

    kind: TargetKind
    name: str
    model: str
    engine: str


@dataclass(frozen=True)
class Result:
    """A bench run; created is ISO 8601, ossquant the version that measured, partial that Ctrl-C ended it."""

    created: str
    ossquant: str
    partial: bool
    target: Target
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    scenarios: tuple[Scenario, ...]

    @property
    def valid(self) -> bool:
        """Whether every scenario is."""
        return all(scenario.valid for scenario in self.scenarios)

    def scenario(self, name: str) -> Scenario:
        """Find a scenario. Raises UsageError naming the nearest."""
        for scenario in self.scenarios:
            if scenario.name == name:
                return scenario
        raise UsageError(f"no scenario '{name}'", hint=nearest(name, (each.name for each in self.scenarios)))

    def to_json(self) -> dict[str, Any]:
        """Give the object that `--json` prints and result.json holds."""
        return {"schema_version": SCHEMA_VERSION, "kind": "bench", **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    """Tuples to lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
