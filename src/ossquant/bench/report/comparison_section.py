"""The section of the page on a comparison: a row a change, with its interval drawn."""

import statistics
from xml.etree.ElementTree import Element

from ossquant.bench.changes import present
from ossquant.bench.comparison import Change, Comparison
from ossquant.bench.report.charts import forest
from ossquant.bench.report.parts import bullets, folded, limits_table, table, verdict_cell
from ossquant.bench.report.tree import Child, element
from ossquant.bench.words import allowed, figure, interval, metric_name, percent

COLUMNS = ("scenario", "metric", "base", "head", "change")


def comparison_section(comparison: Comparison) -> list[Element]:
    """Sides, gated changes, limits, the rest folded."""
    made = [
        element("p", f"{name}: {side.model or side.target}, {side.engine or '-'} — {side.source}", class_="dim")
        for name, side in (("base", comparison.base), ("head", comparison.head))
    ]
    many = f"{comparison.pairs} pairs of runs" if comparison.pairs > 1 else "one run a side"
    made.append(element("p", f"{many}, gate {comparison.gate}, {comparison.created}", class_="dim"))
    made += bullets(comparison.notes)
    if comparison.gated:
        within = f"{100 * (1 - 2 * comparison.alpha):.4g} % interval"
        made.append(element("h3", "Gated changes"))
        rows = [_gated(change) for change in comparison.gated]
        made.append(table((*COLUMNS, within, "p, Holm", "allowed", "verdict"), rows, texts=2))
        if comparison.pairs > 1:
            made.append(element("div", forest(comparison.gated), class_="wide"))
    made += limits_table(comparison.limits)
    if others := [_row(change) for change in comparison.changes if not change.verdict]:
        summary = f"{len(others)} metrics that are not gated"
        made.append(folded(summary, table((*COLUMNS, "interval, not adjusted"), others, texts=2)))
    return made


def _row(change: Change) -> list[Child]:
    values = (statistics.median(side) if (side := present(each)) else None for each in (change.base, change.head))
    told = [figure(value, change.unit) for value in values]
    return [change.scenario, metric_name(change), *told, percent(change.ratio), interval(change)]


def _gated(change: Change) -> list[Child]:
    p = "-" if change.p is None or change.low is None else f"{change.p:.2g}"
    return [*_row(change), p, allowed(change), verdict_cell(change.verdict)]
