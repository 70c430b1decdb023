"""The section of the page on a bench result: figures, percentiles, and throughput against load."""

from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from ossquant.bench.report.charts import Line, Range, curves, ranges
from ossquant.bench.report.parts import bullets, facts, folded, label, table
from ossquant.bench.report.tree import Child, element
from ossquant.bench.result import Result, Scenario
from ossquant.bench.words import figure

SUMMARY = (
    "ttft", "ttfa", "tpot", "e2e", "output_tokens_per_second", "tokens_per_second_per_user", "goodput",
    "roofline_share", "joules_per_token", "usd_per_million_tokens",
)  # fmt: skip
LATENCIES = ("ttft", "ttfa", "tpot", "e2e", "queue_delay")
PERCENTILES = ("p50", "p90", "p95", "p99")
PANELS = ("output_tokens_per_second", "tokens_per_second_per_user", "ttft")


def result_section(result: Result) -> list[Element]:
    """Summary, percentiles as table and chart, curves where there are several loads, the rest folded."""
    target = result.target
    made = [element("p", f"{target.engine or 'unknown engine'} at {target.name}, {result.created}", class_="dim")]
    if result.partial:
        made.append(element("p", "interrupted: what was measured until then", class_="v-inconclusive"))
    made.append(_summary(result.scenarios))
    made += bullets([f"{each.name} is no valid run: {reason}" for each in result.scenarios for reason in each.invalid])
    made += _curves(result.scenarios)
    made += _percentiles(result.scenarios)
    made.append(folded("Every metric", _everything(result.scenarios)))
    missing = {f"{each.name}: {metric}": why for each in result.scenarios for metric, why in each.unmeasured.items()}
    if missing:
        made.append(folded("Not measured", facts(missing)))
    made.append(folded("Settings", facts(result.settings)))
    made.append(folded("Machine, versions, server", facts(result.environment)))
    return made


def _summary(scenarios: Sequence[Scenario]) -> Element:
    columns = [metric for metric in SUMMARY if any(metric in each.metrics for each in scenarios)]
    rows: list[list[Child]] = [
        [each.name, f"{each.requests.succeeded}/{each.requests.sent}", *(_cell(each, metric) for metric in columns),
         _validity(each)]
        for each in scenarios
    ]  # fmt: skip
    return table(("scenario", "requests", *(label(metric) for metric in columns), "valid"), rows)


def _cell(scenario: Scenario, metric: str) -> str:
    found = scenario.metrics.get(metric)
    return "-" if found is None else figure(found.value, found.unit)


def _validity(scenario: Scenario) -> Element:
    said = "interrupted" if scenario.partial else "yes" if scenario.valid else "no"
    return element("span", said, class_="v-ok" if said == "yes" else "v-failed")


def _percentiles(scenarios: Sequence[Scenario]) -> list[Element]:
    panels = []
    for metric in LATENCIES:
        rows = [Range(each.name, tuple((name, getattr(found, name)) for name in PERCENTILES))
                for each in scenarios if (found := each.metrics.get(metric)) and found.p50 is not None]  # fmt: skip
        if rows:
            heading = element("h3", f"{label(metric)} over requests")
            panels.append(element("div", heading, ranges(rows, _seconds), class_="panel half"))
    return [element("div", *panels, class_="panels")] if panels else []


def _seconds(value: float) -> str:
    return figure(value, "s")


def _curves(scenarios: Sequence[Scenario]) -> list[Element]:
    """A row of panels over the concurrency, one over the rate, where there are two loads or more."""
    made = []
    for x_label, loads in (("concurrent streams", _loads(scenarios, "concurrency")),
                           ("requests a second", _loads(scenarios, "rate"))):  # fmt: skip
        panels = [panel for metric in PANELS if (panel := _panel(metric, loads, x_label)) is not None]
        if panels:
            made.append(element("div", *panels, class_="panels"))
    return made


def _loads(scenarios: Sequence[Scenario], key: str) -> list[tuple[float, Scenario]]:
    """Scenarios by how much load they put on, in its order; dialogues are another kind of load."""
    found = []
    for scenario in scenarios:
        kind = scenario.shape["kind"]
        load = 1 if kind == "single" and key == "concurrency" else scenario.shape.get(key)
        if kind != "multi-turn" and isinstance(load, int | float) and 0 < load < 1e9:
            found.append((float(load), scenario))
    return sorted(found, key=lambda each: each[0])


def _panel(metric: str, loads: Sequence[tuple[float, Scenario]], x_label: str) -> Element | None:
    statistics = ("p50", "p95") if metric in LATENCIES else ("value",)
    lines = []
    for statistic in statistics:
        points = [(load, value) for load, scenario in loads if (found := scenario.metrics.get(metric))
                  and (value := getattr(found, statistic)) is not None]  # fmt: skip
        if len(points) > 1:
            lines.append(Line("" if len(statistics) == 1 else statistic, tuple(points)))
    if not lines:
        return None
    say: Callable[[float], str] = _seconds if metric in LATENCIES else (lambda value: figure(value, ""))
    return element("div", element("h3", label(metric)), curves(lines, x_label, say), class_="panel")


def _everything(scenarios: Sequence[Scenario]) -> Element:
    rows: list[list[Child]] = [
        [scenario.name, metric, figure(each.value, each.unit),
         *(figure(getattr(each, name), each.unit) for name in ("mean", *PERCENTILES)), f"{each.count:,}", each.source]
        for scenario in scenarios
        for metric, each in scenario.metrics.items()
    ]  # fmt: skip
    return table(("scenario", "metric", "value", "mean", *PERCENTILES, "of", "counted by"), rows, texts=2)
