"""What Ollama takes: its own engine before 0.30, llama-server since."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.layout import Role
from ossquant.memory import MemoryEstimate, Term, Workload, estimate, parse_engine
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec
from ossquant.units import GIB, MIB


@cache
def plan_of(size: str, name: str = "gguf-bf16") -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS[name])


def needed(size: str, version: str | None, device: str, count: int = 1, **asked: Any) -> MemoryEstimate:
    return estimate(plan_of(size), parse_engine("ollama", version), Workload(**asked), find_device(device), count)


@pytest.mark.parametrize(
    ("length", "sequences", "window"),
    [(8192, 1, 4096 + 512), (131072, 1, 4096 + 512), (4096, 1, 4096), (8192, 2, 2 * 4096 + 512), (4096, 2, 2 * 4096)],
)
def test_own_cache(length: int, sequences: int, window: int) -> None:
    """Before 0.30 a sliding layer keeps 4096 cells a sequence and a batch, unless the context is shorter."""
    term = needed("20b", "0.13.5", "4090", max_model_len=length, max_num_seqs=sequences).kv_cache
    assert term.expected == 2048 * 12 * (length * sequences + window)
    assert term.low == term.high


@pytest.mark.parametrize("version", ["0.30", "0.31.0", None])
def test_llama_server_cache(version: str | None) -> None:
    """Since 0.30 it is llama-server's: 9306 MiB for the 120b, two sequences of 131072 and a batch of 1024."""
    asked = {"max_model_len": 131072, "max_num_seqs": 2, "ubatch": 1024}
    assert needed("120b", version, "8060s", **asked).kv_cache.expected == 9306 * MIB


def test_published_weights() -> None:
    """The 120b that Ollama ships takes 61223 MiB of a Radeon 8060S."""
    assert needed("120b", "0.30", "8060s", max_model_len=131072).weights.expected / MIB == pytest.approx(61223.7, abs=1)


def figures(term: Term) -> tuple[int, int, int]:
    return term.low, term.expected, term.high


@pytest.mark.parametrize(
    ("length", "sequences", "ubatches"),
    [
        (4096, 1, (512, 512, 512)),
        (2048, 2, (512, 512, 512)),
        (4097, 1, (512, 1024, 1024)),
        (32768, 1, (512, 1024, 1024)),
        (4096, 2, (512, 1024, 1024)),
        (32769, 1, (512, 1024, 2048)),
        (131072, 2, (512, 1024, 2048)),  # a log of 0.30.0, 120b on a Radeon 8060S, shows 1024
    ],
)
def test_chosen_batch(length: int, sequences: int, ubatches: tuple[int, int, int]) -> None:
    """Ollama chooses the batch by the context of all sequences and the memory: the term spans what it may be."""
    asked: dict[str, Any] = {"max_model_len": length, "max_num_seqs": sequences}
    found = needed("20b", "0.30.6", "h100-sxm", **asked)
    least, usual, most = (needed("20b", "0.30.6", "h100-sxm", ubatch=ubatch, **asked) for ubatch in ubatches)
    for name in ("kv_cache", "compute"):
        terms = [getattr(one, name) for one in (least, usual, most)]
        assert figures(getattr(found, name)) == (terms[0].low, terms[1].expected, terms[2].high)


def test_published_buffer() -> None:
    """Ollama 0.30.0 chose a batch of 1024 for the 120b and two contexts of 131072: 796 MiB of compute buffer."""
    term = needed("120b", "0.30.0", "8060s", max_model_len=131072, max_num_seqs=2).compute
    assert term.expected / MIB == pytest.approx(796.75, rel=0.005)


@pytest.mark.parametrize(
    ("version", "build"), [("0.30", 9452), ("0.30.0", 9452), ("0.30.6", 9509), ("0.31.0", 9840), ("0.33.1", 9840),
                           (None, None)]
)  # fmt: skip
def test_pinned_builds(version: str | None, build: int | None) -> None:
    """A version of Ollama has the buffers of the llama.cpp that it pins."""
    asked = {"max_model_len": 32768, "ubatch": 512}
    server = parse_engine("llama.cpp", build and f"b{build}")
    same = estimate(plan_of("20b"), server, Workload(**asked), find_device("4090"))
    found = needed("20b", version, "4090", **asked)
    assert [figures(each) for each in (found.total, found.kv_cache, found.compute)] == [
        figures(each) for each in (same.total, same.kv_cache, same.compute)
    ]


@pytest.mark.parametrize(("length", "mib"), [(8192, 121.8), (8192, 1.16 * 121.8)])
def test_own_graph(length: int, mib: float) -> None:
    """Logs of 0.11.10 and 0.12.6 show a graph of 121.8 MiB, and up to 16 % more, for 8192 tokens."""
    term = needed("20b", "0.12.6", "4090", max_model_len=length).compute
    assert term.low / MIB <= mib * 1.005
    assert mib <= term.high / MIB
    assert term.expected / MIB == pytest.approx(121.8, rel=0.005)


@pytest.mark.parametrize(
    ("size", "version", "asked", "gigabytes"),
    [
        ("20b", "0.13.5", {"max_model_len": 32768}, 14),
        ("120b", "0.12.10", {"max_model_len": 8192}, 65),
    ],
)
def test_published_sizes(size: str, version: str, asked: dict[str, Any], gigabytes: int) -> None:
    """`ollama ps` shows weights, cache and graph of the device in whole GB; what a driver takes is not in it."""
    found = needed(size, version, "4090", **asked)
    total = found.weights.expected + found.kv_cache.expected + found.compute.expected
    assert total / 1e9 == pytest.approx(gigabytes, abs=0.5)


@pytest.mark.parametrize("version", ["0.13.5", "0.30.6"])
def test_layers_on_the_host(version: str) -> None:
    """Layers on the host take weights and cache along; the output layer, buffers and the sum stay."""
    asked = {"max_model_len": 32768, "ubatch": 512}
    none, half, all_ = (needed("120b", version, "4090", **asked, n_cpu_layers=count) for count in (0, 18, 36))
    assert all_.weights.expected == pytest.approx(plan_of("120b").role_nbytes[Role.LM_HEAD], abs=2)
    assert all_.kv_cache.expected == 0
    assert half.kv_cache.expected == pytest.approx(none.kv_cache.expected / 2, abs=2)
    assert none.weights.expected - half.weights.expected == half.host_weights - none.host_weights
    assert half.host_overhead - none.host_overhead == none.kv_cache.expected - half.kv_cache.expected
    assert (half.compute, half.overhead) == (none.compute, none.overhead)


def test_buffers_on_every_device() -> None:
    """Its own engine keeps a graph on every device."""
    one, three = (needed("120b", "0.13.5", "3090", count) for count in (1, 3))
    assert three.compute.expected == 3 * one.compute.expected
    assert three.weights == one.weights


def test_foreign_kv_dtype() -> None:
    """Ollama's cache is f16, q8_0 or q4_0."""
    assert needed("20b", "0.13.5", "4090", kv_cache_dtype="q8_0").kv_cache.expected == 1088 * 12 * (8192 + 4608)
    with pytest.raises(UsageError, match="kv_cache_dtype cannot be 'fp8' here"):
        needed("20b", "0.13.5", "4090", kv_cache_dtype="fp8")


@pytest.mark.parametrize("dtype", ["q5_1", "f32"])
def test_llama_cpp_only_dtypes(dtype: str) -> None:
    """What llama.cpp's cache can be and Ollama's cannot is refused by every version."""
    for version in ("0.13.5", "0.30", None):
        with pytest.raises(UsageError, match=f"kv_cache_dtype cannot be '{dtype}' here"):
            needed("20b", version, "4090", kv_cache_dtype=dtype)


def test_ubatch_is_fixed_before_llama_server() -> None:
    """Its own engine computes 512 tokens at once whatever is asked."""
    assert needed("20b", "0.13.5", "4090", ubatch=2048) == needed("20b", "0.13.5", "4090")


def test_embedding_on_the_host() -> None:
    """The token embedding lies on the host, 1104.61 MiB in bf16."""
    assert needed("20b", None, "4090").host_weights / MIB == pytest.approx(1104.61, abs=0.01)
    assert replace(needed("20b", None, "4090"), host_overhead=0).host_total < 2 * GIB
