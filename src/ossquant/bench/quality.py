"""Quality: how far a model's next-token probabilities lie from a reference's, by the logits of both.

The definitions are those of llama-perplexity --kl-divergence; logarithms are natural.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ossquant.bench.metrics import QUALITY

STEP_LOGITS = 2**23  # in float64 at a time: 64 MiB an intermediate result
RESAMPLES = 200
SEED = 0
PERCENTILES = {"kld_median": 50.0, "kld_p99": 99.0, "kld_p99_9": 99.9}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """A figure for every scored token; float64 (tokens,), same_top 0 or 1, delta_p as a share."""

    kld: Floats
    nll: Floats
    nll_reference: Floats
    delta_p: Floats
    same_top: Floats


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error by the texts as units; se_tokens takes tokens as independent, which they are not.

    None where it is not defined: for a maximum, for one text.
    """

    value: float
    se: float | None
    se_tokens: float | None


def score(reference: torch.Tensor, candidate: torch.Tensor, tokens: torch.Tensor) -> Scores:
    """Compare the logits (rows, vocab) of both at the tokens (rows,) that follow; in float64, some rows at a time."""
    rows = max(1, STEP_LOGITS // reference.shape[1])
    steps = zip(reference.split(rows), candidate.split(rows), tokens.split(rows), strict=True)
    return join([_score(*step) for step in steps])


def _score(reference: torch.Tensor, candidate: torch.Tensor, tokens: torch.Tensor) -> Scores:
    ln_p, ln_q = (logits.double().log_softmax(dim=-1) for logits in (reference, candidate))
    kld = (ln_p.exp() * (ln_p - ln_q)).sum(dim=-1).clamp(min=0)  # rounding may leave -1e-17
    at = tokens.long().unsqueeze(-1)
    ln_p_token, ln_q_token = (ln.gather(-1, at).squeeze(-1) for ln in (ln_p, ln_q))
    # of the logits: a softmax may round two that differ to one value
    same = (reference.argmax(dim=-1) == candidate.argmax(dim=-1)).double()
    columns = (kld, -ln_q_token, -ln_p_token, ln_q_token.exp() - ln_p_token.exp(), same)
    return Scores(*(column.cpu().numpy() for column in columns))


def join(parts: list[Scores]) -> Scores:
    """Put scores one behind the other."""
    return Scores(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Scores)))


def summarize(scores: Scores, texts: npt.NDArray[np.int64]) -> dict[str, Estimate]:
    """Estimate QUALITY over all tokens; texts (tokens,) numbers the text that each stands in, from 0.

    The errors of means are sandwich estimates with a text as the unit, those of percentiles come from RESAMPLES
    seeded resamplings of the texts. A ratio's error follows from that of its logarithm, a mean of paired differences.
    """
    difference = scores.nll - scores.nll_reference
    ln_ratio, ln_ppl, ln_reference = (_mean(x, texts) for x in (difference, scores.nll, scores.nll_reference))
    square = _mean(scores.delta_p**2, texts)
    rms = float(np.sqrt(square.value))
    slope = 50 / rms if rms else 0.0  # of 100 times the root
    return {
        "kld_mean": _mean(scores.kld, texts),
        **_percentiles(scores.kld, texts),
        "kld_max": Estimate(float(scores.kld.max()), None, None),
        "ppl": _exp(ln_ppl),
        "ppl_reference": _exp(ln_reference),
        "ppl_ratio": _exp(ln_ratio),
        "ln_ppl_ratio": ln_ratio,
        "same_top": _scaled(_mean(scores.same_top, texts), 100),
        "delta_p_mean": _scaled(_mean(scores.delta_p, texts), 100),
        "delta_p_rms": Estimate(100 * rms, _times(square.se, slope), _times(square.se_tokens, slope)),
    }  # fmt: skip


def _mean(values: Floats, texts: npt.NDArray[np.int64]) -> Estimate:
    mean, count = float(values.mean()), len(values)
    deviations = values - mean
    by_text = np.bincount(texts, deviations)
    units = len(by_text)
    se = float(np.sqrt(units / (units - 1) * (by_text**2).sum()) / count) if units > 1 else None
    return Estimate(mean, se, float(np.sqrt((deviations**2).sum() / (count - 1) / count)))


def _percentiles(values: Floats, texts: npt.NDArray[np.int64]) -> Mapping[str, Estimate]:
    """Percentiles as numpy has them; resampled ones by weights, so that values are sorted once."""
    order = np.argsort(values)
    ordered, of_text = values[order], texts[order]
    units = int(texts.max()) + 1
    drawn = np.random.default_rng(SEED).integers(units, size=(RESAMPLES, units))
    found = [_weighted(ordered, np.bincount(draw, minlength=units)[of_text]) for draw in drawn]
    errors = np.std(found, axis=0, ddof=1) if units > 1 else [None] * len(PERCENTILES)
    return {
        name: Estimate(float(np.percentile(values, percent)), None if se is None else float(se), None)
        for (name, percent), se in zip(PERCENTILES.items(), errors, strict=True)
    }


def _weighted(ordered: Floats, weights: npt.NDArray[np.int64]) -> list[float]:
    """The percentiles of values that occur weights times."""
    upto = np.cumsum(weights)
    at = [np.searchsorted(upto, percent / 100 * upto[-1], side="left") for percent in PERCENTILES.values()]
    return [float(ordered[min(int(each), len(ordered) - 1)]) for each in at]


def _exp(ln: Estimate) -> Estimate:
    value = float(np.exp(ln.value))
    return Estimate(value, _times(ln.se, value), _times(ln.se_tokens, value))


def _scaled(estimate: Estimate, by: float) -> Estimate:
    return Estimate(by * estimate.value, _times(estimate.se, by), _times(estimate.se_tokens, by))


def _times(se: float | None, factor: float) -> float | None:
    return None if se is None else se * factor


def ratio(candidate: Floats, reference: Floats) -> Estimate:
    """The ratio of two means of paired values, by the delta method; its units are the pairs."""
    value, pairs = float(candidate.mean() / reference.mean()), len(candidate)
    residuals = candidate - value * reference
    se = float(np.sqrt((residuals**2).sum() / (pairs - 1) / pairs) / reference.mean()) if pairs > 1 else None
    return Estimate(value, se, None)


def metric(name: str, estimate: Estimate, count: int) -> dict[str, Any]:
    """An estimate of QUALITY as JSON has it."""
    kind = QUALITY[name]
    return {"value": estimate.value, "unit": kind.unit, "better": kind.better, "count": count, "se": estimate.se,
            "se_tokens": estimate.se_tokens}  # fmt: skip
