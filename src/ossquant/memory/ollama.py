"""Ollama: llama.cpp's weights, an older cache of its own before 0.30, whole layers to the host."""

from dataclasses import replace

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory import llama_cpp
from ossquant.memory.terms import MemoryEstimate, Term, Workload, band, exact, kv_bytes_per_token_layer
from ossquant.plan import Plan
from ossquant.units import MIB

KV_DTYPES = ("auto", "f16", "q8_0", "q4_0")
LLAMA_SERVER_VERSION = (0, 30)  # from here on Ollama runs llama-server
_PINNED_BUILDS = (((0, 31), 9840), ((0, 30, 6), 9509), ((0, 30), 9452))  # by Ollama's tags, 2026-11-22
_OWN_BATCH = 512
_OWN_WINDOW_CELLS = 4096  # its own engine keeps so much beside the batch for a sliding layer


def estimate(
    plan: Plan, workload: Workload, device: Device, count: int, version: tuple[int, ...] | None
) -> MemoryEstimate:
    """Bytes for the GGUF that Ollama ships; version is Ollama's, None for the newest."""
    kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES)  # llama-server would take more types
    if version is None or version >= LLAMA_SERVER_VERSION:
        build = next((build for since, build in _PINNED_BUILDS if version and version >= since), None)
        small, usual, large = (
            llama_cpp.estimate(plan, replace(workload, ubatch=ubatch), device, count, build)
            for ubatch in _ubatches(workload)
        )
        whole = replace(
            usual,
            kv_cache=_between(small.kv_cache, usual.kv_cache, large.kv_cache),
            compute=_between(small.compute, usual.compute, large.compute),
        )
    else:
        whole = llama_cpp.estimate(plan, replace(workload, ubatch=_OWN_BATCH), device, count, build=None)
        whole = replace(whole, kv_cache=_own_cache(plan, workload), compute=_own_graph(workload).times(count))
    return _layers_to_host(whole, workload.n_cpu_layers / plan.spec.num_hidden_layers, plan)


def _layers_to_host(whole: MemoryEstimate, share: float, plan: Plan) -> MemoryEstimate:
    """A layer that runs on the host takes its weights and its cache along; the output layer stays."""
    layers = plan.nbytes - plan.role_nbytes[Role.EMBEDDING] - plan.role_nbytes[Role.LM_HEAD]
    moved = int(share * layers)
    return replace(
        whole,
        weights=whole.weights.less(moved),
        kv_cache=whole.kv_cache.scaled(1 - share),
        host_weights=whole.host_weights + moved,
        host_overhead=whole.host_overhead + int(share * whole.kv_cache.expected),
    )


def _between(small: Term, usual: Term, large: Term) -> Term:
    return usual if small == large else band(small.low, usual.expected, large.high, "measured")


def _ubatches(workload: Workload) -> tuple[int, int, int]:
    """The batch that Ollama may choose: least, usual and most.

    Long contexts get larger ones, less where memory is short. Source: server/sched.go of 0.30 to 0.33, 2026-11-22.
    """
    if workload.ubatch:
        return workload.ubatch, workload.ubatch, workload.ubatch
    tokens, least = workload.max_model_len * workload.sequences, llama_cpp.DEFAULT_UBATCH
    if tokens <= 4096:
        return least, least, least
    return least, 1024, 2048 if tokens > 32768 else 1024


def _own_cache(plan: Plan, workload: Workload) -> Term:
    full = workload.max_model_len * workload.sequences
    window = min(full, _OWN_WINDOW_CELLS * workload.sequences + _OWN_BATCH)
    layers = plan.spec.layer_types
    tokens = layers.count("full_attention") * full + layers.count("sliding_attention") * window
    return exact(tokens * kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES))


def _own_graph(workload: Workload) -> Term:
    # fs/ggml/ggml.go of 0.13; 121.8 MiB at 8K, and up to 16 % more, in logs of 0.11.10 and 0.12.6
    sequences = workload.sequences
    expected = (110 + 4 * sequences + workload.max_model_len * sequences / 1024) * MIB
    return band(expected, expected, 2 * expected, "measured")
