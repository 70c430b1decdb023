"""Parts that sections of the page share: tables, facts, badges, and metrics by the names people know."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from ossquant.bench.comparison import Limit, Verdict
from ossquant.bench.report.tree import Child, element
from ossquant.bench.words import allowed, figure, metric_name

LABELS = {
    "ttft": "TTFT", "ttfa": "TTFA", "tpot": "TPOT", "icl": "ICL", "e2e": "E2E",
    "output_tokens_per_second": "output tok/s", "input_tokens_per_second": "input tok/s",
    "total_tokens_per_second": "total tok/s", "tokens_per_second_per_user": "tok/s per user",
    "requests_per_second": "requests/s", "goodput": "goodput, 1/s", "roofline_share": "share of roof",
    "usd_per_million_tokens": "USD / Mtoken", "joules_per_token": "J / token", "power_watts": "W",
    "kld_mean": "KLD", "kld_median": "KLD median", "kld_p99": "KLD 99 %", "kld_p99_9": "KLD 99.9 %",
    "kld_max": "KLD max", "ppl_ratio": "PPL ratio", "same_top": "same top", "delta_p_mean": "mean Δp",
    "delta_p_rms": "RMS Δp", "length_ratio": "length", "decode_tokens_per_second": "decode tok/s",
}  # fmt: skip
FACTS_SHOWN = 200


def label(metric: str) -> str:
    """What people call a metric."""
    return LABELS.get(metric, metric.replace("_", " "))


def badge(verdict: Verdict | None) -> Element | None:
    """A verdict as a pill."""
    return element("span", verdict, class_=f"badge v-{verdict}") if verdict else None


def table(columns: Sequence[str], rows: Sequence[Sequence[Child]], texts: int = 1) -> Element:
    """A table; the first columns (texts of them) are text, the others are figures."""

    def cell(tag: str, child: Child, index: int) -> Element:
        return element(tag, child, class_="text" if index < texts else None)

    head = element("tr", *(cell("th", column, index) for index, column in enumerate(columns)))
    body = [element("tr", *(cell("td", child, index) for index, child in enumerate(row))) for row in rows]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def verdict_cell(verdict: Verdict | None) -> Element:
    """A verdict as a word of its colour."""
    return element("strong", verdict or "", class_=f"v-{verdict}")


def limits_table(limits: Sequence[Limit]) -> list[Element]:
    """Absolute limits under their heading; nothing if there are none."""
    if not limits:
        return []
    rows: list[list[Child]] = [[limit.scenario, metric_name(limit), figure(limit.value, limit.unit), allowed(limit),
             verdict_cell(limit.verdict)] for limit in limits]  # fmt: skip
    return [
        element("h3", "Absolute limits"),
        table(("scenario", "metric", "value", "allowed", "verdict"), rows, texts=2),
    ]


def bullets(items: Sequence[str]) -> list[Element]:
    """A list; nothing if it is empty."""
    return [element("ul", *(element("li", item) for item in items))] if items else []


def folded(summary: str, *children: Child) -> Element:
    """What is there for those who open it."""
    return element("details", element("summary", summary), *children)


def facts(values: Mapping[str, Any]) -> Element:
    """Keys, dotted, and values of an object of any shape."""
    flat = _flat(values, "", 6)
    rows = [each for key, value in flat[:FACTS_SHOWN] for each in (element("dt", key), element("dd", value))]
    return element("dl", *rows)


def _flat(value: Any, key: str, depth: int) -> list[tuple[str, str]]:
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if children is None or not depth:
        return [] if value is None else [(key, str(value))]
    return [row for name, each in children for row in _flat(each, f"{key}.{name}" if key else str(name), depth - 1)]
