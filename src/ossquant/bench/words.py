"""Figures and changes in words, and texts of others made harmless to a terminal."""

import math

from ossquant.bench.comparison import Change, Limit
from ossquant.units import size

LONGEST = 300  # characters of a name that is shown
MOST_PLACES = 6


def figure(value: float | None, unit: str) -> str:
    """Say a value: seconds as ms below 1 s, bytes in decimal units, percent, else in four digits without its unit."""
    if value is None:
        return "-"
    if unit == "s":
        return f"{value * 1000:.4g} ms" if abs(value) < 1 else f"{value:.4g} s"
    if unit == "B":
        return size(value)
    if unit == "%":
        return f"{value:.4g} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def with_unit(value: float | None, unit: str) -> str:
    """Say a value with its unit."""
    told = figure(value, unit)
    return told if value is None or unit in ("s", "B", "%", "1", "share") else f"{told} {unit}"


def with_error(value: float, se: float | None, unit: str) -> str:
    """Say a value and its standard error, with two digits of the smaller one: 0.0031 ± 0.0002."""
    if not se:
        return figure(value, unit)
    places = 1 - math.floor(math.log10(min(se, abs(value) or se)))
    if places > MOST_PLACES:
        return f"{value:.2e} ± {se:.0e}"
    return f"{value:.{max(0, places)}f} ± {se:.{max(0, places)}f}{' %' if unit == '%' else ''}"


def percent(ratio: float | None) -> str:
    """Say a ratio as a change: 0.92 as −8.0 %."""
    if ratio is None:
        return "-"
    change = f"{100 * (ratio - 1):+.1f} %"
    return change.replace("-", "−") if change not in ("-0.0 %", "+0.0 %") else "0.0 %"


def interval(change: Change) -> str:
    """Say the interval of a change: −9.0 … −7.1 %."""
    if change.low is None or change.high is None:
        return "-"
    return f"{percent(change.low).removesuffix(' %')} … {percent(change.high)}"


def metric_name(item: Change | Limit) -> str:
    """As a gate file names it: ttft, or ttft.p99."""
    return item.metric if item.statistic == "value" else f"{item.metric}.{item.statistic}"


def allowed(item: Change | Limit) -> str:
    """Say what is allowed: at most 500 ms, or no more than 5 % worse."""
    if isinstance(item, Limit):
        return f"{'≤' if item.better == 'lower' else '≥'} {with_unit(item.bound, item.unit)}"
    return "" if item.max_regression is None else f"{100 * item.max_regression:.3g} % worse"


def plain(text: str) -> str:
    """A text of others on one line: what does not print, such as ESC or a right-to-left mark, is spelled out."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:LONGEST])
