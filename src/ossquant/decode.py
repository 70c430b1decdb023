"""DecodeRate: tokens a second to expect when a model writes.

A step reads the dense weights once, the experts that its tokens choose, and every sequence's cache. Bandwidth
bounds it, with many sequences arithmetic; each layer adds a fixed cost. The constants were fitted to published
llama.cpp rates (tests/data/decode_points.toml); everything else is judged from them and has wide bounds.
"""

from dataclasses import dataclass

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory.terms import Workload, kv_element_bytes
from ossquant.plan import Plan

_DENSE = (Role.ATTENTION, Role.LM_HEAD, Role.ROUTER, Role.NORM, Role.BIAS)
_EXPERTS = (Role.EXPERTS, Role.EXPERT_BIAS)

# effective bandwidth of host memory for offloaded experts, bytes a second: an untuned DDR4 machine measured 16 GB/s,
# dual-channel DDR5-6000 53, 14900K 56; published runs, 2026-11-22
HOST_BANDWIDTH = (16e9, 65e9)
# share of the bf16 rate that many sequences at once reach: 7817 tokens a second of 1000 on an H100 and 4620 on an A100,
# prompts included, are 5 % or so; gpustack's runs of vLLM 0.11, 2026-11-22
ARITHMETIC_SHARE = (0.04, 0.35)


@dataclass(frozen=True)
class DecodeRate:
    """Tokens a second over all sequences: low with full contexts, high with empty ones."""

    low: float
    high: float


@dataclass(frozen=True)
class _Cost:
    """A share of the bandwidth that is reached, seconds a layer, and how far measured rates lie around that."""

    bandwidth_share: float
    seconds_per_layer: float
    slowest: float = 0.68
    fastest: float = 1.27


_DISCRETE_NVIDIA = _Cost(0.92, 48e-6)
_DATA_CENTRE = _Cost(0.85, 80e-6, slowest=0.6, fastest=1.4)  # lower clocks; judged, no published point
_SHARED_MEMORY = _Cost(0.85, 54e-6)  # GB10, Strix Halo
_RDNA = _Cost(1.00, 106e-6)
_APPLE = _Cost(0.74, 156e-6)
_SMALL_INTEGRATED = _Cost(0.45, 300e-6, slowest=0.5, fastest=1.6)  # one point: Radeon 860M
_UNKNOWN = _Cost(0.7, 80e-6, slowest=0.5, fastest=1.4)
# launches and the scheduler cost vLLM more a layer than llama.cpp; transformers runs Python between kernels, and
# 4-bit experts of bitsandbytes one after the other. Judged, not measured.
_EXTRA_SECONDS_PER_LAYER = {"vllm": 60e-6, "ollama": 10e-6, "transformers": 1.2e-3}
_EXTRA_SECONDS_PER_BNB_LAYER = 3e-3
_UNRATED = ("mlx",)  # no published rate to hold a judgement against


def decode_rate(plan: Plan, engine: str, workload: Workload, device: Device, tensor_parallel: int) -> DecodeRate | None:
    """Expect tokens a second of an engine; None if the device's bandwidth is not known, or no rate of the engine is.

    Devices that share a model by layers work one after the other; tensor_parallel ones side by side.
    """
    if device.bandwidth_gbps is None or engine in _UNRATED:
        return None
    cost, extra = _cost(device), _extra_seconds(plan, engine)
    slow = _Edge(workload.max_model_len, 1.0, HOST_BANDWIDTH[0], ARITHMETIC_SHARE[0], cost.slowest, 2 * extra)
    fast = _Edge(0, 0.5, HOST_BANDWIDTH[1], ARITHMETIC_SHARE[1], cost.fastest, extra / 2)
    low, high = (
        workload.sequences / _step_seconds(plan, workload, device, tensor_parallel, cost, edge) for edge in (slow, fast)
    )
    return DecodeRate(low, high)


def bytes_per_token(plan: Plan) -> float:
    """Bytes of weights that one sequence reads for each token; its cache comes on top."""
    return sum(plan.role_nbytes[role] for role in _DENSE) + _expert_bytes(plan, 1.0)


def _expert_bytes(plan: Plan, draws: float) -> float:
    """Bytes of the experts that so many independent tokens choose."""
    spec = plan.spec
    chosen = 1 - (1 - spec.num_experts_per_tok / spec.num_local_experts) ** draws
    return float(chosen * sum(plan.role_nbytes[role] for role in _EXPERTS))


@dataclass(frozen=True)
class _Edge:
    """One end of the range: tokens in each context, how far sequences choose experts of their own, host bytes and
    the share of the device's arithmetic a second, speed beside the fitted one, seconds a step on top.
    """

    depth: int
    independence: float
    host_bandwidth: float
    arithmetic_share: float
    speed: float
    extra: float


def _step_seconds(
    plan: Plan, workload: Workload, device: Device, tensor_parallel: int, cost: _Cost, edge: _Edge
) -> float:
    """Seconds of one step of all sequences."""
    spec = plan.spec
    experts = _expert_bytes(plan, max(1.0, workload.sequences * edge.independence))
    dense = sum(plan.role_nbytes[role] for role in _DENSE) + _cache_bytes(plan, workload, edge.depth)
    layers_on_host = workload.n_cpu_layers / spec.num_hidden_layers
    experts_on_host = max(layers_on_host, workload.n_cpu_moe / spec.num_hidden_layers)
    on_host = dense * layers_on_host + experts * experts_on_host
    bandwidth = cost.bandwidth_share * (device.bandwidth_gbps or 0) * 1e9 * tensor_parallel
    reading = (dense + experts - on_host) / bandwidth + spec.num_hidden_layers * cost.seconds_per_layer
    computing = 0.0
    if device.bf16_tflops:
        rate = edge.arithmetic_share * device.bf16_tflops * 1e12 * tensor_parallel
        # of the first sequence arithmetic hides behind reading
        computing = (workload.sequences - 1) * 2 * _active_parameters(plan) / rate
    return float(reading / edge.speed + computing + on_host / edge.host_bandwidth + edge.extra)


def _active_parameters(plan: Plan) -> float:
    """Parameters that one token is multiplied with."""
    share = plan.spec.num_experts_per_tok / plan.spec.num_local_experts
    parameters = plan.role_parameters
    return float(sum(parameters[role] for role in _DENSE) + share * parameters[Role.EXPERTS])


def _cache_bytes(plan: Plan, workload: Workload, depth: int) -> float:
    spec = plan.spec
    full = spec.layer_types.count("full_attention") * depth
    sliding = spec.layer_types.count("sliding_attention") * min(depth, spec.sliding_window)
    element = kv_element_bytes(workload.kv_cache_dtype)
    return workload.sequences * 2 * spec.num_key_value_heads * spec.head_dim * element * (full + sliding)


def _extra_seconds(plan: Plan, engine: str) -> float:
    seconds = _EXTRA_SECONDS_PER_LAYER.get(engine, 0.0)
    if engine == "transformers" and any(plan.scheme(role).is_bnb for role in (Role.EXPERTS, Role.ATTENTION)):
        seconds += _EXTRA_SECONDS_PER_BNB_LAYER
    return seconds * plan.spec.num_hidden_layers


def _cost(device: Device) -> _Cost:
    if device.vendor == "apple":
        return _APPLE
    if device.unified_memory:
        return _SHARED_MEMORY if (device.bandwidth_gbps or 0) >= 200 else _SMALL_INTEGRATED
    if device.vendor == "nvidia":
        return _DATA_CENTRE if _has_hbm(device) else _DISCRETE_NVIDIA
    return _RDNA if device.arch.upper().find("RDNA") >= 0 else _UNKNOWN


def _has_hbm(device: Device) -> bool:
    return device.compute_capability in ((8, 0), (9, 0), (10, 0), (10, 3))
