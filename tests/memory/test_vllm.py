"""What vLLM takes, against its published loads and the rules of its source."""

from functools import cache
from math import ceil
from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.layout import Role
from ossquant.memory import MemoryEstimate, Workload, estimate, parse_engine, vllm
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec
from ossquant.units import GIB

FULL = 131072


@cache
def plan_of(size: str, name: str = "mxfp4") -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS[name])


def needed(
    size: str, version: str | None, device: str, count: int = 1, name: str = "mxfp4", **asked: Any
) -> MemoryEstimate:
    return estimate(plan_of(size, name), parse_engine("vllm", version), Workload(**asked), find_device(device), count)


@pytest.mark.parametrize(
    ("size", "version", "device", "gib", "tolerance"),
    [
        ("20b", "0.10.2", "3090", 13.7153, 0.005),  # Marlin
        ("20b", "0.19.0", "4090", 13.72, 0.005),
        ("120b", "0.10.1", "h100-sxm", 65.9651, 0.005),  # Marlin, 2025-08-20
        ("120b", "0.14.1", "h100-sxm", 64.38, 0.01),  # Triton
    ],
)
def test_published_loads(size: str, version: str, device: str, gib: float, tolerance: float) -> None:
    """`Model loading took` in vLLM's logs is the weights."""
    assert needed(size, version, device).weights.expected / GIB == pytest.approx(gib, rel=tolerance)


def experts_padded(size: str, hidden: int, shards: int) -> float:
    """Bytes of the MXFP4 experts when each of their three matrices is hidden by shards, 17 bytes for 32 weights."""
    spec = ModelSpec.published(size)
    return spec.num_hidden_layers * spec.num_local_experts * 3 * hidden * shards * 17 / 32


@pytest.mark.parametrize(
    ("version", "device", "count", "hidden", "shard"),
    [
        (None, "4090", 1, 3072, 2944),  # Marlin: 256 and 128
        (None, "4090", 2, 3072, 1536),
        (None, "4090", 4, 3072, 768),
        (None, "4090", 8, 3072, 384),
        ("0.10.2", "h100-sxm", 4, 3072, 768),
        (None, "b200", 1, 3072, 2944),  # TRT-LLM: 256 and 128 since 0.32
        (None, "b200", 8, 3072, 384),
        ("0.11.0", "b200", 1, 3072, 3072),  # 256 and 256 before
        ("0.11.0", "b200", 4, 3072, 768),
        ("0.11.0", "b200", 8, 3072, 512),
        (None, "mi300x", 1, 3072, 3072),  # Triton on ROCm: 256 and 256
        (None, "mi300x", 8, 3072, 512),
    ],
)
def test_padded_experts(version: str | None, device: str, count: int, hidden: int, shard: int) -> None:
    """Experts are rounded up to what the kernels ask of both sides of a GPU's share; nothing else grows."""
    padded, plain = (needed("120b", each, device, count).weights.expected for each in (version, "0.10.0"))
    grown = experts_padded("120b", hidden, shard * count) - experts_padded("120b", 2880, 2880)
    assert (padded - plain) / GIB == pytest.approx(grown / GIB, abs=0.04)  # biases are padded, too, or not


def test_narrow_padding_at_eight() -> None:
    """At eight GPUs the old padding of TRT-LLM costs a third more than the new one."""
    old, new = (needed("120b", version, "b200", 8).weights.expected for version in ("0.31", "0.32"))
    assert old - new == pytest.approx(experts_padded("120b", 3072, 8 * (512 - 384)), rel=0.02)


def test_first_image_did_not_pad() -> None:
    """The image of the release day loaded 12.8848 GiB on an RTX 3090: nothing was padded."""
    assert needed("20b", "0.10.0", "3090").weights.expected / GIB == pytest.approx(12.8848, rel=0.005)


def test_hopper_is_uncertain() -> None:
    """On an H100 the kernels depend on a package that may be missing, so the term spans both."""
    for version in ("0.10.2", "0.14.1", None):
        weights = needed("120b", version, "h100-sxm").weights
        assert weights.low / GIB == pytest.approx(64.38, rel=0.01)
        assert weights.high / GIB == pytest.approx(65.9651, rel=0.005)
        assert weights.basis == "measured"


@pytest.mark.parametrize(
    ("device", "version", "kernels"),
    [
        ("4090", None, "marlin"),
        ("a100-80g", None, "marlin"),
        ("5090", None, "marlin"),
        ("h100-sxm", "0.10.1", "marlin"),
        ("h100-sxm", "0.11.2", "marlin"),
        ("h100-sxm", "0.14.1", "triton"),
        ("h200", None, "triton"),
        ("b200", None, "trtllm"),
        ("mi300x", None, "triton"),
    ],
)
def test_kernels(device: str, version: str | None, kernels: str) -> None:
    """The kernels follow the device's capability and, on Hopper, the version."""
    assert vllm.backend(find_device(device), parse_engine("vllm", version).version) == kernels


def test_int4_pads_shares_alone() -> None:
    """Group-wise INT4 experts are padded where a share is no multiple of 64: not at one GPU, to 1472 at two."""
    experts = plan_of("120b", "int4").role_nbytes[Role.EXPERTS] + plan_of("120b", "int4").role_nbytes[Role.EXPERT_BIAS]
    one, two = (needed("120b", None, "a100-80g", count, "int4").weights.expected for count in (1, 2))
    assert one == pytest.approx(plan_of("120b", "int4").nbytes, rel=0.002)
    assert two - one == pytest.approx((1472 / 1440 - 1) * experts, rel=0.05)


def test_bf16_is_not_padded() -> None:
    """Weights in bf16 are split as they are; norms, routers and rotary tables lie on every GPU."""
    one, four = (needed("20b", None, "h200", count, "bf16").weights.expected for count in (1, 4))
    assert one == pytest.approx(plan_of("20b", "bf16").nbytes, rel=0.002)
    assert one <= four <= one + 4 * 0.1 * GIB


def pages_of(size: str, length: int, batched: int, batches: int) -> int:
    """Pages of 16 tokens and a layer that one sequence takes at most, by vLLM's KVCacheSpecs."""
    half = ModelSpec.published(size).num_hidden_layers // 2
    return half * (ceil(length / 16) + ceil(min(127 + batches * batched, length) / 16) + 1)


@pytest.mark.parametrize("size", ["20b", "120b"])
@pytest.mark.parametrize("length", [1, 16, 17, 2048, 8192, FULL])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(("version", "batches"), [("0.11.0", 1), (None, 2)])
def test_kv_pages(size: str, length: int, sequences: int, version: str | None, batches: int) -> None:
    """The cache is pages of 16 tokens: all of a sequence in full layers, a window and its batches in the others."""
    found = needed(size, version, "4090", max_model_len=length, max_num_seqs=sequences).kv_cache
    assert found.low == found.expected == found.high
    expected = sequences * pages_of(size, length, 2048, batches) * 16 * 2048
    assert found.expected == pytest.approx(expected, abs=0)


def test_published_pool() -> None:
    """What vLLM reports as 8.99 GiB for 130,960 tokens holds one request of 131072 of the 120b, not two."""
    one, two = (
        needed("120b", "0.11.0", "h100-sxm", max_model_len=FULL, max_num_seqs=count).kv_cache.expected
        for count in (1, 2)
    )
    assert one < 8.99 * GIB < two


@pytest.mark.parametrize(("dtype", "share"), [("auto", 1), ("bf16", 1), ("fp16", 1), ("fp8", 2), ("fp8_e4m3", 2),
                                              ("fp8_e5m2", 2)])  # fmt: skip
def test_kv_dtypes(dtype: str, share: int) -> None:
    """An 8-bit cache takes half."""
    plain = needed("20b", None, "4090").kv_cache.expected
    assert needed("20b", None, "4090", kv_cache_dtype=dtype).kv_cache.expected * share == plain


def test_foreign_kv_dtype() -> None:
    """A cache type of another engine is a usage error."""
    with pytest.raises(UsageError, match="kv_cache_dtype cannot be 'q8_0' here"):
        needed("20b", None, "4090", kv_cache_dtype="q8_0")


@pytest.mark.parametrize(("count", "copies"), [(1, 1), (2, 1), (8, 1), (16, 2), (32, 4)])
def test_kv_heads_are_split(count: int, copies: int) -> None:
    """Eight key-value heads are split over up to eight GPUs; beyond, each is kept more than once."""
    found = needed("120b", None, "h100-sxm", count).kv_cache.expected
    assert found == copies * needed("120b", None, "h100-sxm").kv_cache.expected


@pytest.mark.parametrize(
    ("device", "tokens", "sequences"),
    [("4090", 2048, 256), ("6000-ada", 2048, 256), ("a100-80g", 2048, 256), ("h100-sxm", 8192, 1024),
     ("h200", 8192, 1024), ("b200", 8192, 1024), ("mi300x", 8192, 1024)],
)  # fmt: skip
def test_defaults(device: str, tokens: int, sequences: int) -> None:
    """From 70 GiB on a server batches 8192 tokens and 1024 sequences, but on an A100; else 2048 and 256."""
    found = find_device(device)
    assert (vllm.batched_tokens(Workload(), found), vllm.sequences_profiled(Workload(), found)) == (tokens, sequences)
    asked = Workload(max_num_batched_tokens=1024, max_num_seqs=8)
    assert (vllm.batched_tokens(asked, found), vllm.sequences_profiled(asked, found)) == (1024, 8)


@pytest.mark.parametrize(("version", "share"), [((0, 10, 2), 0.9), ((0, 11), 0.9), ((0, 32), 0.92), (None, 0.92)])
def test_utilization(version: tuple[int, ...] | None, share: float) -> None:
    """vLLM takes 0.9 of the memory, since 0.32 0.92, or what is asked."""
    assert vllm.utilization(Workload(), version) == share
    assert vllm.utilization(Workload(gpu_memory_utilization=0.5), version) == 0.5


def test_sampler_of_the_profile_run() -> None:
    """The profile run samples max_num_seqs rows: 28 bytes a logit are 5.37 GiB for 1024, which the term contains."""
    many = needed("120b", "0.11.0", "h100-sxm").compute
    assert many.low <= 28 * 1024 * 201088 <= many.high
    assert 5.37 * GIB <= many.high <= 8 * GIB
    few = needed("120b", "0.11.0", "h100-sxm", max_num_seqs=128).compute
    assert few.high < many.expected / 2


@pytest.mark.parametrize(("version", "lean"), [("0.11.0", False), ("0.18.0", False), ("0.19.0", True), (None, True)])
def test_lean_sampler(version: str | None, lean: bool) -> None:
    """Since 0.19 the sampler copies its logits less often."""
    assert (needed("20b", version, "h100-sxm").compute.expected < 4 * GIB) == lean


def test_sampler_without_its_kernels() -> None:
    """Newer versions may take the old path, too: the high figure holds 28 bytes a logit."""
    for version in ("0.19.0", None):
        assert needed("20b", version, "h100-sxm").compute.high >= 28 * 1024 * 201088


def test_rows_of_the_sampler_are_bounded_by_the_batch() -> None:
    """No more rows are sampled than a batch has tokens."""
    asked = {"max_num_batched_tokens": 64}
    few = needed("20b", None, "h100-sxm", **asked, max_num_seqs=64).compute
    assert needed("20b", None, "h100-sxm", **asked).compute == few


def test_graphs_count_since_0_21() -> None:
    """CUDA graphs count within gpu_memory_utilization since 0.21."""
    before, since = (needed("20b", version, "4090").overhead for version in ("0.20", "0.21"))
    assert since.expected > before.expected
    assert since.high > before.high


def test_runtime_on_every_gpu() -> None:
    """Each GPU has a context and a profile run of its own."""
    one, four = (needed("120b", None, "h100-sxm", count) for count in (1, 4))
    assert four.overhead.expected == 4 * one.overhead.expected
    assert four.host_overhead > one.host_overhead


@pytest.mark.parametrize(
    ("version", "asked", "available"),
    [
        ("0.11.2", {"max_num_batched_tokens": 1024, "gpu_memory_utilization": 0.95}, 1.71),
        ("0.10.1", {}, -2.14),
        ("0.10.2", {}, 4.06),
    ],
)
def test_published_room_for_the_cache(version: str, asked: dict[str, Any], available: float) -> None:
    """What an H100's logs leave for the 120b's cache lies between the bounds."""
    device, workload = find_device("h100-sxm"), Workload(max_model_len=FULL, **asked)
    found = needed("120b", version, "h100-sxm", max_model_len=FULL, **asked)
    usable = device.usable_bytes * vllm.utilization(workload, parse_engine("vllm", version).version)
    taken = found.weights + found.compute + found.overhead
    assert (usable - taken.high) / GIB <= available <= (usable - taken.low) / GIB
