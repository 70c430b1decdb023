import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ossquant.bench.metrics import Better
from ossquant.bench.paired import ALPHA, holm, looks, paired_test, spend

BASE = (100.0, 104.0, 98.0, 101.0, 99.5)
HEAD = (95.0, 97.0, 96.0, 94.0, 95.5)


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize("limit", [0.02, 0.05, 0.2])
def test_agrees_with_scipy(better: Better, limit: float) -> None:
    """The p-values are those of scipy's t test of log ratios against the limit, the interval is scipy's."""
    logs = [math.log(after / before) for before, after in zip(BASE, HEAD, strict=True)]
    edge = math.log(1 - limit) if better == "higher" else math.log(1 + limit)
    worse = "less" if better == "higher" else "greater"
    test = paired_test(BASE, HEAD, better, limit, 0.05)
    found = stats.ttest_1samp(logs, edge, alternative=worse)
    interval = stats.ttest_1samp(logs, edge).confidence_interval(0.90)
    assert test.p_regressed == pytest.approx(float(found.pvalue), rel=1e-9)
    assert test.p_ok == pytest.approx(1 - float(found.pvalue), rel=1e-9)
    assert test.ratio == pytest.approx(math.exp(sum(logs) / 5))
    assert (test.low, test.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))


def test_directions() -> None:
    """The same numbers are a regression where higher is better, and an improvement where lower is."""
    assert paired_test(BASE, HEAD, "higher", 0.02, 0.05).p_regressed < 0.05
    assert paired_test(BASE, HEAD, "lower", 0.02, 0.05).p_ok < 0.001
    assert paired_test(HEAD, BASE, "lower", 0.02, 0.05).p_regressed < 0.05


def test_one_pair_proves_nothing() -> None:
    """One pair has a ratio and no interval, whatever the difference."""
    test = paired_test([100.0], [10.0], "higher", 0.02, 0.05)
    assert (test.low, test.high, test.p_regressed, test.p_ok) == (None, None, 1.0, 1.0)
    assert test.ratio == pytest.approx(0.1)


def test_without_noise() -> None:
    """Pairs that all differ by the same are beyond doubt."""
    worse = paired_test([1.0, 2.0], [2.0, 4.0], "lower", 0.02, 0.05)
    assert (worse.p_regressed, worse.p_ok, worse.low, worse.high) == (0.0, 1.0, 2.0, 2.0)
    assert paired_test([1.0, 2.0], [1.0, 2.0], "lower", 0.02, 0.05).p_ok == 0.0


def test_a_drift_cancels_in_abba() -> None:
    """Runs that each are 1 % slower than the one before show no change in pairs A B, B A; in pairs A B they do."""
    slower = [100 * 0.99**run for run in range(12)]
    in_turns = paired_test(slower[0::4] + slower[3::4], slower[1::4] + slower[2::4], "higher", 0.02, 0.05)
    one_way = paired_test(slower[0::2], slower[1::2], "higher", 0.005, 0.05)
    assert in_turns.ratio == pytest.approx(1)
    assert one_way.p_regressed < 0.001


def test_holm() -> None:
    """The example that Holm's method is taught with, and its order kept."""
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_by_its_definition(p_values: list[float]) -> None:
    """Each is its own p-value raised by the rest's, never below one that is smaller, and never above Bonferroni's."""
    adjusted = holm(p_values)
    for p, raised in zip(p_values, adjusted, strict=True):
        assert p <= raised <= min(1, len(p_values) * p)
        expected = max(sum(other >= smaller for other in p_values) * smaller for smaller in p_values if smaller <= p)
        assert raised == pytest.approx(min(1, expected))


def test_holm_guards_the_family() -> None:
    """Of families of 4 null hypotheses no more than 5 % have one that is rejected; unadjusted, many more have."""
    rng = random.Random(1)  # noqa: S311  a simulation
    families = [[rng.random() for _ in range(4)] for _ in range(4000)]
    assert sum(min(holm(family)) <= 0.05 for family in families) / 4000 < 0.06
    assert sum(min(family) <= 0.05 for family in families) / 4000 > 0.15


@pytest.mark.parametrize(
    ("pairs", "max_pairs", "expected"),
    [(5, 12, (5, 8, 12)), (5, 5, (5,)), (2, 5, (2, 3, 5)), (8, 30, (8, 12, 18, 27, 30))],
)
def test_looks(pairs: int, max_pairs: int, expected: tuple[int, ...]) -> None:
    """Each look waits for half as many pairs again."""
    assert looks(pairs, max_pairs) == expected


@pytest.mark.parametrize("number", range(1, 9))
def test_looks_share_alpha(number: int) -> None:
    """What the looks spend is alpha, and half of it is spent at the first of several."""
    shares = spend(number)
    assert len(shares) == number
    assert sum(shares) == pytest.approx(ALPHA)
    assert shares[0] == (ALPHA if number == 1 else ALPHA / 2)
