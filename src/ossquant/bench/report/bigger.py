"""A report as github-action-benchmark's customBiggerIsBetter: a list of names, units and values."""

import math
import statistics
from collections.abc import Iterator
from typing import Any

from ossquant.bench.changes import present
from ossquant.bench.metrics import Better
from ossquant.bench.report.content import Content
from ossquant.bench.words import metric_name, plain


def to_bigger_is_better(content: Content) -> list[dict[str, Any]]:
    """Write every value so that bigger is better: one of which less is better becomes 1 / value, and is named so.

    What is not above 0 is left out, as it has no inverse. Of comparisons it is the median of head's runs.
    """
    many = len(content.entries) > 1
    return [entry for name, found in _values(content) for entry in _turned(f"{name}: " if many else "", *found)]


Value = tuple[str, str, str, Better, float, float | None]  # scenario, metric, unit, better, value, standard error


def _values(content: Content) -> Iterator[tuple[str, Value]]:
    for name, result in content.results():
        for scenario in result.scenarios:
            if scenario.valid and not scenario.partial:
                for metric, each in scenario.metrics.items():
                    yield name, (scenario.name, metric, each.unit, each.better, each.value, None)
    for name, evaluation in content.evaluations():
        for candidate in evaluation.candidates:
            for metric, found in candidate.metrics.items():
                yield name, (candidate.name, metric, found.unit, found.better, found.value, found.se)
    for name, comparison in content.comparisons():
        for change in comparison.changes:
            if head := present(change.head):
                value = statistics.median(head)
                yield name, (change.scenario, metric_name(change), change.unit, change.better, value, None)


def _turned(
    prefix: str, scenario: str, metric: str, unit: str, better: Better, value: float, se: float | None
) -> Iterator[dict[str, Any]]:
    if not 0 < value < math.inf or math.isinf(1 / value):
        return
    shown, turned = (metric, value) if better == "higher" else (f"1 / {metric}", 1 / value)
    spread = {} if se is None else {"range": f"± {turned * se / value:.3g}"}
    in_unit = unit if better == "higher" else _inverse(unit)
    yield {"name": plain(f"{prefix}{scenario} / {shown}"), "unit": plain(in_unit), "value": turned, **spread}


def _inverse(unit: str) -> str:
    return "1" if unit == "1" else f"1/({unit})" if "/" in unit else f"1/{unit}"
