"""METRICS: what is measured, in which unit, which direction is better, and what each name means here."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class MetricKind:
    """One metric: its unit, the better direction, and its definition in a few words."""

    unit: str
    better: Better
    definition: str


METRICS = {
    "ttft": MetricKind("s", "lower", "send to the first non-empty delta in any channel"),
    "ttfa": MetricKind("s", "lower", "send to the first delta of the final channel"),
    "tpot": MetricKind(
        "s", "lower", "(t_last - t_first) / (N - n_first) of a request; N by the server's usage, n_first 1 if not told"
    ),
    "icl": MetricKind("s", "lower", "gap between chunks as they arrive; a chunk may hold several tokens"),
    "e2e": MetricKind("s", "lower", "send to the last delta"),
    "queue_delay": MetricKind("s", "lower", "open loop: intended send to actual send; part of the latencies"),
    "output_tokens_per_second": MetricKind("tokens/s", "higher", "output tokens of all requests by the wall time"),
    "input_tokens_per_second": MetricKind("tokens/s", "higher", "prompt tokens of all requests by the wall time"),
    "total_tokens_per_second": MetricKind("tokens/s", "higher", "both together"),
    "tokens_per_second_per_user": MetricKind("tokens/s", "higher", "1 / TPOT of a request"),
    "requests_per_second": MetricKind("1/s", "higher", "completed requests by the wall time"),
    "goodput": MetricKind("1/s", "higher", "completed requests that meet the SLO by the wall time"),
    "peak_device_bytes": MetricKind("B", "lower", "most device memory in use"),
    "peak_host_bytes": MetricKind("B", "lower", "most host memory that the process held"),
    "power_watts": MetricKind("W", "lower", "mean power of the devices by NVML"),
    "joules_per_token": MetricKind("J/token", "lower", "energy of the devices by output tokens"),
    "usd_per_million_tokens": MetricKind("USD/Mtoken", "lower", "rent of the devices by output tokens"),
    "roofline_share": MetricKind("share", "higher", "decode rate by bandwidth / bytes read a token, single stream"),
}

# of `ossquant eval`; P is the reference's distribution, Q the candidate's
QUALITY = {
    "kld_mean": MetricKind("nat", "lower", "mean over tokens of sum P ln(P / Q) over the vocabulary"),
    "kld_median": MetricKind("nat", "lower", "its median"),
    "kld_p99": MetricKind("nat", "lower", "its 99th percentile"),
    "kld_p99_9": MetricKind("nat", "lower", "its 99.9th percentile"),
    "kld_max": MetricKind("nat", "lower", "its maximum"),
    "ppl": MetricKind("1", "lower", "exp of the mean of -ln Q(token)"),
    "ppl_reference": MetricKind("1", "lower", "exp of the mean of -ln P(token)"),
    "ppl_ratio": MetricKind("1", "lower", "ppl / ppl_reference"),
    "ln_ppl_ratio": MetricKind("nat", "lower", "its logarithm"),
    "same_top": MetricKind("%", "higher", "tokens at which both hold the same token likeliest"),
    "delta_p_mean": MetricKind("%", "higher", "mean of Q(token) - P(token)"),
    "delta_p_rms": MetricKind("%", "lower", "root of the mean of its square"),
    "length_ratio": MetricKind(
        "1", "lower", "mean length of own answers / that of the reference's to the same prompts"
    ),
    "decode_tokens_per_second": MetricKind(
        "tokens/s", "higher", "of one stream, tokens after the first, median of the runs"
    ),
}
