"""A report as one HTML page that needs nothing else: no network, no other file."""

import base64
import hashlib
from importlib.metadata import version
from pathlib import Path
from xml.etree.ElementTree import Element

from ossquant.bench.comparison import Comparison
from ossquant.bench.metrics import METRICS, QUALITY
from ossquant.bench.quality_result import QualityResult
from ossquant.bench.report.comparison_section import comparison_section
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.report.parts import badge, facts, folded, limits_table
from ossquant.bench.report.quality_section import quality_section
from ossquant.bench.report.result_section import result_section
from ossquant.bench.report.tree import element, raw_element, to_text

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")


def to_html(content: Content) -> str:
    """Write the page: a section a document, with charts as inline SVG, light or dark as the reader's system is."""
    title = _title(content)
    body = element(
        "main",
        element("header", element("h1", title, badge(content.verdict)), _theme_button()),
        *(_section(entry) for entry in content.entries),
        _definitions(content),
        element("footer", f"ossquant {version('ossquant')}"),
    )
    page = element("html", _head(title), element("body", body, raw_element("script", SCRIPT)), lang="en")
    return to_text(page)


def _head(title: str) -> Element:
    """Only the page's own style and script run, and nothing is loaded: what is measured may name itself anything."""
    policy = f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        raw_element("style", STYLE),
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _theme_button() -> Element:
    return element("button", "dark", id="theme", type="button", hidden="hidden", aria_label="switch light and dark")


def _title(content: Content) -> str:
    names = [document.target.model or document.target.name for _, document in content.results()]
    names += [str(document.reference.get("name", "")) for _, document in content.evaluations()]
    names += [document.head.model or document.head.target for _, document in content.comparisons()]
    return ", ".join(dict.fromkeys(name for name in names if name)) or "ossquant report"


def _section(entry: Entry) -> Element:
    document = entry.document
    if isinstance(document, Comparison):
        title, made = "Head against base", comparison_section(document)
    elif isinstance(document, QualityResult):
        title, made = "Quality", quality_section(document)
    else:
        title, made = document.target.model or "Bench", result_section(document)
    problem = element("p", entry.problem, class_="v-inconclusive") if entry.problem else None
    heading = element("h2", title, badge(entry.verdict))
    return element(
        "section", heading, element("p", entry.name, class_="dim"), problem, *limits_table(entry.limits), *made
    )


def _definitions(content: Content) -> Element:
    measured = {metric for _, each in content.results() for scenario in each.scenarios for metric in scenario.metrics}
    measured |= {metric for _, each in content.evaluations() for one in each.candidates for metric in one.metrics}
    measured |= {change.metric for _, each in content.comparisons() for change in each.changes}
    known = {name: kind.definition for name, kind in (METRICS | QUALITY).items() if name in measured}
    return element("section", folded("What each metric means", facts(known)))
