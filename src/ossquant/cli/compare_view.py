"""What a comparison looks like in a terminal."""

import statistics
from collections.abc import Callable, Sequence

from ossquant.bench.changes import present
from ossquant.bench.comparison import Change, Comparison, Limit
from ossquant.bench.words import allowed, figure, interval, metric_name, percent, plain
from ossquant.cli import render

SAYS = {
    "ok": "ok: no worse than the gate allows",
    "regressed": "regressed: worse than the gate allows",
    "failed": "failed: an absolute limit is not kept",
    "inconclusive": "inconclusive: neither shown to be worse than the gate allows, nor to be no worse",
}


def print_comparison(comparison: Comparison) -> None:
    """Print what is gated, then every metric, what to know, and the verdict last."""
    for name, side in (("base", comparison.base), ("head", comparison.head)):
        render.print_line(plain(f"{name}: {side.model or side.target}, {side.engine or '-'} ({side.source})"))
    if comparison.gated:
        title = f"gate {plain(comparison.gate)}, one run a side"
        if comparison.pairs > 1:
            within = f"{100 * (1 - 2 * comparison.alpha):.4g} %"
            title = f"gate {plain(comparison.gate)}, {comparison.pairs} pairs, intervals of {within}"
        _print_by_scenario(title, comparison.gated, ("change", "", "allowed", "verdict"), _verdict)
    print_limits(comparison.limits)
    title = "medians of the runs" if comparison.pairs > 1 else "both runs"
    _print_by_scenario(title, comparison.changes, ("base", "head", "change", ""), _values)
    for note in comparison.notes:
        render.print_line(f"! {plain(note)}")
    render.print_line(SAYS[comparison.verdict])


def print_limits(limits: Sequence[Limit]) -> None:
    """Print absolute limits, if there are any."""
    if limits:
        rows = [[plain(limit.scenario), metric_name(limit), figure(limit.value, limit.unit), allowed(limit),
                 limit.verdict] for limit in limits]  # fmt: skip
        render.print_table("\nabsolute limits", ("", "", "head", "allowed", "verdict"), rows, texts=2, dense=True)


def _print_by_scenario(
    title: str, changes: Sequence[Change], columns: Sequence[str], row: Callable[[Change], list[str]]
) -> None:
    for scenario in dict.fromkeys(change.scenario for change in changes):
        rows = [[metric_name(each), *row(each)] for each in changes if each.scenario == scenario]
        render.print_table(f"\n{title}" if title else "", (plain(scenario), *columns), rows, dense=True)
        title = ""


def _verdict(change: Change) -> list[str]:
    return [percent(change.ratio), _interval(change), allowed(change), change.verdict or ""]


def _values(change: Change) -> list[str]:
    values = (statistics.median(side) if (side := present(each)) else None for each in (change.base, change.head))
    return [*(figure(value, change.unit) for value in values), percent(change.ratio), _interval(change)]


def _interval(change: Change) -> str:
    return "" if change.low is None else interval(change)
