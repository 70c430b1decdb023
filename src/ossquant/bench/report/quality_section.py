"""The section of the page on an evaluation: bytes, speed and distance of every format, and which are on the front."""

from xml.etree.ElementTree import Element

from ossquant.bench.plot import Point
from ossquant.bench.quality_result import QualityCandidate, QualityResult
from ossquant.bench.report.charts import pareto
from ossquant.bench.report.parts import facts, folded, label, table
from ossquant.bench.report.tree import Child, element
from ossquant.bench.words import figure, with_error
from ossquant.units import size

SUMMARY = ("decode_tokens_per_second", "kld_mean", "ppl_ratio", "same_top", "length_ratio")
REST = ("kld_median", "kld_p99", "kld_p99_9", "kld_max", "delta_p_mean", "delta_p_rms", "ppl", "ppl_reference")


def quality_section(result: QualityResult) -> list[Element]:
    """Table, scatter plots with their Pareto fronts, the tail folded."""
    reference = str(result.reference.get("name", ""))
    about = f"{result.tokens:,} tokens of {result.texts} texts, against {reference}, {result.created}"
    made = [
        element("p", about, class_="dim"),
        element("p", "± is one standard error, the texts as units", class_="dim"),
    ]
    columns = ("format", "bytes", "bits", *(label(metric) for metric in SUMMARY))
    made.append(table(("", *columns), [_row(each) for each in result.candidates], texts=2))
    made += _plots(result)
    rest = [[each.name, *(_cell(each, metric) for metric in REST)] for each in result.candidates]
    made.append(folded("The tail of KLD, Δp, PPL", table(("", *(label(metric) for metric in REST)), rest)))
    made.append(folded("Settings and reference", facts({"reference": result.reference, "settings": result.settings})))
    return made


def _row(candidate: QualityCandidate) -> list[Child]:
    cells = [_cell(candidate, metric) for metric in SUMMARY]
    return [candidate.name, candidate.format, size(candidate.nbytes), f"{candidate.bits_per_weight:.3g}", *cells]


def _cell(candidate: QualityCandidate, metric: str) -> str:
    found = candidate.metrics.get(metric)
    return "-" if found is None else with_error(found.value, found.se, found.unit)


def _plots(result: QualityResult) -> list[Element]:
    """KLD over bytes, and over tokens a second where they were measured of two or more."""
    measured = [(each, kld) for each in result.candidates if (kld := each.metrics.get("kld_mean"))]
    by_bytes = [Point(each.name, each.nbytes, kld.value, kld.se) for each, kld in measured]
    by_rate = [Point(each.name, rate.value, kld.value, kld.se) for each, kld in measured
               if (rate := each.metrics.get("decode_tokens_per_second"))]  # fmt: skip
    panels = []
    if len(by_bytes) > 1:
        panels.append(_panel("KLD over bytes", pareto(by_bytes, "bytes", False, size)))
    if len(by_rate) > 1:
        panels.append(_panel("KLD over speed", pareto(by_rate, "tokens/s, one stream", True, lambda x: figure(x, ""))))
    return [element("div", *panels, class_="panels")] if panels else []


def _panel(title: str, chart: Element) -> Element:
    return element("div", element("h3", title), chart, class_="panel half")
