"""Gate: which metrics matter, and how much worse or bad they may be, from TOML."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossquant.bench.metrics import METRICS, QUALITY, MetricKind
from ossquant.bench.strict import number
from ossquant.errors import UsageError
from ossquant.units import nearest

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
MAX_REGRESSION = 0.02  # where no gate says otherwise
MAX_BYTES = 2**20
KINDS = METRICS | QUALITY
_BOUNDS = {"lower": "max", "higher": "min"}


@dataclass(frozen=True)
class Rule:
    """What is asked of one metric: bound in its unit, max_regression as a share of the base; None is not asked.

    statistic is 'value' or one of STATISTICS. No scenarios means each that measures the metric.
    """

    metric: str
    statistic: str = "value"
    bound: float | None = None
    max_regression: float | None = None
    scenarios: tuple[str, ...] = ()

    @property
    def kind(self) -> MetricKind:
        """The unit and the better direction of its metric."""
        return KINDS[self.metric]

    @property
    def name(self) -> str:
        """As a gate file names it: ttft, or ttft.p99."""
        return self.metric if self.statistic == "value" else f"{self.metric}.{self.statistic}"


@dataclass(frozen=True)
class Gate:
    """Rules and where they come from. An optional rule is left out where nothing measures its metric."""

    name: str
    rules: tuple[Rule, ...]
    optional: bool = False


DEFAULT = Gate(
    "default",
    tuple(Rule(metric, max_regression=MAX_REGRESSION) for metric in ("output_tokens_per_second", "ttft")),
    optional=True,
)


def load_gate(path: Path) -> Gate:
    """Read a gate file; every key must be known. Raises UsageError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than a gate can be", hint="give a gate.toml")
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no gate at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not readable as TOML: {error}") from error
    return parse_gate(table, where=path.name)


def parse_gate(table: Mapping[str, Any], where: str) -> Gate:
    """Build a Gate from its TOML table; where names it in errors."""
    rules: list[Rule] = []
    for metric, asked in table.items():
        if metric not in KINDS:
            raise UsageError(f"{where}: unknown metric '{metric}'", hint=nearest(metric, KINDS))
        rules += _rules(metric, asked, f"{where}: [{metric}]")
    if not rules:
        raise UsageError(f"{where}: no metric has a limit", hint="[ttft] max = 0.5 or max_regression = 0.05")
    return Gate(where, tuple(rules))


def _rules(metric: str, asked: object, where: str) -> list[Rule]:
    if not isinstance(asked, dict):
        raise UsageError(f"{where} is no table", hint=f"[{metric}] max_regression = 0.05")
    rules = [
        _rule(metric, statistic, asked[statistic], f"{where[:-1]}.{statistic}]")
        for statistic in STATISTICS
        if statistic in asked
    ]
    own = {key: value for key, value in asked.items() if key not in STATISTICS}
    return [_rule(metric, "value", own, where, STATISTICS), *rules] if own or not rules else rules


def _rule(metric: str, statistic: str, table: object, where: str, also: tuple[str, ...] = ()) -> Rule:
    kind = KINDS[metric]
    bound = _BOUNDS[kind.better]
    if not isinstance(table, dict):
        raise UsageError(f"{where} is no table", hint=f"{bound} = 0.5")
    _check_keys(table, (bound, "max_regression", "scenarios", *also), where, kind)
    if bound not in table and "max_regression" not in table:
        raise UsageError(f"{where} has no limit", hint=f"{bound} = 0.5, or max_regression = 0.05")
    regression = _number(table, "max_regression", where)
    if regression is not None and not 0 < regression < 1:
        raise UsageError(f"{where}: max_regression is a share of the base, 0.05 for 5 %, not {regression}")
    return Rule(metric, statistic, _number(table, bound, where), regression, _scenarios(table, where))


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str, kind: MetricKind) -> None:
    for key in table:
        if key in _BOUNDS.values() and key not in known:
            raise UsageError(f"{where}: '{key}' limits nothing, {kind.better} is better", hint=f"{known[0]} = …")
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'", hint=nearest(key, known))


def _number(table: Mapping[str, Any], key: str, where: str) -> float | None:
    return number(f"{where}: {key}", table[key]) if key in table else None


def _scenarios(table: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = table.get("scenarios", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{where}: scenarios must be a list of names", hint='scenarios = ["concurrency=16"]')
    if "scenarios" in table and not names:
        raise UsageError(f"{where}: scenarios is empty", hint="leave it out for every scenario")
    return tuple(names)
