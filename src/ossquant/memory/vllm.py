"""vLLM: weights padded for its kernels and split over the GPUs, a pool of cache pages, a profile run."""

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory.terms import MemoryEstimate, Term, Workload, band, exact, kv_bytes_per_token_layer
from ossquant.plan import Plan
from ossquant.units import GIB

KV_DTYPES = ("auto", "bf16", "fp16", "fp8", "fp8_e4m3", "fp8_e5m2")
PAGE_TOKENS = 16
Version = tuple[int, ...] | None  # None: the newest
# What changed when, by vLLM's source of 0.10.2, 0.11.0 and 0.32.0 and its logs; 2026-11-22
_PADDED = (0, 10, 1)  # the image of the release day did not pad
_TRITON_ON_HOPPER = (0, 12)  # 0.10.1 and 0.11.2 loaded Marlin's padding on an H100, 0.14.1 Triton's
_LEAN_SAMPLER = (0, 19)
_GRAPHS_INSIDE = (0, 21)  # CUDA graphs count within gpu_memory_utilization
_TWO_BATCHES = (0, 20)  # a request's sliding pages are counted for two batches; a log of April 2026 shows it
_NARROW_TRTLLM = (0, 32)  # TRT-LLM pads the intermediate size to 128, before to 256
# triton_kernels stores Hopper's values for 3072 columns of 2880, and pads the scales by 1.5 %; a load of 0.14.1
_TRITON_VALUES, _TRITON_SCALES = 3072 / 2880, 1.0148


def estimate(plan: Plan, workload: Workload, device: Device, count: int, version: Version) -> MemoryEstimate:
    """Bytes over count GPUs of one tensor-parallel group; version is vLLM's, None for the newest."""
    return MemoryEstimate(
        weights=_weights(plan, device, count, version),
        kv_cache=exact(kv_cache_bytes(plan, workload, device, count, version)),
        compute=_profile_run(plan, workload, device, count, version),
        overhead=_runtime(version).times(count),
        host_weights=0,
        host_overhead=(4 * count + 4) * GIB,  # a worker a GPU, the engine and the API server
    )


def kv_cache_bytes(plan: Plan, workload: Workload, device: Device, count: int, version: Version) -> int:
    """Bytes of pages for every sequence at its full length; the heads are split, and copied beyond one a GPU."""
    spec = plan.spec
    page = PAGE_TOKENS * kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES)
    batches = 2 if _since(_TWO_BATCHES, version) else 1
    in_flight = batches * batched_tokens(workload, device)
    full = _pages(workload.max_model_len)
    sliding = _pages(min(spec.sliding_window - 1 + in_flight, workload.max_model_len)) + 1
    layers = spec.layer_types
    pages = layers.count("full_attention") * full + layers.count("sliding_attention") * min(sliding, full + 1)
    copies = max(1, count // spec.num_key_value_heads)
    return int(workload.sequences * pages * page) * copies


def batched_tokens(workload: Workload, device: Device) -> int:
    """Tokens of a batch: vLLM takes more on GPUs of 70 GiB and up other than the A100. Source: its EngineArgs."""
    return workload.max_num_batched_tokens or (8192 if _large(device) else 2048)


def sequences_profiled(workload: Workload, device: Device) -> int:
    """Sequences of the profile run, from the same rule."""
    return workload.max_num_seqs or (1024 if _large(device) else 256)


def utilization(workload: Workload, version: Version) -> float:
    """The share of the GPU's memory that vLLM takes."""
    return workload.gpu_memory_utilization or (0.92 if _since(_NARROW_TRTLLM, version) else 0.9)


def _since(first: tuple[int, ...], version: Version) -> bool:
    return version is None or version >= first


def _large(device: Device) -> bool:
    return device.usable_bytes >= 70 * GIB and "A100" not in device.name


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def _profile_run(plan: Plan, workload: Workload, device: Device, count: int, version: Version) -> Term:
    """The larger of a batch's activations and of the sampler's copies of the logits."""
    spec = plan.spec
    tokens = batched_tokens(workload, device)
    # MoE inputs, both halves of gate_up and the output of four experts a token, bf16
    per_token = 2 * spec.num_experts_per_tok * (2 * spec.hidden_size + 3 * spec.intermediate_size // count)
    logits = min(sequences_profiled(workload, device), tokens) * spec.vocab_size
    # Bytes a logit. Until 0.18 28 by the source's torch path, sort's workspace on top (36 fits two logs of an H100),
    # 10 with FlashInfer; later 10 to 14 by its Triton kernels; 2026-11-22
    copies = (10, 14, 28) if _since(_LEAN_SAMPLER, version) else (10, 34, 40)
    batch = tokens * per_token
    low, expected, high = (max(batch, copies[0] * logits), max(1.5 * batch, copies[1] * logits),
                           max(3 * batch, copies[2] * logits))  # fmt: skip
    return band(low, expected, high, "heuristic").times(count)


def _runtime(version: Version) -> Term:
    """CUDA context, NCCL and workspaces, 0.5 to 0.8 GiB in logs of 0.11 and 0.19, and CUDA graphs; 2026-11-22."""
    if _since(_GRAPHS_INSIDE, version):
        return band(0.4 * GIB, 1.0 * GIB, 1.8 * GIB, "heuristic")
    return band(0.4 * GIB, 0.7 * GIB, 1.2 * GIB, "heuristic")


def backend(device: Device, version: Version) -> str:
    """The MXFP4 kernels that vLLM takes on a device: marlin, triton, trtllm or what the table knows."""
    if device.compute_capability == (9, 0):
        return "triton" if _since(_TRITON_ON_HOPPER, version) else "marlin"
    return str(device.mxfp4_kernels.get("vllm") or ("triton" if device.vendor == "amd" else "marlin"))


def _weights(plan: Plan, device: Device, count: int, version: Version) -> Term:
    spec, roles = plan.spec, plan.role_nbytes
    experts, biases = roles[Role.EXPERTS], roles[Role.EXPERT_BIAS]
    rope = spec.max_position_embeddings * spec.head_dim * 4 * count  # its table, fp32
    dense = _dense(plan, count) + rope
    shard = -(-spec.intermediate_size // count)
    split = shard * count / spec.intermediate_size
    if plan.scheme(Role.EXPERTS).format == "int4":
        # compressed-tensors' Marlin pads the intermediate size alone
        return exact(dense + (experts + biases) * split * _round_up(shard, 64) / shard)
    if plan.scheme(Role.EXPERTS).format != "mxfp4":
        return exact(dense + experts + biases)
    if not _since(_PADDED, version):
        return exact(dense + (experts + biases) * split)
    kernels = backend(device, version)
    marlin = experts * split * _padding(spec.hidden_size, shard, 256, 128)
    if device.compute_capability == (9, 0):
        # which of the two it is depends on the package triton_kernels, too
        swizzled = split * experts * (16 / 17 * _TRITON_VALUES + 1 / 17 * _TRITON_SCALES)
        expected = swizzled if kernels == "triton" else marlin
        rest = dense + biases
        return band(rest + min(swizzled, marlin), rest + expected, rest + max(swizzled, marlin), "measured")
    trtllm = (256, 128) if _since(_NARROW_TRTLLM, version) else (256, 256)
    triton = (256, 256) if device.vendor == "amd" else (1, 64)
    steps = {"triton": triton, "trtllm": trtllm}.get(kernels, (256, 128))
    return exact(dense + split * _padding(spec.hidden_size, shard, *steps) * (experts + biases))


def _padding(hidden: int, shard: int, hidden_step: int, shard_step: int) -> float:
    """How many times larger an expert matrix gets when both its sides are rounded up."""
    return _round_up(hidden, hidden_step) * _round_up(shard, shard_step) / (hidden * shard)


def _dense(plan: Plan, count: int) -> int:
    """What is not an expert, over all GPUs: attention and vocabulary are split, the rest is on each."""
    roles = plan.role_nbytes
    split = roles[Role.ATTENTION] + roles[Role.EMBEDDING] + roles[Role.LM_HEAD]
    return split + count * (roles[Role.NORM] + roles[Role.ROUTER] + roles[Role.BIAS])


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
