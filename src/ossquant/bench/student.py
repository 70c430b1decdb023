"""Student's t without scipy: its distribution by the regularized incomplete beta function."""

import math
from functools import lru_cache

STEPS = 500  # of the continued fraction; some 50 are taken
BISECTIONS = 200
TINY = 1e-300


def t_cdf(t: float, df: float) -> float:
    """The probability that Student's t with df degrees of freedom is at most t."""
    if math.isinf(t):
        return float(t > 0)
    tail = _beta_share(df / (df + t * t), t * t / (df + t * t), df / 2, 0.5) / 2
    return 1 - tail if t > 0 else tail


@lru_cache
def t_quantile(p: float, df: float) -> float:
    """The t that Student's t with df degrees of freedom stays below with probability p, 0 < p < 1."""
    if p > 0.5:
        return -t_quantile(1 - p, df)
    low, high = -1.0, 0.0
    while t_cdf(low, df) > p:
        low *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return high


def _beta_share(x: float, rest: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b); rest is 1 - x, exactly where x is near 1.

    Source: the continued fraction of NIST DLMF 8.17.22, which converges fast for x below (a + 1) / (a + b + 2).
    """
    if x <= 0 or rest <= 0:
        return float(rest <= 0)
    if x * (b + 1) > rest * (a + 1):
        return 1 - _beta_share(rest, x, b, a)
    front = a * math.log(x) + b * math.log(rest) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(front) / (a * _continued_fraction(x, a, b))


def _continued_fraction(x: float, a: float, b: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + …)) by modified Lentz."""
    value, c, d = 1.0, 1.0, 0.0
    for step in range(1, STEPS):
        m, odd = divmod(step, 2)
        if odd:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / (_away(1 + term * d))
        c = _away(1 + term / c)
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _away(value: float) -> float:
    return value if abs(value) > TINY else TINY
