"""transformers, as `ossquant run` uses it: eager attention, the prompt in chunks, layers spread over devices."""

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory.llama_cpp import driver_context
from ossquant.memory.terms import MemoryEstimate, Term, Workload, band, exact, kv_bytes_per_token_layer
from ossquant.plan import Plan
from ossquant.units import GIB

KV_DTYPES = ("auto", "bf16", "fp16")
PREFILL_CHUNK = 512  # tokens of a prompt that `ossquant run` computes at once
# Scores, the scores beside the sinks, and what their largest is taken off: three copies are alive at once, beside
# keys and values repeated for every query head. Counted over transformers 5.23's eager gpt-oss on meta tensors:
# 1703 MiB for 512 tokens into 8,192, 6767 into 32,768, 25195 for 8,192 at once; 2026-11-22
_SCORE_COPIES = 3
# triton_kernels stores Hopper's values for 3072 columns of 2880: a load of vLLM 0.14.1
_HOPPER_GROWTH = 3072 / 2880


def estimate(plan: Plan, workload: Workload, device: Device, count: int = 1) -> MemoryEstimate:
    """Bytes over count devices that hold whole layers; sequences run as one padded batch."""
    host_weights = layer_expert_bytes(plan) * workload.n_cpu_moe
    buffers = exact(streaming_bytes(plan) if workload.n_cpu_moe else 0)
    return MemoryEstimate(
        weights=_weights(plan, device).less(host_weights),
        kv_cache=exact(kv_cache_bytes(plan, workload)),
        compute=_activations(plan, workload).times(count),
        overhead=(driver_context(device) + _allocator(plan) + buffers).times(count) + _unfilled(plan, count),
        host_weights=host_weights,
        host_overhead=3 * GIB,  # Python with torch and CUDA libraries, and the shard that is being read
    )


def _unfilled(plan: Plan, count: int) -> Term:
    """What stays empty on devices that hold whole layers."""
    layer = (plan.role_nbytes[Role.ATTENTION] // plan.spec.num_hidden_layers) + layer_expert_bytes(plan)
    return band(0, (count - 1) * layer // 2, (count - 1) * layer, "heuristic")


def working_bytes(plan: Plan, workload: Workload) -> int:
    """Bytes to keep free on each device beside weights and cache."""
    return activation_bytes(plan, workload) + _allocator(plan).high


def activation_bytes(plan: Plan, workload: Workload) -> int:
    """The most bytes that a forward pass holds beside weights and cache."""
    return _activations(plan, workload).high


def layer_expert_bytes(plan: Plan) -> int:
    """Bytes of one layer's experts, biases included."""
    return (plan.role_nbytes[Role.EXPERTS] + plan.role_nbytes[Role.EXPERT_BIAS]) // plan.spec.num_hidden_layers


def streaming_bytes(plan: Plan) -> int:
    """Bytes of the buffers on a device through which experts on the host are copied: two experts, if in MXFP4."""
    if plan.scheme(Role.EXPERTS).format != "mxfp4":
        return 0
    return 2 * layer_expert_bytes(plan) // plan.spec.num_local_experts


def kv_cache_bytes(plan: Plan, workload: Workload) -> int:
    """Bytes of keys and values."""
    return sum(kv_cache_bytes_of_layer(plan, workload, layer) for layer in range(plan.spec.num_hidden_layers))


def kv_cache_bytes_of_layer(plan: Plan, workload: Workload, layer: int) -> int:
    """Bytes of one layer's keys and values; a sliding layer keeps the window less the token being computed."""
    spec, tokens = plan.spec, workload.max_model_len
    if spec.layer_types[layer] == "sliding_attention":
        tokens = min(tokens, spec.sliding_window - 1)
    return int(workload.sequences * tokens * kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES))


def _weights(plan: Plan, device: Device) -> Term:
    nbytes = plan.nbytes
    # where `ossquant run` puts them on transformers' kernels, it takes no more than is free beside the cache
    if plan.scheme(Role.EXPERTS).format == "mxfp4" and not plan.has_bnb and device.compute_capability == (9, 0):
        grown = nbytes + int((_HOPPER_GROWTH - 1) * plan.role_nbytes[Role.EXPERTS])
        return band(nbytes, nbytes, grown, "measured")
    return exact(nbytes)


def _activations(plan: Plan, workload: Workload) -> Term:
    """The largest of what a layer holds while a chunk attends to the whole context, and of the last logits."""
    spec = plan.spec
    context = workload.max_model_len
    tokens = min(workload.max_num_batched_tokens or PREFILL_CHUNK, context)
    heads = spec.num_attention_heads
    scores = 2 * heads * tokens * (context + 1)
    repeated = 2 * 2 * (heads + spec.num_key_value_heads) * spec.head_dim * context
    hidden = 2 * tokens * (6 * spec.hidden_size + 2 * heads * spec.head_dim)
    logits = 2 * 4 * spec.vocab_size
    if plan.scheme(Role.EXPERTS).format == "bf16":
        # decoding, generate gathers the chosen experts' weights of every sequence
        hidden += 2 * spec.num_experts_per_tok * 3 * spec.hidden_size * spec.intermediate_size
    once = workload.sequences * (repeated + hidden + logits)
    copies = workload.sequences * scores
    return band(2 * copies + once, _SCORE_COPIES * copies + once, (_SCORE_COPIES + 1) * copies + 2 * once, "measured")


def _allocator(plan: Plan) -> Term:
    """What torch's allocator holds beside what is asked of it, and experts expanded one at a time to bf16."""
    spec = plan.spec
    expanded = 2 * 3 * spec.hidden_size * spec.intermediate_size if plan.scheme(Role.ATTENTION).is_bnb else 0
    return band(expanded, 2 * expanded + 0.2 * GIB, 4 * expanded + 0.8 * GIB, "heuristic")
