"""Terms add up, and a workload that cannot be is refused."""

from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.memory import (
    ENGINES,
    Engine,
    Workload,
    estimate,
    foreign_options,
    parse_engine,
    workload_for,
)
from ossquant.memory.terms import MemoryEstimate, Term, band, exact, kv_element_bytes
from ossquant.plan import make_plan
from ossquant.spec import ModelSpec

PLAN = make_plan(ModelSpec.published("20b"), FORMATS["mxfp4"])


def test_adding() -> None:
    """A sum adds each figure."""
    assert exact(10) + band(1, 2, 3, "measured") == Term(11, 12, 13, "measured")


@pytest.mark.parametrize(
    ("one", "other", "sum_"),
    [("exact", "exact", "exact"), ("exact", "measured", "measured"), ("heuristic", "measured", "heuristic"),
     ("measured", "heuristic", "heuristic"), ("exact", "heuristic", "heuristic")],
)  # fmt: skip
def test_weakest_basis(one: Any, other: Any, sum_: str) -> None:
    """A sum is known no better than its weakest term, whichever stands first."""
    assert (Term(0, 0, 0, one) + Term(0, 0, 0, other)).basis == sum_


def test_less_and_times() -> None:
    """What lies elsewhere comes off each figure, and several devices multiply each."""
    term = Term(10, 20, 30, "measured")
    assert term.less(5) == Term(5, 15, 25, "measured")
    assert term.times(3) == Term(30, 60, 90, "measured")


def test_whole_bytes() -> None:
    """Figures are whole bytes."""
    for term in (exact(1.9), band(1.9, 2.9, 3.9, "heuristic")):
        assert all(type(value) is int for value in (term.low, term.expected, term.high))
    assert band(1.9, 2.9, 3.9, "heuristic") == Term(1, 2, 3, "heuristic")


def test_totals() -> None:
    """An estimate's totals are the sums of the device's and of the host's terms."""
    needed = MemoryEstimate(
        weights=exact(1),
        kv_cache=band(10, 20, 30, "exact"),
        compute=band(100, 200, 300, "measured"),
        overhead=band(1000, 2000, 3000, "heuristic"),
        host_weights=5,
        host_overhead=7,
    )
    assert needed.total == Term(1111, 2221, 3331, "heuristic")
    assert needed.host_total == 12


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_model_len", 0),
        ("max_model_len", 131073),
        ("max_num_seqs", 0),
        ("max_num_seqs", 65537),
        ("ubatch", 0),
        ("ubatch", 65537),
        ("max_num_batched_tokens", 0),
        ("max_num_batched_tokens", 2**20 + 1),
        ("tensor_parallel", 0),
        ("tensor_parallel", 1025),
        ("n_cpu_moe", -1),
        ("n_cpu_moe", 25),
        ("n_cpu_layers", 25),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
    ],
)
def test_impossible_workload(option: str, value: float) -> None:
    """A value that no engine can have is a usage error that names it, in every engine."""
    for engine in ENGINES:
        with pytest.raises(UsageError, match=f"{option} cannot be {value}"):
            estimate(PLAN, Engine(engine), Workload(**{option: value}), find_device("4090"))


@pytest.mark.parametrize(
    "workload",
    [Workload(max_model_len=1), Workload(max_model_len=131072), Workload(n_cpu_moe=24), Workload(n_cpu_layers=24),
     Workload(max_num_seqs=65536, ubatch=65536, max_num_batched_tokens=2**20, gpu_memory_utilization=1.0)],
)  # fmt: skip
def test_extreme_workload(workload: Workload) -> None:
    """The ends of each range are allowed."""
    workload.check(PLAN)


def test_sequences() -> None:
    """One sequence runs at a time if nothing else is said."""
    assert (Workload().sequences, Workload(max_num_seqs=7).sequences) == (1, 7)


@pytest.mark.parametrize(
    ("name", "version", "parsed"),
    [
        ("llama.cpp", None, None),
        ("llama.cpp", "b8164", (8164,)),
        ("llama.cpp", "8164", (8164,)),
        ("vllm", "0.11.0", (0, 11, 0)),
        ("vllm", "v0.11", (0, 11)),
        ("vllm", "0.32.0rc1", (0, 32, 0)),
        ("ollama", "0.30.6", (0, 30, 6)),
    ],
)
def test_parse_engine(name: str, version: str | None, parsed: tuple[int, ...] | None) -> None:
    """Versions are read as each engine writes them."""
    assert parse_engine(name, version) == Engine(name, parsed)


@pytest.mark.parametrize(("name", "version", "message"), [("vlm", None, "unknown engine 'vlm'"),
                                                          ("vllm", "newest", "'newest' is no version of vllm"),
                                                          ("vllm", "", "'' is no version")])  # fmt: skip
def test_parse_engine_errors(name: str, version: str | None, message: str) -> None:
    """An unknown engine or version is a usage error with a hint."""
    with pytest.raises(UsageError, match=message) as caught:
        parse_engine(name, version)
    assert caught.value.hint


def test_foreign_options() -> None:
    """Options of other engines are named, and dropped where several engines stand side by side."""
    workload = Workload(max_model_len=4096, ubatch=1024, n_cpu_moe=3, gpu_memory_utilization=0.8, kv_cache_dtype="q8_0")
    foreign = {engine: foreign_options(Engine(engine), workload) for engine in ENGINES}
    assert foreign == {
        "llama.cpp": ["gpu_memory_utilization"],
        "ollama": ["n_cpu_moe", "gpu_memory_utilization"],
        "vllm": ["ubatch", "n_cpu_moe", "kv_cache_dtype q8_0"],
        "transformers": ["ubatch", "gpu_memory_utilization", "kv_cache_dtype q8_0"],
        "mlx": ["ubatch", "n_cpu_moe", "gpu_memory_utilization", "kv_cache_dtype q8_0"],
    }
    for engine in ENGINES:
        assert foreign_options(Engine(engine), workload_for(Engine(engine), workload)) == []
    assert workload_for(Engine("vllm"), workload) == Workload(max_model_len=4096, gpu_memory_utilization=0.8)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_kv_dtype_has_a_size(engine: str) -> None:
    """Every cache type that an engine takes has a size, between half a byte and four."""
    from ossquant.memory import llama_cpp, mlx, ollama, transformers, vllm

    modules = {"llama.cpp": llama_cpp, "ollama": ollama, "vllm": vllm, "transformers": transformers, "mlx": mlx}
    module = modules[engine]
    assert all(0.5 <= kv_element_bytes(dtype) <= 4 for dtype in module.KV_DTYPES)
