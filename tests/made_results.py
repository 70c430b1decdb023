"""Results as a bench run writes them, with the figures that a test wants."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from ossquant.bench.metrics import METRICS
from ossquant.bench.result import Metric, Requests, Result, Scenario, Target
from ossquant.bench.runs import Runs

START = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


def scenario(name: str = "single", invalid: str = "", **values: float) -> Scenario:
    """A load shape with a value a metric; its percentiles lie around it."""
    metrics = {
        metric: Metric(
            value, METRICS[metric].unit, METRICS[metric].better, 300, "usage",
            mean=value, p50=value, p90=1.2 * value, p95=1.3 * value, p99=1.5 * value,
        )
        for metric, value in values.items()
    }  # fmt: skip
    return Scenario(
        name,
        {"kind": "single"},
        not invalid,
        (invalid,) if invalid else (),
        False,
        Requests(300, 300, 0, 0),
        60.0,
        metrics,
    )


def result(*scenarios: Scenario, minute: int = 0) -> Result:
    """A run that began some minutes after the first."""
    created = (START + timedelta(minutes=minute)).isoformat()
    target = Target("endpoint", "http://127.0.0.1:8000/v1", "gpt-oss-20b", "vllm 0.32")
    return Result(created, "0.1.0", False, target, {"gpu": "RTX 4090"}, {"seed": 0}, scenarios)


def throughputs(name: str, values: list[float], minutes: list[int] | None = None) -> Runs:
    """Runs of one scenario with these output_tokens_per_second."""
    at = minutes or [0] * len(values)
    made = (
        result(scenario(output_tokens_per_second=value), minute=minute)
        for value, minute in zip(values, at, strict=True)
    )
    return Runs(name, name, tuple(made))


def with_settings(runs: Runs, **settings: object) -> Runs:
    """The same runs, taken with other settings."""
    return replace(runs, results=tuple(replace(each, settings={**each.settings, **settings}) for each in runs.results))
