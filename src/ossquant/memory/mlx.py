"""mlx-lm's server on Apple's GPUs: the published weights as they are, a cache that grows, prompts in chunks.

By the source of mlx-lm 0.32.2, and by running it on layers of the 20b's shape with MLX 0.32 on a CPU (2026-11-26).
Metal's fused attention makes no matrix of scores; no run on a Mac has been held against this.
"""

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory.llama_cpp import driver_context
from ossquant.memory.terms import MemoryEstimate, Term, Workload, band, exact, kv_bytes_per_token_layer
from ossquant.plan import Plan
from ossquant.units import GIB

KV_DTYPES = ("auto", "bf16")
PREFILL_STEP = 2048  # mlx_lm.server's --prefill-step-size
_CACHE_STEP = 256  # tokens by which KVCache grows
# Rows of four experts a token that are alive at once in a layer
_LAYER_COPIES = (6, 12, 16)
# gate_up_proj is split while it is loaded: three layers' were alive beside the weights, of four layers and of sixteen
_LAYERS_SPLIT = 3


def estimate(plan: Plan, workload: Workload, device: Device) -> MemoryEstimate:
    """Bytes for the line that `advice` writes: as many conversations kept as run at once."""
    running = kv_cache_bytes(plan, workload)
    return MemoryEstimate(
        weights=exact(plan.nbytes),
        # a finished conversation stays until the next is done: it may go on
        kv_cache=band(running, 2 * running, 2 * running, "measured"),
        compute=_compute(plan, workload),
        # buffers that MLX keeps to use again
        overhead=driver_context(device) + band(0, GIB // 4, GIB, "heuristic"),
        host_weights=0,
        host_overhead=GIB,  # Python and the tokenizer
    )


def kv_cache_bytes(plan: Plan, workload: Workload) -> int:
    """Bytes of keys and values: full layers in steps of 256 tokens, sliding ones a window and the chunk before it."""
    spec, tokens = plan.spec, workload.max_model_len
    full = -(-tokens // _CACHE_STEP) * _CACHE_STEP
    sliding = min(tokens, spec.sliding_window - 1 + _chunk(workload))
    held = spec.layer_types.count("full_attention") * full + spec.layer_types.count("sliding_attention") * sliding
    return int(workload.sequences * held * kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES))


def _chunk(workload: Workload) -> int:
    return min(workload.max_num_batched_tokens or PREFILL_STEP, workload.max_model_len)


def _compute(plan: Plan, workload: Workload) -> Term:
    """The larger of what a layer holds for a chunk of every prompt, and of what loading holds before any prompt."""
    spec = plan.spec
    rows = 2 * spec.num_experts_per_tok * spec.hidden_size * _chunk(workload) * workload.sequences
    loading = _LAYERS_SPLIT * plan.role_nbytes[Role.EXPERTS] // spec.num_hidden_layers * 2 // 3
    low, expected, high = (copies * rows for copies in _LAYER_COPIES)
    return band(max(low, loading), max(expected, loading), max(high, loading), "measured")
