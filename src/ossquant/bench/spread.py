"""Spread: the median and percentiles of what many requests took, made into a Metric."""

import statistics
from collections.abc import Sequence

from ossquant.bench.metrics import METRICS
from ossquant.bench.result import Metric, Source

P99_REQUESTS = 300  # below it p99 is noise: its coefficient of variation is 16 % at 100 requests, 6 % at 1,000


def quantile(values: Sequence[float], share: float) -> float:
    """Interpolate linearly between the two values around a share of the sorted ones."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(name: str, values: Sequence[float], requests: int, source: Source) -> Metric:
    """Make a metric of many values, which came from so many requests; its value is the median."""
    kind = METRICS[name]
    return Metric(
        value=statistics.median(values),
        unit=kind.unit,
        better=kind.better,
        count=len(values),
        source=source,
        mean=statistics.fmean(values),
        p50=quantile(values, 0.50),
        p90=quantile(values, 0.90),
        p95=quantile(values, 0.95),
        p99=quantile(values, 0.99) if requests >= P99_REQUESTS else None,
    )


def figure(name: str, value: float, count: int, source: Source) -> Metric:
    """Make a metric of one figure of the whole run."""
    kind = METRICS[name]
    return Metric(value, kind.unit, kind.better, count, source)
