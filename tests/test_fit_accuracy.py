"""The estimator against published measurements."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """scripts/fit_accuracy.py as a module."""
    return runpy.run_path(str(ROOT / "scripts" / "fit_accuracy.py"))


@pytest.fixture(scope="module")
def results(script: dict[str, Any]) -> list[Any]:
    """Every memory point with its prediction."""
    return list(script["memory_results"]())


def test_components(results: list[Any]) -> None:
    """Weights, caches and buffers are within 1 % of 95 % of the published figures, and within 5 % of all."""
    errors = [abs(result.error) for result in results if result.point["kind"] == "component"]
    assert len(errors) >= 40
    assert sum(error <= 0.01 for error in errors) >= 0.95 * len(errors)
    assert max(errors) <= 0.05


def test_totals(results: list[Any]) -> None:
    """Whole devices are within 10 % of 90 % of the published figures, and within 5 % of 70 %."""
    errors = [abs(result.error) for result in results if result.point["kind"] == "total"]
    assert len(errors) >= 20
    assert sum(error <= 0.10 for error in errors) >= 0.90 * len(errors)
    assert sum(error <= 0.05 for error in errors) >= 0.70 * len(errors)


def test_no_promise_that_was_broken(results: list[Any]) -> None:
    """Nothing that ran out of memory is said to fit."""
    failed = [result for result in results if result.point["kind"] == "oom"]
    assert len(failed) >= 5
    assert all(result.verdict != "fits" for result in failed)


def test_what_vllm_has_left(results: list[Any]) -> None:
    """What vLLM had left for its cache lies in the predicted range."""
    bounds = [result for result in results if result.point["kind"] == "bound"]
    assert len(bounds) >= 5
    assert all(result.inside for result in bounds)


def test_decode_rates(script: dict[str, Any]) -> None:
    """85 % of the published decode rates lie in the predicted range, and no range is wider than a factor of 5."""
    rates = script["decode_results"]()
    assert len(rates) >= 45
    hits = [low <= point["tokens_per_second"] <= high for point, low, high in rates]
    assert sum(hits) >= 0.85 * len(hits)
    assert all(high <= 5 * low for _, low, high in rates)


def test_the_page_says_so(script: dict[str, Any], results: list[Any]) -> None:
    """The table of docs/fit.md is what scripts/fit_accuracy.py prints today."""
    page = (ROOT / "docs/fit.md").read_text("utf-8")
    printed = page.partition(script["BEGIN"])[2].partition(script["END"])[0].strip()
    assert printed == script["report"](results, script["decode_results"]())
