"""How a bench result looks: a column a scenario, a row a metric."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ossquant.bench.metrics import METRICS
from ossquant.units import size

if TYPE_CHECKING:
    from ossquant.bench.result import Metric, Result, Scenario
    from ossquant.bench.selftest import Check

_NAMES = {
    "ttft": "TTFT", "ttfa": "TTFA", "tpot": "TPOT", "icl": "ICL", "e2e": "E2E", "queue_delay": "queue delay",
    "output_tokens_per_second": "out tokens/s", "input_tokens_per_second": "in tokens/s",
    "total_tokens_per_second": "all tokens/s", "tokens_per_second_per_user": "tokens/s per user",
    "requests_per_second": "requests/s", "goodput": "goodput, requests/s", "peak_device_bytes": "peak device memory",
    "peak_host_bytes": "peak host memory", "power_watts": "power", "joules_per_token": "J per token",
    "usd_per_million_tokens": "USD per Mtoken", "roofline_share": "of the roofline",
}  # fmt: skip


def print_result(result: "Result") -> None:
    """Print a table a scenario's medians, p90 and p95 where there are some, and why what is missing is."""
    from ossquant.cli import render

    for scenario in result.scenarios:
        rows = [(_name(name, metric, scenario), *_cells(metric)) for name, metric in _ordered(scenario)]
        if prefill := scenario.counts.get("prefill_tokens_per_second"):
            rows.append(("prefill tokens/s", say(prefill, "tokens/s"), "", "", "", ""))
        render.print_table(_title(scenario, result), ("", "median", "mean", "p90", "p95", "p99"), rows)
        for reason in dict.fromkeys(scenario.unmeasured.values()):
            names = [_NAMES[name] for name, why in scenario.unmeasured.items() if why == reason]
            render.note(f"not measured: {', '.join(names)}: {reason}")


def _title(scenario: "Scenario", result: "Result") -> str:
    requests, counts = scenario.requests, scenario.counts
    said = [f"{requests.succeeded} of {requests.sent} requests"]
    for side in ("input", "output"):
        if tokens := counts.get(f"{side}_tokens"):
            said.append(f"{tokens['median']:g} {side} tokens by {counts[side]}")
    mark = "" if scenario.valid else " (no result)"
    what = f"{result.target.model} on {result.target.engine}, {scenario.name}{mark}"
    return f"{what}: {', '.join(said)}, {scenario.seconds:.1f} s"


def _name(name: str, metric: "Metric", scenario: "Scenario") -> str:
    """What a metric is called; TTFA with how many answers had a final channel, where not all did."""
    some = name == "ttfa" and metric.count < scenario.requests.succeeded
    return f"{_NAMES[name]} of {metric.count}" if some else _NAMES[name]


def _ordered(scenario: "Scenario") -> "list[tuple[str, Metric]]":
    return [(name, scenario.metrics[name]) for name in METRICS if name in scenario.metrics]


def _cells(metric: "Metric") -> list[str]:
    shown = [metric.mean, metric.p90, metric.p95, metric.p99]
    return [say(metric.value, metric.unit), *("" if value is None else say(value, metric.unit) for value in shown)]


def say(value: float, unit: str) -> str:
    """Say a figure in the unit that people read it in."""
    if unit == "s":
        return f"{value * 1000:.1f} ms" if value < 10 else f"{value:.1f} s"
    if unit == "B":
        return size(value)
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.1f} W" if unit == "W" else f"{value:.2f}"


def print_checks(checks: "Sequence[Check]") -> None:
    """Print what was measured beside what was true, a table a server, a column a number of streams."""
    from ossquant.cli import render

    streams = list(dict.fromkeys(check.streams for check in checks))
    columns = ("", *(f"{number} stream{'s' * (number > 1)}" for number in streams))
    for case in dict.fromkeys(check.case for check in checks):
        found = {(check.metric, check.streams): _beside(check) for check in checks if check.case == case}
        rows = [
            (_NAMES[metric], *(found.get((metric, number), "") for number in streams))
            for metric in dict.fromkeys(metric for metric, _ in found)
        ]
        render.print_table(f"{case}: measured / true", columns, rows)


def _beside(check: "Check") -> str:
    scale, unit = (1000, " ms") if check.unit == "s" else (1, "")
    digits = 1 if unit or check.true >= 100 else 2
    mark = "" if check.right else " !"
    return f"{check.measured * scale:.{digits}f} / {check.true * scale:.{digits}f}{unit}{mark}"
