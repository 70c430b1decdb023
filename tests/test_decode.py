"""Tokens a second to expect."""

import tomllib
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ossquant.decode import HOST_BANDWIDTH, DecodeRate, decode_rate
from ossquant.fit import ENGINE_FORMATS, FORMATS
from ossquant.hardware import Device, devices, find_device
from ossquant.layout import Role
from ossquant.memory import ENGINES, Workload
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec

PAIRS = [(engine, name) for engine in ENGINES for name in ENGINE_FORMATS[engine] if engine != "mlx"]
POINTS: list[dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "data/decode_points.toml").read_text("utf-8")
)["point"]  # fmt: skip


@cache
def plan_of(size: str, name: str) -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS[name])


def rate(
    device: str | Device,
    size: str = "20b",
    name: str = "gguf-q8",
    engine: str = "llama.cpp",
    tensor_parallel: int = 1,
    **asked: Any,
) -> DecodeRate:
    found = find_device(device) if isinstance(device, str) else device
    expected = decode_rate(plan_of(size, name), engine, Workload(**asked), found, tensor_parallel)
    assert expected is not None
    return expected


def never_rises(rates: list[DecodeRate]) -> bool:
    return all(after.low <= one.low and after.high <= one.high for one, after in pairwise(rates))


@given(
    st.sampled_from(devices()),
    st.sampled_from(PAIRS),
    st.sampled_from(("20b", "120b")),
    st.integers(1, 131072),
    st.integers(1, 64),
    st.integers(0, 24),
    st.sampled_from((1, 2, 4, 8)),
)
def test_low_before_high(
    device: Device, pair: tuple[str, str], size: str, length: int, sequences: int, on_host: int, split: int
) -> None:
    """The low rate is above nothing and below the high one, for every device, engine, format and workload."""
    engine, name = pair
    moved = {"llama.cpp": "n_cpu_moe", "ollama": "n_cpu_layers"}.get(engine)
    asked = {"max_model_len": length, "max_num_seqs": sequences} | ({moved: on_host} if moved else {})
    found = rate(device, size, name, engine, split if engine == "vllm" else 1, **asked)
    assert 0 < found.low < found.high


@given(
    st.sampled_from(devices()),
    st.sampled_from(PAIRS),
    st.lists(st.floats(210, 10000), min_size=2, max_size=5),
    st.integers(0, 24),
)
def test_bandwidth(device: Device, pair: tuple[str, str], bandwidths: list[float], on_host: int) -> None:
    """More bandwidth never writes slower."""
    engine, name = pair
    asked = {"n_cpu_moe": on_host} if engine == "llama.cpp" else {}
    descending = sorted(bandwidths, reverse=True)
    assert never_rises(
        [rate(replace(device, bandwidth_gbps=each), "20b", name, engine, **asked) for each in descending]
    )


@pytest.mark.parametrize("gpu", ["860m", "780m", "strix-halo", "4090", "m4max", "h100-sxm", "7900xtx", "a770"])
def test_twice_the_bandwidth(gpu: str) -> None:
    """Twice the bandwidth writes faster, and no more than twice as fast."""
    device = find_device(gpu)
    slow, fast = (rate(replace(device, bandwidth_gbps=factor * (device.bandwidth_gbps or 0))) for factor in (1, 2))
    assert slow.high < fast.high
    if not device.unified_memory or gpu == "strix-halo":  # a fast chip is another kind of chip
        assert fast.high <= 2 * slow.high
        assert fast.low <= 2 * slow.low


@pytest.mark.parametrize("gpu", ["4090", "h200", "9070xt", "arc-a770"])
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_offload_slows(gpu: str, size: str) -> None:
    """Every layer whose experts lie on the host makes writing slower on a discrete GPU."""
    layers = ModelSpec.published(size).num_hidden_layers
    rates = [rate(gpu, size, n_cpu_moe=count) for count in range(layers + 1)]
    assert all(after.low < one.low and after.high < one.high for one, after in pairwise(rates))


def test_whole_layers_slow_more() -> None:
    """A layer that lies on the host whole costs more than its experts alone."""
    experts, whole = rate("4090", n_cpu_moe=12), rate("4090", n_cpu_layers=12)
    assert whole.low < experts.low
    assert whole.high < experts.high


def test_all_layers_on_the_host() -> None:
    """A layer on the host has its chosen experts read there and its attention, too."""
    plan = plan_of("20b", "gguf-bf16")
    experts, whole = (
        1 / rate("4090", "20b", "gguf-bf16", **asked).high for asked in ({"n_cpu_moe": 24}, {"n_cpu_layers": 24})
    )
    assert experts >= plan.role_nbytes[Role.EXPERTS] * 4 / 32 / HOST_BANDWIDTH[1]
    assert whole - experts >= 0.9 * plan.role_nbytes[Role.ATTENTION] / HOST_BANDWIDTH[1]


@pytest.mark.parametrize(("engine", "name"), PAIRS)
@pytest.mark.parametrize("gpu", ["4090", "m4max"])
def test_depth(engine: str, name: str, gpu: str) -> None:
    """A longer context makes the low rate lower; the high one is of an empty context and stays."""
    rates = [rate(gpu, "20b", name, engine, max_model_len=length) for length in (1, 128, 4096, 32768, 131072)]
    assert all(after.low < one.low for one, after in pairwise(rates))
    assert len({each.high for each in rates}) == 1


def test_window() -> None:
    """Up to the window a token costs every layer, beyond it the half that sees everything."""
    seconds = [1 / rate("4090", max_model_len=length).low for length in (1, 128, 255)]
    assert seconds[1] - seconds[0] == pytest.approx(2 * (seconds[2] - seconds[1]), rel=0.01)


def test_smaller_cache() -> None:
    """A cache of fewer bits makes a long context faster."""
    plain, small = (rate("4090", max_model_len=131072, kv_cache_dtype=dtype) for dtype in ("f16", "q8_0"))
    assert small.low > plain.low


@pytest.mark.parametrize("gpu", ["4090", "h100-sxm", "gb10"])
def test_sequences(gpu: str) -> None:
    """More sequences write more together, and each of them less."""
    rates = [rate(gpu, max_num_seqs=count, max_model_len=4096) for count in (1, 2, 4, 16, 64)]
    assert all(after.low > one.low and after.high > one.high for one, after in pairwise(rates))
    each = [DecodeRate(one.low / count, one.high / count) for one, count in zip(rates, (1, 2, 4, 16, 64), strict=True)]
    assert never_rises(each)


def test_tensor_parallel() -> None:
    """GPUs that work side by side write faster than one, and less than as many times."""
    one, four = (rate("h100-sxm", "120b", "mxfp4", "vllm", split) for split in (1, 4))
    assert one.low < four.low < 4 * one.low
    assert one.high < four.high < 4 * one.high


def test_larger_formats_are_slower() -> None:
    """What stores more bytes a weight writes slower under the same engine."""
    q8, bf16 = (rate("4090", "20b", name) for name in ("gguf-q8", "gguf-bf16"))
    assert never_rises([q8, bf16])
    assert bf16.high < q8.high
    assert never_rises([rate("h200", "20b", name, "vllm") for name in ("mxfp4", "bf16")])


def test_engines() -> None:
    """llama.cpp writes faster than transformers, and bitsandbytes' experts are the slowest."""
    server, ours, bnb = (
        rate("4090", "20b", name, engine)
        for name, engine in (("gguf-q8", "llama.cpp"), ("mxfp4", "transformers"), ("nf4", "transformers"))
    )
    assert server.low > ours.low > bnb.low
    assert server.high > ours.high > bnb.high


@pytest.mark.parametrize("gpu", ["24GB", "80GB"])
def test_unknown_bandwidth(gpu: str) -> None:
    """Where the bandwidth is not known nothing is said."""
    assert decode_rate(plan_of("20b", "gguf-q8"), "llama.cpp", Workload(), find_device(gpu), 1) is None


def point_rate(point: dict[str, Any]) -> DecodeRate:
    return rate(point["gpu"], point["model"], point["format"], point["engine"], **point["options"])


@pytest.mark.parametrize(
    "name",
    ["spark-20b-tg-d0", "spark-120b-tg-d32768", "jg-4090", "jg-r9700", "lf-7900xt", "lf-m4pro", "3090-ub1", "5090-q8",
     "5070ti-bf16", "halo-120b-rocm", "m4max-120b", "spark-20b-b4"],
)  # fmt: skip
def test_published_rates(name: str) -> None:
    """Well-documented published rates lie in the range."""
    point = next(each for each in POINTS if each["id"] == name)
    found = point_rate(point)
    assert found.low <= point["tokens_per_second"] <= found.high


def test_most_published_rates() -> None:
    """At least 85 % of all published rates lie in the range."""
    inside = [point_rate(point).low <= point["tokens_per_second"] <= point_rate(point).high for point in POINTS]
    assert sum(inside) >= 0.85 * len(inside)


@pytest.mark.parametrize("name", ["jg-4090", "3090-ub1", "spark-120b-tg-d0", "lf-m4pro"])
def test_ranges_say_something(name: str) -> None:
    """For a short context on a known card the high rate is at most three times the low one."""
    found = point_rate(next(each for each in POINTS if each["id"] == name))
    assert found.high <= 3 * found.low


def test_unrated_engine() -> None:
    """Of mlx no rate is known, and none is made up."""
    assert decode_rate(plan_of("20b", "mxfp4"), "mlx", Workload(), find_device("m4max"), 1) is None
