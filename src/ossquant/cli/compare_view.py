"""What a comparison looks like in a terminal."""

import statistics
from collections.abc import Sequence

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
    """Print what is gated, what else changed, what to know, and the verdict last."""
    for name, side in (("base", comparison.base), ("head", comparison.head)):
        render.print_line(plain(f"{name}: {side.model or side.target}, {side.engine or '-'} ({side.source})"))
    if comparison.gated:
        many = f"{comparison.pairs} pairs" if comparison.pairs > 1 else "1 run a side"
        confidence = f"intervals of {100 * (1 - 2 * comparison.alpha):.4g} %"
        _print_changes(f"\n{many}, gate {plain(comparison.gate)}, {confidence}", comparison.gated, gated=True)
    print_limits(comparison.limits)
    if others := [change for change in comparison.changes if not change.verdict]:
        _print_changes("\nnot gated", others, gated=False)
    for note in comparison.notes:
        render.print_line(f"! {plain(note)}")
    render.print_line(SAYS[comparison.verdict])


def print_limits(limits: Sequence[Limit]) -> None:
    """Print absolute limits, if there are any."""
    if limits:
        rows = [[plain(limit.scenario), metric_name(limit), figure(limit.value, limit.unit), allowed(limit),
                 limit.verdict] for limit in limits]  # fmt: skip
        render.print_table("\nabsolute limits", ("", "", "head", "limit", ""), rows, texts=2, dense=True)


def _print_changes(title: str, changes: Sequence[Change], *, gated: bool) -> None:
    for scenario in dict.fromkeys(change.scenario for change in changes):
        rows = [_row(change, gated) for change in changes if change.scenario == scenario]
        verdict = ("limit", "verdict") if gated else ()
        render.print_table(title, (plain(scenario), "base", "head", "change", "", *verdict), rows, dense=True)
        title = ""


def _row(change: Change, gated: bool) -> list[str]:
    values = (statistics.median(side) if (side := present(each)) else None for each in (change.base, change.head))
    row = [metric_name(change), *(figure(value, change.unit) for value in values), percent(change.ratio)]
    if not gated:
        return [*row, interval(change)]
    return [*row, interval(change), allowed(change).removesuffix(" worse"), change.verdict or ""]
