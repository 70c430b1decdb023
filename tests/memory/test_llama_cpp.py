"""What llama.cpp takes, against its own loader and allocator and against published logs."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.memory import Workload, estimate, llama_cpp, parse_engine
from ossquant.memory.terms import Term
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec
from ossquant.units import GIB, MIB

FULL = 131072
OLDER, NEWER = 6000, 10488  # builds on either side of the change of buffers
MEASURED = json.loads((Path(__file__).parent.parent / "data/llama_cpp_buffers.json").read_text("utf-8"))
ROWS: list[dict[str, Any]] = [dict(zip(MEASURED["columns"], row, strict=True)) for row in MEASURED["rows"]]


@cache
def plan_of(size: str, name: str = "gguf-q8") -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS[name])


def workload_of(row: dict[str, Any]) -> Workload:
    names = ("max_model_len", "max_num_seqs", "kv_unified", "ubatch", "swa_full", "kv_cache_dtype", "n_cpu_moe")
    return Workload(**{name: row[name] for name in names})


def compute(size: str, build: int | None, workload: Workload, device: str = "4090", count: int = 1) -> Term:
    engine = parse_engine("llama.cpp", build and f"b{build}")
    return estimate(plan_of(size), engine, workload, find_device(device), count).compute


def compute_mib(size: str, build: int | None, count: int = 1, **asked: Any) -> float:
    return compute(size, build, Workload(**asked), count=count).expected / MIB


@pytest.mark.parametrize(
    ("size", "name", "n_cpu_moe", "device", "host"),
    [
        ("20b", "gguf-q8", 0, 10949.38, 586.82),  # published start-up logs
        ("120b", "gguf-q8", 0, 59851.68, 586.82),
        ("120b", "gguf-bf16", 0, 61223.74, 1104.61),
        ("20b", "gguf-q8", 24, 1242.03, 586.82 + 10949.38 - 1242.03),
        ("120b", "gguf-q8", 36, 1607.61, 586.82 + 59851.68 - 1607.61),  # asked of the loader, 2026-11-22
        ("120b", "gguf-q8", 10, 43672.77, 586.82 + 59851.68 - 43672.77),
        ("120b", "gguf-q8", 1, 58233.79, 586.82 + 59851.68 - 58233.79),
        ("20b", "gguf-bf16", 24, 2329.33, 1104.61 + 10949.38 - 1242.03 + 0.15),
    ],
)
def test_weights(size: str, name: str, n_cpu_moe: int, device: float, host: float) -> None:
    """Weights on the device and on the host are those of llama.cpp's logs, to 0.1 MiB of alignment."""
    split = llama_cpp.split_weights(plan_of(size, name), n_cpu_moe)
    assert [nbytes / MIB for nbytes in split] == pytest.approx([device, host], abs=0.2)
    assert sum(split) == plan_of(size, name).nbytes


@pytest.mark.parametrize(
    ("size", "asked", "mib"),
    [
        ("20b", {}, 3072 + 18),  # eight Ascend devices together, b6699, and an M5
        ("20b", {"ubatch": 2048}, 3126),  # M5, 2025
        ("20b", {"max_num_seqs": 4, "kv_unified": True}, 3096),  # M5, 2026
        ("120b", {"max_num_seqs": 2, "ubatch": 1024}, 9306),  # Radeon 8060S, Ollama 0.30.2
        ("20b", {"swa_full": True}, 6144),  # what ik_llama.cpp takes without a window
        ("120b", {"max_model_len": 4096, "swa_full": True}, 288),  # M4 Max, LM Studio
    ],
)
def test_published_kv_cache(size: str, asked: dict[str, Any], mib: float) -> None:
    """The cache is to the MiB what published logs of llama.cpp show."""
    workload = Workload(**{"max_model_len": FULL, **asked})
    assert llama_cpp.kv_cache_bytes(plan_of(size), workload) == mib * MIB


@pytest.mark.parametrize(
    ("dtype", "nbytes"),
    [("auto", 2048), ("f16", 2048), ("bf16", 2048), ("f32", 4096), ("q8_0", 1088), ("q5_1", 768), ("q5_0", 704),
     ("q4_1", 640), ("q4_0", 576), ("iq4_nl", 576)],
)  # fmt: skip
def test_kv_dtypes(dtype: str, nbytes: int) -> None:
    """A token takes 2048 bytes a layer in f16, 1088 in q8_0, and as ggml's blocks say in the others."""
    workload = Workload(max_model_len=FULL, kv_cache_dtype=dtype)
    assert llama_cpp.kv_cache_bytes(plan_of("20b"), workload) == nbytes * 12 * (FULL + 768)


@pytest.mark.parametrize(("length", "full", "sliding"), [(1, 256, 256), (256, 256, 256), (257, 512, 512),
                                                         (768, 768, 768), (769, 1024, 768)])  # fmt: skip
def test_cells_come_in_steps(length: int, full: int, sliding: int) -> None:
    """Cells are counted in steps of 256, and a sliding layer has no more of them than a full one."""
    workload = Workload(max_model_len=length, ubatch=None if length > 512 else 128)
    sliding = sliding if length > 512 else min(full, 256)
    assert llama_cpp.kv_cache_bytes(plan_of("20b"), workload) == 2048 * 12 * (full + sliding)


def test_foreign_kv_dtype() -> None:
    """A cache type of another engine is a usage error that names the nearest."""
    with pytest.raises(UsageError, match="kv_cache_dtype cannot be 'fp8' here"):
        llama_cpp.kv_cache_bytes(plan_of("20b"), Workload(kv_cache_dtype="fp8"))


def test_measured_kv_cache() -> None:
    """The cache is to the printed digit what llama.cpp allocates, in every measured setting."""
    for row in ROWS:
        found = llama_cpp.kv_cache_bytes(plan_of(row["model"]), workload_of(row)) / MIB
        assert found == pytest.approx(row["kv_cache_mib"], abs=0.01), row


def measured(build: str, offloaded: bool) -> list[tuple[dict[str, Any], Term]]:
    number = {"old": OLDER, "new": NEWER}[build]
    return [
        (row, compute(row["model"], number, workload_of(row)))
        for row in ROWS
        if row["build"] == build and (row["n_cpu_moe"] > 0) == offloaded
    ]


@pytest.mark.parametrize(("build", "rows"), [("old", 10), ("new", 54)])
def test_measured_compute_buffers(build: str, rows: int) -> None:
    """The compute buffer is within 0.5 % of every measured one, within 1.5 % for a batch of 4096."""
    found = measured(build, offloaded=False)
    assert len(found) == rows
    for row, term in found:
        tolerance = 0.015 if row["ubatch"] == 4096 else 0.005
        assert term.expected / MIB == pytest.approx(row["compute_mib"], rel=tolerance), row


def test_measured_compute_buffers_with_experts_on_host() -> None:
    """With several layers' experts on the host: newer builds within 0.5 %; older ones, and one layer, in bounds."""
    for row, term in measured("new", offloaded=True):
        if row["n_cpu_moe"] > 1:
            assert term.expected / MIB == pytest.approx(row["compute_mib"], rel=0.005), row
        assert row["compute_mib"] <= term.high / MIB + 0.1, row
    for row, term in measured("old", offloaded=True):
        assert term.low / MIB - 0.1 <= row["compute_mib"] <= term.high / MIB + 0.1, row
        if row["n_cpu_moe"] > 1:
            assert term.expected / MIB == pytest.approx(row["compute_mib"], rel=0.15), row


@pytest.mark.parametrize(
    ("size", "build", "asked", "mib"),
    [
        ("20b", OLDER, {"max_model_len": 16384}, 398.38),  # iPhone 17 Pro, Ascend
        ("20b", OLDER, {"max_model_len": FULL, "ubatch": 2048}, 1672.08),  # M5
        ("20b", OLDER, {"max_model_len": FULL, "n_cpu_moe": 24}, 456.98),  # RTX 3070, b6699
        ("120b", 9452, {"max_model_len": FULL, "max_num_seqs": 2, "ubatch": 1024}, 796.75),  # Radeon 8060S
        ("20b", NEWER, {"max_model_len": FULL}, 215.5),
        ("120b", NEWER, {"max_model_len": 32768}, 119.5),
        ("120b", NEWER, {"max_model_len": 4096}, 91.5),
        ("20b", NEWER, {"max_model_len": FULL, "ubatch": 2048}, 868.1),
        ("20b", NEWER, {"max_model_len": FULL, "n_cpu_moe": 24}, 327.5),
        ("120b", NEWER, {"max_model_len": FULL, "n_cpu_moe": 36}, 730.9),
    ],
)
def test_compute_buffers(size: str, build: int, asked: dict[str, Any], mib: float) -> None:
    """Compute buffers of logs and of the allocator come out within 0.5 %."""
    assert compute_mib(size, build, **asked) == pytest.approx(mib, rel=0.005)


@pytest.mark.parametrize("size", ["20b", "120b"])
@pytest.mark.parametrize("build", [None, OLDER, 9452, NEWER])
@pytest.mark.parametrize("n_cpu_moe", [0, 12])
def test_buffers_never_fall(size: str, build: int | None, n_cpu_moe: int) -> None:
    """Step by step a longer context never takes less memory in all, in any figure."""
    engine, device = parse_engine("llama.cpp", build and f"b{build}"), find_device("4090")
    for ubatch in (512, 1024, 2048):
        workload = Workload(ubatch=ubatch, n_cpu_moe=n_cpu_moe)
        totals = [
            estimate(plan_of(size), engine, replace(workload, max_model_len=length), device).total
            for length in range(1024, FULL + 1, 1024)
        ]
        for one, longer in pairwise(totals):
            assert (one.low <= longer.low, one.expected <= longer.expected, one.high <= longer.high) == (True,) * 3


@pytest.mark.parametrize(
    ("build", "count", "length", "mib"),
    [
        (NEWER, 2, FULL, 624.3 + 646.8),
        (NEWER, 4, FULL, 624.3 + 3 * 646.8),
        (OLDER, 2, FULL, 1276.1 + 935.95),
        (OLDER, 4, FULL, 1276.1 + 2 * 624.3 + 935.95),
        (NEWER, 2, 4096, 128.3 + 150.8),
    ],
)
def test_several_devices(build: int, count: int, length: int, mib: float) -> None:
    """Several devices keep four copies of the inputs; the last also keeps the logits."""
    assert compute_mib("20b", build, count, max_model_len=length) == pytest.approx(mib, rel=0.005)


@pytest.mark.parametrize("build", [OLDER, NEWER])
def test_offload_stops_the_pipeline(build: int) -> None:
    """With experts on the host each of several devices takes what one takes."""
    asked = {"max_model_len": FULL, "n_cpu_moe": 10}
    assert compute_mib("20b", build, 4, **asked) == pytest.approx(4 * compute_mib("20b", build, **asked))


def test_unknown_build_spans_both() -> None:
    """Without a build the term covers the older and the newer buffers, and expects the older."""
    both, older, newer = (compute("20b", build, Workload(max_model_len=FULL)) for build in (None, OLDER, NEWER))
    assert (both.low, both.expected, both.high) == (newer.low, older.expected, older.high)
    assert both.basis == "measured"


@pytest.mark.parametrize(
    ("version", "mib"), [("b6000", 413.5), ("b8164", 413.5), ("b9452", 398.4), ("b9509", 215.5), ("b10488", 215.5)]
)
def test_version_chooses_the_law(version: str, mib: float) -> None:
    """The build number decides which buffers are expected: f32 masks, f16 masks, and then few logits."""
    engine, workload = parse_engine("llama.cpp", version), Workload(max_model_len=FULL)
    needed = estimate(plan_of("20b"), engine, workload, find_device("4090"))
    assert needed.compute.expected / MIB == pytest.approx(mib, rel=0.005)


def test_quantized_cache_is_copied() -> None:
    """Attention over a quantized cache holds one layer's keys and values as f16 beside it: 256 MiB at 131072."""
    engine, device = parse_engine("llama.cpp"), find_device("4090")
    plain, quantized = (
        estimate(plan_of("20b"), engine, Workload(max_model_len=FULL, kv_cache_dtype=dtype), device).overhead
        for dtype in ("f16", "q8_0")
    )
    assert (quantized.expected - plain.expected, quantized.low - plain.low) == (256 * MIB, 0)


@pytest.mark.parametrize(("ubatch", "least", "most"), [(512, 20, 150), (2048, 60, 600)])
def test_kernel_pools(ubatch: int, least: int, most: int) -> None:
    """Beside the driver's context kernels take tens of MiB, by the batch, and more is allowed for than expected."""
    engine, device = parse_engine("llama.cpp"), find_device("4090")
    overhead, driver = (
        estimate(plan_of("20b"), engine, Workload(ubatch=ubatch), device).overhead,
        llama_cpp.driver_context(device),
    )
    expected, high = overhead.expected - driver.expected, overhead.high - driver.high
    assert least * MIB <= expected < high <= most * MIB


def test_apple_maps_the_whole_file() -> None:
    """On Metal the mapped file is all device memory, offloaded experts too: 11536.18 MiB, nothing on the host."""
    engine, device = parse_engine("llama.cpp"), find_device("m5")
    for n_cpu_moe in (0, 24):
        needed = estimate(plan_of("20b"), engine, Workload(n_cpu_moe=n_cpu_moe), device)
        assert needed.weights.expected / MIB == pytest.approx(11536.18, abs=0.1)
        assert needed.host_weights == 0


def test_published_total() -> None:
    """An M5 projects 14459 MiB for the 20b at 131072; weights on the device, cache and buffers are within 0.1 %."""
    plan, workload = plan_of("20b"), Workload(max_model_len=FULL)
    buffers = compute("20b", 8164, workload, "m5").expected
    total = llama_cpp.split_weights(plan, 0)[0] + llama_cpp.kv_cache_bytes(plan, workload) + buffers
    assert total / MIB == pytest.approx(14459, rel=0.001)


def test_host_buffers() -> None:
    """Pinned masks and embeddings are the 263.15 MiB of a log, beside the process and one token's logits."""
    engine, device = parse_engine("llama.cpp"), find_device("4090")
    needed = estimate(plan_of("20b"), engine, Workload(max_model_len=FULL), device)
    assert (needed.host_overhead - GIB // 2) / MIB == pytest.approx(263.15 + 0.77, abs=0.1)


def test_devices_share_layers() -> None:
    """Weights and cache do not grow with the number of devices; the driver's context does, device by device."""
    engine, device, workload = parse_engine("llama.cpp", "b6000"), find_device("3090"), Workload(max_model_len=FULL)
    one, two = (estimate(plan_of("20b"), engine, workload, device, count) for count in (1, 2))
    assert (two.weights, two.kv_cache) == (one.weights, one.kv_cache)
    assert two.overhead.expected - one.overhead.expected == llama_cpp.driver_context(device).expected
    # 13 of 25 units lie on one of two devices, so the other cannot use what one unit takes
    uneven = two.overhead.high - one.overhead.high - llama_cpp.driver_context(device).high
    assert uneven == pytest.approx(plan_of("20b").nbytes / 25, rel=1e-6)


def test_driver_context() -> None:
    """A driver takes a quarter of a GiB and more of a discrete GPU, little of Metal's memory."""
    cuda, metal = llama_cpp.driver_context(find_device("4090")), llama_cpp.driver_context(find_device("m4max"))
    assert 0.25 * GIB <= cuda.low < cuda.expected < cuda.high <= 0.7 * GIB
    assert metal.high < cuda.low


@pytest.mark.parametrize(
    ("ubatch", "asked", "mib"),
    [
        (512, {}, 420.08),  # llama-completion, b8164
        (512, {"max_num_seqs": 4, "kv_unified": True}, 420.83),  # llama-server, March 2026
        (2048, {}, 1672.08),  # llama-cli, December 2025
    ],
)
def test_metal(ubatch: int, asked: dict[str, Any], mib: float) -> None:
    """Metal's flash attention asks for scratch of its own: an M5's logs come out within 0.5 %."""
    term = compute("20b", 8164, Workload(max_model_len=FULL, ubatch=ubatch, **asked), "m5")
    assert term.expected / MIB == pytest.approx(mib, rel=0.005)


def test_small_context_shrinks_the_batch() -> None:
    """A batch is never larger than the context."""
    small = Workload(max_model_len=256, ubatch=2048)
    assert compute("20b", OLDER, small) == compute("20b", OLDER, replace(small, ubatch=256))
