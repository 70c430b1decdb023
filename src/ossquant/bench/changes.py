"""Changes: how each metric moved from base to head, and of those that are gated whether that is a regression."""

from collections.abc import Sequence
from dataclasses import replace

from ossquant.bench.comparison import Change, Verdict
from ossquant.bench.gate import Rule
from ossquant.bench.paired import PairedTest, holm, paired_test
from ossquant.bench.runs import Runs
from ossquant.errors import UsageError

Question = tuple[str, Rule]  # a scenario, and what is asked of a metric in it


def gated_changes(
    base: Runs, head: Runs, asked: Sequence[Question], alpha: float, obstacle: str = ""
) -> tuple[Change, ...]:
    """Test what has a max_regression, all together by Holm; an obstacle says why no change can be judged.

    A regression is one by the adjusted p. That all is ok needs every single one to be, so its p is not adjusted.
    """
    tested = [_tested(base, head, question, alpha) for question in asked if question[1].max_regression is not None]
    adjusted = holm([test.p_regressed for _, test in tested])
    return tuple(
        replace(change, p=p, verdict=_verdict(p, test.p_ok, alpha, obstacle), why=obstacle)
        for (change, test), p in zip(tested, adjusted, strict=True)
    )


def other_changes(base: Runs, head: Runs, gated: Sequence[Change], alpha: float) -> tuple[Change, ...]:
    """Every metric of a common scenario that is not gated: no test, and intervals not adjusted for their number."""
    known = {(change.scenario, change.metric) for change in gated if change.statistic == "value"}
    return tuple(
        _untested(base, head, scenario, metric, alpha)
        for scenario in head.scenarios()
        if scenario in base.scenarios()
        for metric in dict.fromkeys([*base.metrics(scenario), *head.metrics(scenario)])
        if (scenario, metric) not in known
    )


def _verdict(p_regressed: float, p_ok: float, alpha: float, obstacle: str) -> Verdict:
    if obstacle:
        return "inconclusive"
    return "regressed" if p_regressed <= alpha else "ok" if p_ok <= alpha else "inconclusive"


def _tested(base: Runs, head: Runs, question: Question, alpha: float) -> tuple[Change, PairedTest]:
    scenario, rule = question
    change = _change(base, head, scenario, rule)
    before, after = present(change.base), present(change.head)
    lowest = min(*before, *after)
    if lowest <= 0:
        raise UsageError(
            f"'{scenario}' has a {rule.name} of {lowest:g}, and a ratio takes values above 0",
            hint="give it an absolute limit instead of max_regression",
        )
    test = paired_test(before, after, change.better, rule.max_regression or 0.0, alpha)
    return replace(change, ratio=test.ratio, low=test.low, high=test.high, max_regression=rule.max_regression), test


def _untested(base: Runs, head: Runs, scenario: str, metric: str, alpha: float) -> Change:
    change = _change(base, head, scenario, Rule(metric))
    if any(value is None or value <= 0 for value in (*change.base, *change.head)):
        return change
    test = paired_test(present(change.base), present(change.head), change.better, 0.0, alpha)
    return replace(change, ratio=test.ratio, low=test.low, high=test.high)


def _change(base: Runs, head: Runs, scenario: str, rule: Rule) -> Change:
    metric = head.metric(scenario, rule.metric) or base.metric(scenario, rule.metric)
    unit, better = (metric.unit, metric.better) if metric else (rule.kind.unit, rule.kind.better)
    values = base.values(scenario, rule), head.values(scenario, rule)
    return Change(scenario, rule.metric, rule.statistic, unit, better, *values, ratio=None)


def present(values: Sequence[float | None]) -> tuple[float, ...]:
    """The values that were measured."""
    return tuple(value for value in values if value is not None)
