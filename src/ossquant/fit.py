"""FitVerdict: whether a plan fits a device, and up to which context."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from ossquant.hardware import Device
from ossquant.memory import MemoryEstimate, estimate, kv_cache_bytes
from ossquant.plan import Plan
from ossquant.units import GIB

# For what an estimate does not count: compute buffers of 415 MiB (llama.cpp at ubatch 512, or in transformers
# the fp32 logits of 541 prefilled tokens) and a driver context of up to 0.4 GiB. Published logs, 2026-11-22.
RESERVE = 8 * GIB // 10


@dataclass(frozen=True)
class FitVerdict:
    """The answer, and what it rests on.

    verdict: "fits"; "tight" where what is counted leaves less than RESERVE; "no" where it is too much.
    headroom is the usable bytes that remain, negative if bytes are lacking. longest_max_model_len is the
    longest context that fits, 0 if none does.
    """

    verdict: Literal["fits", "tight", "no"]
    estimate: MemoryEstimate
    device: Device
    headroom: int
    longest_max_model_len: int


def fit(plan: Plan, device: Device, max_model_len: int) -> FitVerdict:
    """Hold a plan with a context of max_model_len tokens against a device.

    Raises UsageError for a length the model does not have.
    """
    needed = estimate(plan, max_model_len)
    headroom = device.usable_bytes - needed.total
    return FitVerdict(_verdict(headroom), needed, device, headroom, longest_max_model_len(plan, device))


def longest_max_model_len(plan: Plan, device: Device) -> int:
    """The longest context of the model that leaves RESERVE on a device; 0 if none does."""
    free = device.usable_bytes - RESERVE - plan.nbytes
    lengths = range(1, plan.spec.max_position_embeddings + 1)
    return bisect_right(lengths, free, key=lambda length: kv_cache_bytes(plan.spec, length))


def _verdict(headroom: int) -> Literal["fits", "tight", "no"]:
    if headroom < 0:
        return "no"
    return "fits" if headroom >= RESERVE else "tight"
