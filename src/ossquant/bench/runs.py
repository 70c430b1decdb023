"""Runs: the results of one side of a comparison, each a valid run of the same thing."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ossquant.bench.comparison import Side
from ossquant.bench.gate import Rule
from ossquant.bench.result import Metric, Result
from ossquant.errors import InvalidRunError


@dataclass(frozen=True)
class Runs:
    """The results of one side in their order, what it is called, and the files or the command they come from."""

    name: str
    source: str
    results: tuple[Result, ...]

    def metric(self, scenario: str, name: str) -> Metric | None:
        """A metric of the last run."""
        return _metric(self.results[-1], scenario, name)

    def values(self, scenario: str, rule: Rule) -> tuple[float | None, ...]:
        """The statistic of a rule's metric in each run, None where it was not measured."""
        metrics = [_metric(result, scenario, rule.metric) for result in self.results]
        return tuple(None if metric is None else getattr(metric, rule.statistic) for metric in metrics)

    def has(self, scenario: str, rule: Rule) -> bool:
        """Whether every run measured it."""
        return None not in self.values(scenario, rule)

    def scenarios(self) -> tuple[str, ...]:
        """Names of the scenarios that every run has."""
        others = [{scenario.name for scenario in result.scenarios} for result in self.results[1:]]
        first = (scenario.name for scenario in self.results[0].scenarios)
        return tuple(name for name in first if all(name in names for names in others))

    def metrics(self, scenario: str) -> tuple[str, ...]:
        """Names of the metrics of a scenario of the first run."""
        return next((tuple(each.metrics) for each in self.results[0].scenarios if each.name == scenario), ())

    def why_unmeasured(self, scenario: str | None, metric: str) -> str:
        """What a run says of a metric that it lacks in a scenario, or in any; empty if it says nothing."""
        said = (each.unmeasured.get(metric) for result in self.results for each in result.scenarios
                if scenario in (None, each.name))  # fmt: skip
        return next((reason for reason in said if reason), "")

    def side(self) -> Side:
        """What was measured, by the first run."""
        target = self.results[0].target
        return Side(target.name, target.model, target.engine, self.source)


def require_valid(result: Result, name: str) -> None:
    """Raise InvalidRunError unless every scenario is whole and valid."""
    for scenario in result.scenarios:
        if not scenario.valid or scenario.partial:
            why = "; ".join(scenario.invalid) or "it was interrupted"
            raise InvalidRunError(f"{name}: '{scenario.name}' is no valid run: {why}", hint="measure it again")
    if result.partial or not result.scenarios:
        raise InvalidRunError(f"{name}: the run was interrupted", hint="measure it again")


def taken_in_turns(base: Sequence[Result], head: Sequence[Result]) -> bool:
    """Whether, by the times they carry, the two runs of each pair were taken next to each other."""
    try:
        times = sorted((_time(result), pair) for side in (base, head) for pair, result in enumerate(side))
    except ValueError:
        return False
    order = [pair for _, pair in times]
    return order[::2] == order[1::2]


def _time(result: Result) -> datetime:
    created = datetime.fromisoformat(result.created)
    return created if created.tzinfo else created.replace(tzinfo=UTC)


def _metric(result: Result, scenario: str, name: str) -> Metric | None:
    return next((each.metrics.get(name) for each in result.scenarios if each.name == scenario), None)
