"""What ossquant eval shows: two tables, a plot, or one JSON object."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ossquant.bench.candidate import SPEED_RUNS
from ossquant.bench.evaluate import Evaluation
from ossquant.bench.plot import Point, scatter
from ossquant.bench.quality import Estimate, metric
from ossquant.bench.reference import Reference
from ossquant.bench.source import Source
from ossquant.cli import render
from ossquant.units import size

SCHEMA_VERSION = 1
FEWEST_FOR_P99_9 = 1000
MOST_PLACES = 5
FINEST = 0.001  # below it a value with a small error needs an exponent
LONGEST_LABEL = 20  # leaves the figures room in 80 columns


def line(evaluation: Evaluation) -> str:
    """One line about a candidate that is done."""
    facts = evaluation.facts
    return f"{facts.name} ({facts.format}, {size(facts.nbytes)}): KLD {figure(evaluation.quality['kld_mean'])}"


def print_tables(found: Sequence[Evaluation], source: Source, reference: Reference) -> None:
    """Print bytes and speed beside what matters of quality, then the rest of it."""
    facts = source.candidate.facts
    render.print_table(
        f"{_what(reference)}, against {labels([facts.name])[0]} ({facts.format}, {size(facts.nbytes)})",
        ("", "bytes", "bits", "tok/s", "KLD", "PPL ratio"),
        _rows(found, _main),
        dense=True,
    )
    for columns, cells in (
        (("same top %", "mean Δp %", "RMS Δp %", "length"), _tokens),
        (tuple(_TAIL.values()), _tail),
    ):
        render.print_table("", ("", *columns), _rows(found, cells), dense=True)
    for remark in _remarks(found, reference):
        render.note(remark)


_TAIL = {"kld_median": "KLD median", "kld_p99": "99 %", "kld_p99_9": "99.9 %", "kld_max": "max"}


def _rows(found: Sequence[Evaluation], cells: Callable[[Evaluation], list[str]]) -> list[list[str]]:
    names = labels([evaluation.facts.name for evaluation in found])
    return [[name, *cells(evaluation)] for name, evaluation in zip(names, found, strict=True)]


def _main(evaluation: Evaluation) -> list[str]:
    facts, quality, rate = evaluation.facts, evaluation.quality, evaluation.decode_rate
    return [
        size(facts.nbytes),
        f"{facts.bits_per_weight:.2f}",
        "-" if rate is None else f"{rate:,.{0 if rate >= 100 else 1}f}",
        figure(quality["kld_mean"]),
        figure(quality["ppl_ratio"]),
    ]


def _tokens(evaluation: Evaluation) -> list[str]:
    figures = [figure(evaluation.quality[each]) for each in ("same_top", "delta_p_mean", "delta_p_rms")]
    return [*figures, "-" if evaluation.answers is None else figure(evaluation.answers.ratio)]


def _tail(evaluation: Evaluation) -> list[str]:
    return [figure(evaluation.quality[each]) for each in _TAIL]


def labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, or all of it where that is not enough to tell them apart, its middle left out."""
    short = [Path(name).name or name for name in names]
    whole = [each if short.count(each) == 1 else name for each, name in zip(short, names, strict=True)]
    half = LONGEST_LABEL // 2
    return [each if len(each) <= LONGEST_LABEL else f"{each[: half - 1]}…{each[-half:]}" for each in whole]


def figure(estimate: Estimate) -> str:
    """An estimate and its error, which gets two digits: 0.0037 ±0.0015."""
    value, se = estimate.value, estimate.se
    if se is None:
        return f"{value:.3g}"
    places = 1 - math.floor(math.log10(se)) if se else 0
    if places > MOST_PLACES:
        return (f"{value:.2e}" if abs(value) < FINEST else f"{value:.6f}") + f" ±{se:.0e}"
    return f"{value:.{max(0, places)}f} ±{se:.{max(0, places)}f}"


def _what(reference: Reference) -> str:
    tokens, texts, request = len(reference.hidden), len(reference.texts), reference.request
    if request.kind == "plain":
        return f"{tokens:,} tokens of {texts} windows of {request.window}"
    own = len(reference.answered)
    return f"{tokens:,} tokens of {texts} answers" + (f", {own} of them its own" if own < texts else "")


def _remarks(found: Sequence[Evaluation], reference: Reference) -> list[str]:
    own = reference.answered
    cut = sum(text.token_ids[-1] not in reference.stops for text in own)
    remarks = [f"{cut} of the reference's {len(own)} answers were cut off at {reference.request.max_new_tokens} tokens"]
    remarks = remarks if cut else []
    remarks += [
        f"{each.facts.name}: {each.answers.cut} of {each.answers.count} answers were cut off, so lengths are too short"
        for each in found
        if each.answers is not None and each.answers.cut
    ]
    if len(reference.hidden) < FEWEST_FOR_P99_9:
        remarks.append(f"of {len(reference.hidden)} tokens the 99.9th percentile says little more than the maximum")
    return remarks


def svg(found: Sequence[Evaluation], x: str) -> str:
    """Draw KLD against bytes or speed."""
    names = labels([evaluation.facts.name for evaluation in found])
    points = []
    for name, evaluation in zip(names, found, strict=True):
        kld, rate = evaluation.quality["kld_mean"], evaluation.decode_rate
        cost = rate if x == "speed" and rate is not None else evaluation.facts.nbytes / 1e9
        points.append(Point(name, cost, kld.value, kld.se))
    if x == "speed":
        return scatter(points, "decode, tokens/s", "higher", "KLD against speed")
    return scatter(points, "bytes, GB", "lower", "KLD against bytes")


def as_json(found: Sequence[Evaluation], source: Source, reference: Reference) -> dict[str, Any]:
    """All of it, version 1."""
    facts = source.candidate.facts
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "eval",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "ossquant": version("ossquant"),
        "reference": {**asdict(facts), "bits_per_weight": facts.bits_per_weight, "device": reference.device,
                      "folder": str(source.folder)},
        "settings": asdict(reference.request),
        "texts": len(reference.texts),
        "tokens": len(reference.hidden),
        "candidates": [_candidate(evaluation) for evaluation in found],
    }  # fmt: skip


def _candidate(evaluation: Evaluation) -> dict[str, Any]:
    facts = evaluation.facts
    return {
        **asdict(facts),
        "bits_per_weight": facts.bits_per_weight,
        "scenarios": [{"name": "quality", "metrics": _metrics(evaluation)}],
    }


def _metrics(evaluation: Evaluation) -> Mapping[str, Any]:
    metrics = {name: metric(name, each, evaluation.tokens) for name, each in evaluation.quality.items()}
    if evaluation.answers is not None:
        answers = evaluation.answers
        metrics["length_ratio"] = metric("length_ratio", answers.ratio, answers.count) | {"cut": answers.cut}
    if evaluation.decode_rate is not None:
        rate = Estimate(evaluation.decode_rate, None, None)
        metrics["decode_tokens_per_second"] = metric("decode_tokens_per_second", rate, SPEED_RUNS)
    return metrics
