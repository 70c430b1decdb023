"""A report as GitHub's Markdown, for $GITHUB_STEP_SUMMARY."""

import re
import statistics
from collections.abc import Iterator, Sequence

from ossquant.bench.changes import present
from ossquant.bench.comparison import Change, Comparison, Limit, Verdict
from ossquant.bench.quality_result import QualityCandidate, QualityResult
from ossquant.bench.report.content import Content, Entry
from ossquant.bench.result import Result, Scenario
from ossquant.bench.words import allowed, figure, interval, metric_name, percent, plain, with_error
from ossquant.units import size

MARKS: dict[Verdict, str] = {
    "ok": "✅ ok",
    "regressed": "❌ regressed",
    "failed": "❌ failed",
    "inconclusive": "❔ inconclusive",
}
COLUMNS = ("ttft", "ttfa", "tpot", "e2e", "output_tokens_per_second", "tokens_per_second_per_user", "goodput")
QUALITY_COLUMNS = ("decode_tokens_per_second", "kld_mean", "kld_p99", "ppl_ratio", "same_top", "length_ratio")


def to_markdown(content: Content) -> str:
    """Write verdicts first, then what was measured."""
    lines: list[str] = []
    for entry in content.entries:
        lines += [f"## {_title(entry)}", "", *_body(entry), ""]
    return "\n".join(lines)


def _title(entry: Entry) -> str:
    document = entry.document
    what = {Comparison: "Comparison", QualityResult: "Quality", Result: "Bench"}[type(document)]
    verdict = f": {MARKS[entry.verdict]}" if entry.verdict else ""
    return f"{what}{verdict}"


def _body(entry: Entry) -> Iterator[str]:
    document = entry.document
    if entry.problem:
        yield f"> {escape(entry.problem)}\n"
    if isinstance(document, Comparison):
        yield from _comparison(document)
    else:
        yield from _quality(document) if isinstance(document, QualityResult) else _result(document)
        yield from _limits(entry.limits)


def _comparison(comparison: Comparison) -> Iterator[str]:
    for name, side in (("base", comparison.base), ("head", comparison.head)):
        yield f"- {name}: {escape(side.model or side.target)}, {escape(side.engine or '-')} ({escape(side.source)})"
    yield f"- {comparison.pairs} pairs, gate {escape(comparison.gate)}"
    yield from (f"- {escape(note)}" for note in comparison.notes)
    yield ""
    if comparison.gated:
        within = f"{100 * (1 - 2 * comparison.alpha):.4g} % interval"
        rows = [[*_change(each), allowed(each), MARKS[each.verdict or "inconclusive"]] for each in comparison.gated]
        columns = ("scenario", "metric", "base", "head", "change", within, "allowed", "verdict")
        yield from _table(columns, rows, texts=2)
    yield from _limits(comparison.limits)
    if others := [each for each in comparison.changes if not each.verdict]:
        yield "<details><summary>not gated</summary>\n"
        yield from _table(
            ("scenario", "metric", "base", "head", "change", "interval"), [_change(each) for each in others], texts=2
        )
        yield "</details>"


def _change(change: Change) -> list[str]:
    values = (statistics.median(side) if (side := present(each)) else None for each in (change.base, change.head))
    told = [figure(value, change.unit) for value in values]
    return [escape(change.scenario), metric_name(change), *told, percent(change.ratio), interval(change)]


def _limits(limits: Sequence[Limit]) -> Iterator[str]:
    if limits:
        rows = [[escape(each.scenario), metric_name(each), figure(each.value, each.unit), allowed(each),
                 MARKS[each.verdict]] for each in limits]  # fmt: skip
        yield from _table(("scenario", "metric", "value", "allowed", "verdict"), rows, texts=2)


def _result(result: Result) -> Iterator[str]:
    target = result.target
    yield f"{escape(target.model)}, {escape(target.engine)} at {escape(target.name)}; {escape(result.created)}"
    yield ""
    columns = [name for name in COLUMNS if any(name in scenario.metrics for scenario in result.scenarios)]
    rows = [_scenario(scenario, columns) for scenario in result.scenarios]
    yield from _table(("scenario", "requests", *columns, "valid"), rows, texts=1)
    for scenario in result.scenarios:
        yield from (f"- {escape(scenario.name)}: {escape(reason)}" for reason in scenario.invalid)


def _scenario(scenario: Scenario, columns: Sequence[str]) -> list[str]:
    cells = [figure(each.value, each.unit) if (each := scenario.metrics.get(name)) else "-" for name in columns]
    valid = "interrupted" if scenario.partial else "yes" if scenario.valid else "❌ no"
    return [escape(scenario.name), f"{scenario.requests.succeeded}/{scenario.requests.sent}", *cells, valid]


def _quality(result: QualityResult) -> Iterator[str]:
    reference = str(result.reference.get("name", ""))
    yield f"{result.tokens:,} tokens of {result.texts} texts, against {escape(reference)}; {escape(result.created)}"
    yield ""
    rows = [_candidate(candidate) for candidate in result.candidates]
    yield from _table(("", "format", "bytes", *QUALITY_COLUMNS), rows, texts=2)


def _candidate(candidate: QualityCandidate) -> list[str]:
    found = [candidate.metrics.get(name) for name in QUALITY_COLUMNS]
    cells = [with_error(each.value, each.se, each.unit) if each else "-" for each in found]
    return [escape(candidate.name), escape(candidate.format), size(candidate.nbytes), *cells]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' if index < texts else '---:' for index in range(len(columns)))}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def escape(text: str) -> str:
    """A text of others that stays text: no tag, link, emphasis, formula, or further cell."""
    entities = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_~\[\]|$#!@])", r"\\\1", entities)
