import math

import pytest
from scipy import stats

from ossquant.bench.student import t_cdf, t_quantile

DEGREES = (1, 2, 3, 4, 5, 7.5, 11, 19, 100, 1000, 1e5)


@pytest.mark.parametrize("df", DEGREES)
def test_distribution(df: float) -> None:
    """Every probability is scipy's to 1e-9 of itself, deep in the tails, too."""
    for exponent in range(-18, 13):
        for t in (-(10 ** (exponent / 3)), 10 ** (exponent / 3)):
            assert t_cdf(t, df) == pytest.approx(float(stats.t.cdf(t, df)), rel=1e-9, abs=1e-290)
    assert (t_cdf(0.0, df), t_cdf(-math.inf, df), t_cdf(math.inf, df)) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize("df", DEGREES)
@pytest.mark.parametrize("p", [1e-8, 0.001, 0.0125, 0.05, 0.3, 0.5, 0.7, 0.95, 0.975, 0.9999])
def test_quantile(p: float, df: float) -> None:
    """Every quantile is scipy's to 1e-8 of itself."""
    assert t_quantile(p, df) == pytest.approx(float(stats.t.ppf(p, df)), rel=1e-8, abs=1e-15)
