#!/usr/bin/env python3
"""Hold the estimator against every published measurement in tests/data; with --write put the table into docs/fit.md."""

import argparse
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ossquant.fit import candidate, fit
from ossquant.hardware import Machine, find_device
from ossquant.memory import Term, Workload, parse_engine
from ossquant.memory.terms import exact
from ossquant.spec import ModelSpec
from ossquant.units import GIB

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
NOT_NAMED = "1024GB"  # a card that the source does not name and the figure does not depend on
BEGIN, END = "<!-- fit_accuracy: begin -->", "<!-- fit_accuracy: end -->"
LIMITS = {"component": (0.01, 0.05), "total": (0.05, 0.10)}


@dataclass(frozen=True)
class Result:
    """A point, the prediction for it, and how far off its expected figure is; error None where there is no figure."""

    point: Mapping[str, Any]
    predicted: Term
    verdict: str

    @property
    def error(self) -> float:
        return self.predicted.expected / self.point["bytes"] - 1

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.point["bytes"] <= self.predicted.high


def memory_results() -> list[Result]:
    """Predict every point of memory_points.toml."""
    return [_result(point) for point in _points("memory_points.toml")]


def decode_results() -> list[tuple[Mapping[str, Any], float, float]]:
    """Predict every point of decode_points.toml: the point, and tokens a second from low to high."""
    found = []
    for point in _points("decode_points.toml"):
        verdict = _fit(point)
        if verdict.decode is None:
            raise SystemExit(f"{point['id']}: no rate for {point['gpu']}")
        found.append((point, verdict.decode.low, verdict.decode.high))
    return found


def _points(name: str) -> list[dict[str, Any]]:
    points = tomllib.loads((DATA / name).read_text("utf-8"))["point"]
    options = {field.name for field in fields(Workload)}
    for point in points:
        if unknown := set(point.get("options", {})) - options:
            raise SystemExit(f"{name}: {point['id']} has unknown options {unknown}")
    return list(points)


def _fit(point: Mapping[str, Any]) -> Any:
    engine = parse_engine(point["engine"], point.get("version"))
    question = candidate(point["model"], ModelSpec.published(point["model"]), point["format"], engine)
    machine = Machine(find_device(point.get("gpu", NOT_NAMED)), point.get("count", 1), None)
    return fit(question, machine, Workload(**point.get("options", {})), plan_offload=False)


def _result(point: Mapping[str, Any]) -> Result:
    verdict = _fit(point)
    estimate = verdict.estimate
    pool = verdict.usable
    taken = estimate.weights + estimate.compute + estimate.overhead
    terms = {
        "weights": estimate.weights,
        "kv_cache": estimate.kv_cache,
        "compute": estimate.compute,
        "total": estimate.total,
        "host_weights": exact(estimate.host_weights),
        "available_kv_cache": Term(pool - taken.high, pool - taken.expected, pool - taken.low, taken.basis),
    }
    first, *rest = (terms[name] for name in point["terms"])
    predicted = first
    for term in rest:
        predicted = predicted + term
    return Result(point, predicted, verdict.verdict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/fit.md")
    parser.add_argument("--all", action="store_true", help="print every point")
    arguments = parser.parse_args()
    results = memory_results()
    if arguments.all:
        for result in results:
            print(_line(result))
        for point, low, high in decode_results():
            print(f"{point['id']:22} {low:6.1f} to {high:6.1f} tokens/s, published {point['tokens_per_second']}")
    text = report(results, decode_results())
    if arguments.write:
        page = ROOT / "docs" / "fit.md"
        before, _, rest = page.read_text("utf-8").partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", "utf-8")
    else:
        print(text)


def _line(result: Result) -> str:
    point, predicted = result.point, result.predicted
    figures = f"{predicted.low / GIB:8.3f} {predicted.expected / GIB:8.3f} {predicted.high / GIB:8.3f}"
    if point["kind"] == "oom":
        return f"{point['id']:5} oom       {figures}           {result.verdict}"
    return f"{point['id']:5} {point['kind']:9} {figures} {point['bytes'] / GIB:8.3f} {result.error:+7.1%}"


def report(results: list[Result], rates: list[tuple[Mapping[str, Any], float, float]]) -> str:
    """The tables in Markdown."""
    lines = ["| measured | points | within | within | outside |", "|---|---|---|---|---|"]
    for kind, (near, far) in LIMITS.items():
        chosen = [result for result in results if result.point["kind"] == kind]
        shares = [sum(abs(result.error) <= limit for result in chosen) / len(chosen) for limit in (near, far)]
        outside = ", ".join(r.point["id"] for r in chosen if abs(r.error) > (far if kind == "total" else near))
        name = {"component": "weights, KV cache, buffers", "total": "whole devices"}[kind]
        lines.append(
            f"| {name} | {len(chosen)} | {near:.0%}: {shares[0]:.0%} | {far:.0%}: {shares[1]:.0%} | {outside or '-'} |"
        )
    bounds = [result for result in results if result.point["kind"] == "bound"]
    inside = [result for result in bounds if result.inside]
    missed = ", ".join(r.point["id"] for r in bounds if not r.inside)
    lines.append(
        f"| what vLLM left for its cache | {len(bounds)} | in our range: {len(inside) / len(bounds):.0%} | "
        f"| {missed or '-'} |"
    )
    hits = [point for point, low, high in rates if low <= point["tokens_per_second"] <= high]
    missed = ", ".join(point["id"] for point, *_ in rates if point not in hits)
    lines.append(f"| decode rates | {len(rates)} | in our range: {len(hits) / len(rates):.0%} | | {missed or '-'} |")
    failed = [result for result in results if result.point["kind"] == "oom"]
    wrong = [result.point["id"] for result in failed if result.verdict == "fits"]
    lines.append(f'| ran out of memory | {len(failed)} | called "fits": {len(wrong)} | | {", ".join(wrong) or "-"} |')
    lines += ["", *_reasons(results, rates)]
    return "\n".join(lines)


def _reasons(results: list[Result], rates: list[tuple[Mapping[str, Any], float, float]]) -> list[str]:
    """Why a point lies outside, as its note says."""
    outside = [
        f"- {result.point['id']}: {result.error:+.1%}. {result.point.get('note', 'no reason known')}"
        for result in results
        if result.point["kind"] in LIMITS
        and abs(result.error) > LIMITS[result.point["kind"]][result.point["kind"] == "total"]
    ]
    outside += [
        f"- {point['id']}: {point['tokens_per_second']:g} tokens/s, our range is {low:.0f} to {high:.0f}. "
        f"{point.get('note', 'no reason known')}"
        for point, low, high in rates
        if not low <= point["tokens_per_second"] <= high
    ]
    return outside


if __name__ == "__main__":
    sys.exit(main())
