"""llama.cpp: weights split between device and host, a cache of cells, compute buffers.

The laws of the buffers are llama.cpp's own: its loader, graph builder and allocator were run on header-only
GGUF files of the published dimensions, builds of August 2025 and of autumn 2026, 1,800 settings (2026-11-22).
Published logs agree: 398.38, 456.98, 796 and 1672.08 MiB.
"""

from ossquant.hardware import Device
from ossquant.layout import Role
from ossquant.memory.terms import MemoryEstimate, Term, Workload, band, exact, kv_bytes_per_token_layer
from ossquant.plan import Plan
from ossquant.units import GIB, MIB

DEFAULT_UBATCH = 512
KV_DTYPES = ("auto", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
# From about these builds on the mask is f16 (pull request 23764, 2026-05-29) and llama-server keeps logits of one
# token a sequence (23861, by 2026-06-02). Ollama 0.30.0 pins b9452 and shows the first without the second.
F16_MASK_BUILD, FEW_LOGITS_BUILD = 9400, 9480
_PIPELINE_COPIES = 4  # ggml's scheduler, for several devices


def estimate(plan: Plan, workload: Workload, device: Device, count: int, build: int | None) -> MemoryEstimate:
    """Bytes for a GGUF plan split by layers over count devices; build is llama.cpp's number, None if not known."""
    device_weights, host_weights = split_weights(plan, workload.n_cpu_moe)
    if device.vendor == "apple":
        # mmap hands Metal the whole file, embedding and offloaded experts too
        device_weights, host_weights = device_weights + host_weights, 0
    return MemoryEstimate(
        weights=exact(device_weights),
        kv_cache=exact(kv_cache_bytes(plan, workload)),
        compute=compute_buffers(plan, workload, device, count, build),
        overhead=driver_context(device).times(count) + _kernel_copies(plan, workload) + _uneven_split(plan, count),
        host_weights=host_weights,
        host_overhead=_host_buffers(plan, workload),
    )


def split_weights(plan: Plan, n_cpu_moe: int) -> tuple[int, int]:
    """Bytes on the devices and on the host.

    The token embedding stays on the host, and so do the experts of the first n_cpu_moe layers, biases included.
    """
    experts = plan.role_nbytes[Role.EXPERTS] + plan.role_nbytes[Role.EXPERT_BIAS]
    host = plan.role_nbytes[Role.EMBEDDING] + experts // plan.spec.num_hidden_layers * n_cpu_moe
    return plan.nbytes - host, host


def kv_cache_bytes(plan: Plan, workload: Workload) -> int:
    """Bytes of the cache: full layers hold every token, sliding layers a window and a batch in steps of 256."""
    full, sliding = _cells(plan, workload)
    layers = plan.spec.layer_types
    tokens = layers.count("full_attention") * full + layers.count("sliding_attention") * sliding
    return int(_streams(workload) * tokens * kv_bytes_per_token_layer(plan, workload.kv_cache_dtype, KV_DTYPES))


def compute_buffers(plan: Plan, workload: Workload, device: Device, count: int, build: int | None) -> Term:
    """All devices' compute buffers, with flash attention.

    Without a build, what builds since August 2025 have taken: the older need more, and are expected.
    """
    buffers = _Buffers(plan, workload, device)
    if build is None:
        older, newer = buffers.f32_mask(count), buffers.f16_mask(count)
        return band(min(older.low, newer.low), older.expected, max(older.high, newer.high), "measured")
    if build < F16_MASK_BUILD:
        return buffers.f32_mask(count)
    return buffers.f16_mask(count, every_logit=build < FEW_LOGITS_BUILD)


class _Buffers:
    """Bytes of the tensors that a graph holds at once, for a batch of ubatch tokens."""

    def __init__(self, plan: Plan, workload: Workload, device: Device) -> None:
        spec, tokens = plan.spec, _ubatch(workload)
        full, sliding = _cells(plan, workload)
        self.mask = 2 * tokens * (full + sliding)  # f16, of both kinds of layers
        self.sliding_mask = 2 * tokens * sliding
        self.hidden = 4 * tokens * spec.hidden_size
        self.queries = 4 * tokens * spec.num_attention_heads * spec.head_dim
        self.logits = 4 * tokens * spec.vocab_size
        self.expert = 4 * tokens * spec.num_experts_per_tok * spec.intermediate_size
        # experts on the host are copied to the device one tensor at a time when a batch is computed
        experts = plan.role_nbytes[Role.EXPERTS] // spec.num_hidden_layers // 3
        self.copied = experts if workload.n_cpu_moe else 0
        self.beside_attention = _metal_scratch(plan, tokens, full) if device.vendor == "apple" else 0

    def f32_mask(self, count: int) -> Term:
        """The mask is an f32 input and an f16 copy; logits of the whole batch."""
        logits = self.logits + self.hidden
        attention = 3 * self.mask + 2 * self.queries + max(2 * self.hidden, self.beside_attention)
        if self.copied:
            return self._f32_mask_offloaded(max(logits, attention)).times(count)
        if count == 1:
            return exact(max(logits, attention))
        copies = _PIPELINE_COPIES * (self.mask + self.hidden)
        first = copies + (_PIPELINE_COPIES + 1) * self.mask + 2 * self.queries + 2 * self.hidden + 3 * self.expert
        return exact(first + (count - 2) * (copies + self._layer()) + copies + logits)

    def _f32_mask_offloaded(self, least: int) -> Term:
        # whether a copied tensor finds a hole where masks were decides; the law holds for 9 of 10 settings within 5 %
        experts = self.copied + self.queries + 2 * self.hidden + 2 * self.expert
        reused = 2 * self.mask + self.sliding_mask + experts
        beside = min(3 * self.mask, self.copied) + self.copied + 2 * self.queries + 2 * self.hidden
        apart = 3 * self.mask + max(experts, self.copied + 2 * self.queries + 2 * self.hidden)
        expected = 3 * self.mask + experts if self.mask > self.copied else max(reused, beside)
        return band(least, max(least, expected), max(least, apart), "measured")

    def f16_mask(self, count: int, every_logit: bool = False) -> Term:
        """The mask is f16; logits of one token a sequence, or of the whole batch."""
        logits = self.logits + self.hidden if every_logit else 0
        if self.copied:
            moe = 3 if self.expert > self.copied / 4.4 else 2
            experts = self.mask + self.copied + self.queries + 2 * self.hidden + moe * self.expert
            # one layer's copies may find room elsewhere
            least = max(self.mask + self._layer(), logits)
            return band(least, max(experts, least), max(experts, least), "measured").times(count)
        if count == 1:
            return exact(max(self.mask + self._layer(), logits))
        copies = _PIPELINE_COPIES * (self.mask + self.hidden)
        last = max(self._layer(), logits)
        others = (count - 1) * (copies + self._layer())
        return exact(others + copies + (count - 1) * _PIPELINE_COPIES * self.hidden + last)

    def _layer(self) -> int:
        return 3 * self.expert + self.queries + 2 * self.hidden


def _metal_scratch(plan: Plan, tokens: int, context: int) -> int:
    """What Metal's flash attention asks for beside its result. Source: ggml-metal-ops.cpp, 2026-11-22."""
    spec = plan.spec
    results = 4 * min(tokens, 32) * spec.num_attention_heads * 32 * (spec.head_dim + 2)
    padding = 64 * (2 * 2 * spec.num_key_value_heads**2 * spec.head_dim + 2 * tokens)
    return results + padding + -(-context // 64) * -(-tokens // 8)


def _ubatch(workload: Workload) -> int:
    return min(workload.ubatch or DEFAULT_UBATCH, workload.max_model_len * _streams(workload))


def _streams(workload: Workload) -> int:
    return 1 if workload.kv_unified else workload.sequences


def _cells(plan: Plan, workload: Workload) -> tuple[int, int]:
    """Cells of a full and of a sliding layer, a stream."""
    full = _round_up(workload.max_model_len, 256)
    if workload.swa_full:
        return full, full
    sharing = workload.sequences if workload.kv_unified else 1
    return full, min(full, _round_up(plan.spec.sliding_window * sharing + _ubatch(workload), 256))


def _kernel_copies(plan: Plan, workload: Workload) -> Term:
    """What kernels take beside the buffers: pools of tens of MiB, and one layer's cache as f16 if it is quantized."""
    nbytes = 0
    if workload.kv_cache_dtype not in ("auto", "f16", "bf16"):
        per_token = kv_bytes_per_token_layer(plan, "f16", KV_DTYPES)
        nbytes = int(per_token * _cells(plan, workload)[0] * _streams(workload))
    pool = 64 * 2**10 * _ubatch(workload)
    return band(0, nbytes + pool, nbytes + 4 * pool, "heuristic")


def _uneven_split(plan: Plan, count: int) -> Term:
    """Layers do not divide evenly: what the fullest device has above its share, on every device, at worst."""
    layers = plan.spec.num_hidden_layers + 1  # the output counts as one
    fullest = -(-layers // count)
    return band(0, 0, (fullest * count - layers) * (plan.nbytes // layers), "heuristic")


def _host_buffers(plan: Plan, workload: Workload) -> int:
    # process and tokenizer, then the pinned masks and embeddings of a batch, then one token's logits a sequence
    pinned = 4 * _ubatch(workload) * (sum(_cells(plan, workload)) + plan.spec.hidden_size)
    return GIB // 2 + pinned + 4 * plan.spec.vocab_size * workload.sequences


def driver_context(device: Device) -> Term:
    """What the driver takes for a process on one device, its libraries' workspaces included."""
    if device.vendor == "apple":
        return band(0, 32 * MIB, 128 * MIB, "heuristic")
    # 0.25 to 0.4 GiB of CUDA and ROCm context in published totals; cuBLAS workspaces beside it; 2026-11-22
    return band(GIB // 4, 35 * GIB // 100, 6 * GIB // 10, "measured")


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
