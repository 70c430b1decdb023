"""Paired runs: by how much did a metric change, is it more than a limit, and how often may one look."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ossquant.bench.metrics import Better
from ossquant.bench.student import t_cdf, t_quantile

ALPHA = 0.05  # of each answer, over all looks: a change of exactly the limit is called regressed, or ok, that seldom

FARTHEST = 700.0  # a ratio's logarithm that a float still holds


@dataclass(frozen=True)
class PairedTest:
    """Head against base over pairs of runs.

    ratio is the geometric mean of head / base, low and high its interval; p_regressed the probability of such a result,
    or a worse one, if head were just within the limit, p_ok that of such a one, or a better one, if it were just
    beyond. With one pair there is no interval, and both are 1.
    """

    ratio: float
    low: float | None
    high: float | None
    p_regressed: float
    p_ok: float


def paired_test(
    base: Sequence[float], head: Sequence[float], better: Better, max_regression: float, alpha: float
) -> PairedTest:
    """Test log ratios by Student's t; every value is above 0, alpha that of one side, max_regression a share."""
    logs = [math.log(after) - math.log(before) for before, after in zip(base, head, strict=True)]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return PairedTest(_exp(mean), None, None, 1.0, 1.0)
    df = len(logs) - 1
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    reach = t_quantile(1 - alpha, df) * error
    below = t_cdf(_t(mean - log_limit(better, max_regression), error), df)
    p_regressed, p_ok = (below, 1 - below) if better == "higher" else (1 - below, below)
    return PairedTest(_exp(mean), _exp(mean - reach), _exp(mean + reach), p_regressed, p_ok)


def log_limit(better: Better, max_regression: float) -> float:
    """The logarithm of head / base at which head is worse by the share max_regression."""
    return math.log1p(-max_regression if better == "higher" else max_regression)


def _exp(logarithm: float) -> float:
    return math.exp(min(FARTHEST, logarithm))


def _t(distance: float, error: float) -> float:
    if error:
        return distance / error
    return math.copysign(math.inf, distance) if distance else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's step-down method, in the order given."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def looks(pairs: int, max_pairs: int) -> tuple[int, ...]:
    """After how many pairs to look: pairs, then half as many again each time, up to max_pairs."""
    planned = [pairs]
    while planned[-1] < max_pairs:
        planned.append(min(max_pairs, math.ceil(1.5 * planned[-1])))
    return tuple(planned)


def spend(number: int, alpha: float = ALPHA) -> tuple[float, ...]:
    """Share alpha among the looks: half for the first, the rest equally for the others; all of it for a single one.

    The shares add up to alpha, so the probability of a wrong answer at any look is below it, whatever the looks have
    in common (Bonferroni's inequality; an alpha-spending rule that needs no joint distribution).
    """
    return (alpha,) if number == 1 else (alpha / 2, *[alpha / 2 / (number - 1)] * (number - 1))
