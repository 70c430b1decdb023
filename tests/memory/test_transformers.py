"""What transformers takes, against the tensors that its own attention holds."""

from functools import cache
from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.layout import Role
from ossquant.memory import MemoryEstimate, Workload, estimate, parse_engine
from ossquant.plan import Plan, make_plan
from ossquant.runtime.fixed_cache import CACHE
from ossquant.spec import ModelSpec
from ossquant.units import GIB, MIB

FULL = 131072


@cache
def plan_of(size: str, name: str = "mxfp4") -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS[name])


def needed(size: str, device: str = "4090", name: str = "mxfp4", **asked: Any) -> MemoryEstimate:
    return estimate(plan_of(size, name), parse_engine("transformers"), Workload(**asked), find_device(device))


@pytest.mark.parametrize(("size", "layers", "gib"), [("20b", 12, 3.0), ("120b", 18, 4.5)])
def test_kv_cache_at_full_context(size: str, layers: int, gib: float) -> None:
    """Full layers take 3.00 GiB (20b) and 4.50 GiB (120b) for 131072 tokens; sliding ones keep 127 tokens."""
    assert needed(size, max_model_len=FULL).kv_cache.expected == int(gib * GIB) + layers * 127 * 2048


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (126, 126), (127, 127), (128, 127), (129, 127)])
def test_sliding_layers(tokens: int, kept: int) -> None:
    """Sliding layers keep all tokens up to the window less one, and no more."""
    assert needed("20b", max_model_len=tokens).kv_cache.expected == 12 * 2048 * (tokens + kept)


def test_sequences_and_dtypes() -> None:
    """Each sequence has a cache of its own, in 16 bits; no other size is known to transformers."""
    one = needed("20b").kv_cache.expected
    assert needed("20b", max_num_seqs=5, kv_cache_dtype="fp16").kv_cache.expected == 5 * one
    with pytest.raises(UsageError, match="kv_cache_dtype cannot be 'fp8' here"):
        needed("20b", kv_cache_dtype="fp8")


@pytest.mark.parametrize(
    ("tokens", "context", "mib"),
    [(512, 8192, 1702.6), (512, 32768, 6766.6), (8192, 8192, 25195), (2048, 2048, 1642.8), (1, 32768, 588.3)],
)
def test_measured_attention(tokens: int, context: int, mib: float) -> None:
    """Tensors alive at once in transformers 5.23's eager attention, counted on meta tensors, come out within 5 %."""
    term = needed("20b", max_model_len=context, max_num_batched_tokens=tokens).compute
    assert term.expected / MIB == pytest.approx(mib, rel=0.05)
    assert term.low / MIB <= mib <= term.high / MIB


def test_chunks_of_512() -> None:
    """A prompt is computed 512 tokens at once if nothing else is said, and never more than there are."""
    assert needed("20b").compute == needed("20b", max_num_batched_tokens=512).compute
    short = needed("20b", max_model_len=100, max_num_batched_tokens=100).compute
    assert needed("20b", max_model_len=100).compute == short


def test_batch_multiplies() -> None:
    """Every sequence of a batch has scores of its own."""
    one, four = (needed("20b", max_num_seqs=count).compute for count in (1, 4))
    assert four.expected == pytest.approx(4 * one.expected, abs=4)


def test_decoding_gathers_bf16_experts() -> None:
    """In bf16 the weights of a token's four experts are gathered, 190 MiB a sequence."""
    extra = needed("20b", name="bf16").compute.expected - needed("20b").compute.expected
    assert extra / MIB == pytest.approx(190, rel=0.005)


@pytest.mark.parametrize("name", ["mxfp4", "hybrid", "nf4", "bf16"])
def test_weights(name: str) -> None:
    """Weights are the plan's bytes, all of them on the device."""
    found = needed("20b", "4090", name)
    assert found.weights.low == found.weights.expected == found.weights.high == plan_of("20b", name).nbytes
    assert found.host_weights == 0


def test_hopper_stores_mxfp4_wider() -> None:
    """On Hopper the kernels may store MXFP4 values for 3072 columns of 2880: up to 6.7 % of the experts more."""
    found, plan = needed("120b", "h100-sxm").weights, plan_of("120b")
    assert found.low == plan.nbytes
    assert found.high == pytest.approx(plan.nbytes + (3072 / 2880 - 1) * plan.role_nbytes[Role.EXPERTS], rel=1e-6)
    assert needed("120b", "h100-sxm", "nf4").weights.high == plan_of("120b", "nf4").nbytes


def test_expert_by_expert() -> None:
    """Experts in NF4 are expanded one at a time, which takes an expert's bf16 bytes beside the weights."""
    extra = needed("20b", name="nf4").overhead.low - needed("20b").overhead.low
    assert extra == 2 * 3 * 2880 * 2880


def test_buffers_for_experts_on_the_host() -> None:
    """Experts in MXFP4 on the host are copied through two buffers of one expert each; NF4's are never copied."""
    for name, nbytes in (("hybrid", 2 * (3 * 2880 * 2880 * 17 // 32 + 2 * 3 * 2880)), ("nf4", 0)):
        extra = needed("20b", name=name, n_cpu_moe=3).overhead.low - needed("20b", name=name).overhead.low
        assert extra == nbytes


HEADS, GROUPS, HEAD_DIM, HIDDEN = 64, 8, 64, 2880  # of both published models


@pytest.mark.parametrize(("tokens", "past"), [(1024, 0), (256, 3840), (512, 7680)])
def test_counted_attention(tokens: int, past: int) -> None:
    """Bytes alive at once in transformers' own eager attention, counted here, lie between the bounds."""
    counted = peak_of_attention(tokens, past)
    term = needed("20b", max_model_len=tokens + past, max_num_batched_tokens=tokens).compute
    assert term.low <= counted <= term.high
    assert term.expected == pytest.approx(counted, rel=0.1)


def peak_of_attention(tokens: int, past: int) -> int:
    """Count what one full layer's attention holds at most beside its weights, tokens new ones after past ones."""
    import torch
    from transformers import DynamicCache, GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

    config = GptOssConfig(num_hidden_layers=2, attn_implementation="eager")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size) == (
        HEADS, GROUPS, HEAD_DIM, HIDDEN)  # fmt: skip
    context = tokens + past

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    with torch.device("meta"):
        attention = GptOssAttention(config, layer_idx=1).to(torch.bfloat16)
    held = DynamicCache(config=config)
    if past:
        held.update(empty(1, GROUPS, past, HEAD_DIM), empty(1, GROUPS, past, HEAD_DIM), 1)
    hidden, mask = empty(1, tokens, HIDDEN), empty(1, 1, tokens, context)
    angles = (empty(1, tokens, HEAD_DIM // 2), empty(1, tokens, HEAD_DIM // 2))
    with torch.no_grad(), live_bytes() as sizes:
        attention(hidden, position_embeddings=angles, attention_mask=mask, **{CACHE: held})
    inputs = sum(tensor.nbytes for tensor in (hidden, mask, *angles))
    return max(sizes) + inputs


def live_bytes() -> Any:
    """A mode under which every operation notes how many bytes are alive that were made under it."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __enter__(self) -> list[int]:
            self.alive: dict[int, tuple[Any, int]] = {}
            self.sizes: list[int] = []
            super().__enter__()
            return self.sizes

        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = operation(*args, **(kwargs or {}))
            before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
            for tensor in tree_leaves(made):
                storage = tensor.untyped_storage() if torch.is_tensor(tensor) else None
                if storage is not None and storage._cdata not in before:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.sizes.append(sum(nbytes for _, nbytes in self.alive.values()))
            return made

    return Live()
