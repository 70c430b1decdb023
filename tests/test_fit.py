"""Whether a plan fits a machine, and up to what."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ossquant import fit as fit_module
from ossquant.errors import UsageError
from ossquant.fit import (
    ENGINE_FORMATS,
    FORMATS,
    MAX_SEQUENCES,
    Candidate,
    FitVerdict,
    best,
    candidate,
    falls_back,
    fit,
    loads_stored,
    stored_format,
)
from ossquant.hardware import Machine, devices, find_device, find_machine
from ossquant.layout import Role
from ossquant.memory import ENGINES, Workload, estimate, llama_cpp, mlx, ollama, parse_engine, transformers, vllm
from ossquant.memory.terms import kv_element_bytes
from ossquant.plan import make_plan
from ossquant.recipe import Recipe
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec
from ossquant.units import GIB

FULL = 131072
PAIRS = [(engine, name) for engine in ENGINES for name in ENGINE_FORMATS[engine]]
KV_DTYPES = {module.__name__.rpartition(".")[2].replace("llama_cpp", "llama.cpp"): module.KV_DTYPES
             for module in (llama_cpp, mlx, ollama, transformers, vllm)}  # fmt: skip
SHARED = [device for device in devices() if device.unified_memory]


@cache
def candidate_of(size: str, name: str, engine: str, version: str | None = None) -> Candidate:
    return candidate(size, ModelSpec.published(size), name, parse_engine(engine, version))


def verdict_of(
    size: str,
    name: str,
    engine: str,
    machine: str | Machine,
    *,
    version: str | None = None,
    plan_offload: bool = True,
    **asked: Any,
) -> FitVerdict:
    found = find_machine(machine) if isinstance(machine, str) else machine
    return fit(candidate_of(size, name, engine, version), found, Workload(**asked), plan_offload)


def with_bytes(usable_bytes: int, host_memory: int | None = None, **changed: Any) -> Machine:
    return Machine(replace(find_device("24GB"), usable_bytes=usable_bytes, **changed), 1, host_memory)


@st.composite
def questions(draw: st.DrawFn, *engines: str) -> tuple[Candidate, Machine, Workload]:
    """A model in a format under an engine, a machine, and a workload that the engine can have."""
    engine, name = draw(st.sampled_from([pair for pair in PAIRS if not engines or pair[0] in engines]))
    workload = Workload(
        max_model_len=draw(st.integers(1, FULL)),
        max_num_seqs=draw(st.none() | st.integers(1, 64)),
        kv_cache_dtype=draw(st.sampled_from(KV_DTYPES[engine])),
    )
    if engine == "llama.cpp":
        workload = replace(
            workload,
            ubatch=draw(st.sampled_from((None, 128, 512, 2048))),
            n_cpu_moe=draw(st.sampled_from((0, 0, 0, 1, 12, 24))),
            kv_unified=draw(st.booleans()),
            swa_full=draw(st.booleans()),
        )
    if engine in ("vllm", "transformers", "mlx"):
        workload = replace(workload, max_num_batched_tokens=draw(st.sampled_from((None, 256, 4096))))
    host = draw(st.none() | st.integers(4, 256))
    machine = Machine(draw(st.sampled_from(devices())), draw(st.sampled_from((1, 1, 2, 4, 8))), host and host * GIB)
    return candidate_of(draw(st.sampled_from(("20b", "120b"))), name, engine), machine, workload


def on_host(verdict: FitVerdict) -> bool:
    return bool(verdict.workload.n_cpu_moe or verdict.workload.n_cpu_layers)


def host_holds(verdict: FitVerdict) -> bool:
    needed, machine = verdict.estimate, verdict.machine
    if machine.device.unified_memory:
        room = machine.device.memory_gb * GIB * machine.count
        return needed.total.expected + needed.host_weights <= room
    return machine.host_memory is None or needed.host_total <= machine.host_memory


@given(questions())
def test_sums_and_order(question: tuple[Candidate, Machine, Workload]) -> None:
    """In every figure the total is the sum of its terms, and low, expected and high come in this order."""
    needed = fit(*question).estimate
    terms = (needed.weights, needed.kv_cache, needed.compute, needed.overhead)
    for figure in ("low", "expected", "high"):
        assert getattr(needed.total, figure) == sum(getattr(term, figure) for term in terms)
    for term in (*terms, needed.total):
        assert 0 <= term.low <= term.expected <= term.high
        assert term.basis != "exact" or term.low == term.high
    assert needed.host_total == needed.host_weights + needed.host_overhead
    assert min(needed.host_weights, needed.host_overhead) >= 0


@given(questions())
def test_verdict_agrees_with_sums(question: tuple[Candidate, Machine, Workload]) -> None:
    """A verdict follows from the total, what is usable, what lies on the host, and the host's memory."""
    verdict = fit(*question)
    total, usable, holds = verdict.estimate.total, verdict.usable, host_holds(verdict)
    if verdict.obstacle or total.expected > usable or not holds:
        expected = "no"
    elif total.high > usable:
        expected = "tight"
    else:
        expected = "offload" if on_host(verdict) else "fits"
    assert verdict.verdict == expected
    assert verdict.headroom == usable - total.expected
    if verdict.obstacle:
        assert (verdict.longest_max_model_len, verdict.most_num_seqs) == (0, 0)
    assert verdict.verdict != "no" or verdict.decode is None


@pytest.mark.parametrize(("spare", "verdict"), [(-1, "no"), (0, "tight"), (1, "tight")])
def test_expected_to_the_byte(spare: int, verdict: str) -> None:
    """One byte less than expected is no, from the expected figure on it is tight."""
    needed = verdict_of("20b", "gguf-q8", "llama.cpp", with_bytes(10**12)).estimate.total
    answer = verdict_of("20b", "gguf-q8", "llama.cpp", with_bytes(needed.expected + spare), plan_offload=False)
    assert (answer.verdict, answer.headroom) == (verdict, spare)


@pytest.mark.parametrize(("spare", "verdict"), [(-1, "tight"), (0, "fits"), (1, "fits")])
def test_high_to_the_byte(spare: int, verdict: str) -> None:
    """One byte less than the high figure is tight, from there on it fits."""
    needed = verdict_of("20b", "gguf-q8", "llama.cpp", with_bytes(10**12)).estimate.total
    assert verdict_of("20b", "gguf-q8", "llama.cpp", with_bytes(needed.high + spare)).verdict == verdict


def taken(question: tuple[Candidate, Machine, Workload], **changed: Any) -> tuple[int, int, int]:
    chosen, machine, workload = question
    total = fit(chosen, machine, replace(workload, **changed), plan_offload=False).estimate.total
    return total.low, total.expected, total.high


def never_falls(figures: list[tuple[int, int, int]]) -> bool:
    return all(before <= after for one, next_ in pairwise(figures) for before, after in zip(one, next_, strict=True))


@settings(max_examples=200)
@given(questions(), st.lists(st.integers(1, FULL), min_size=3, max_size=6))
def test_memory_never_falls_with_context(question: tuple[Candidate, Machine, Workload], lengths: list[int]) -> None:
    """More context never takes less memory, in any figure."""
    assert never_falls([taken(question, max_model_len=length) for length in sorted(lengths)])


@settings(max_examples=200)
@given(questions(), st.lists(st.integers(1, 300), min_size=3, max_size=6))
def test_memory_never_falls_with_sequences(question: tuple[Candidate, Machine, Workload], counts: list[int]) -> None:
    """More sequences never take less memory, in any figure."""
    assert never_falls([taken(question, max_num_seqs=count) for count in sorted(counts)])


@given(questions())
def test_memory_never_falls_with_bits(question: tuple[Candidate, Machine, Workload]) -> None:
    """A cache of more bits never takes less memory, where a sequence holds a thousand tokens."""
    assume(question[2].max_model_len >= 1024)
    dtypes = sorted(KV_DTYPES[question[0].engine.name], key=kv_element_bytes)
    assert never_falls([taken(question, kv_cache_dtype=dtype) for dtype in dtypes])


def asks_again(verdict: FitVerdict, **changed: Any) -> bool:
    """Whether the same question with a changed workload fits, whatever lies on the host."""
    again = fit(verdict.candidate, verdict.machine, replace(verdict.workload, **changed), plan_offload=False)
    return again.verdict == ("offload" if on_host(verdict) else "fits")


@settings(max_examples=200)
@given(questions())
def test_longest_is_the_longest(question: tuple[Candidate, Machine, Workload]) -> None:
    """The longest context fits, and one token more does not, unless it is the model's longest."""
    verdict = fit(*question)
    assume(not verdict.obstacle)
    longest = verdict.longest_max_model_len
    assert 0 <= longest <= FULL
    if longest:
        assert asks_again(verdict, max_model_len=longest)
    if longest < FULL:
        assert not asks_again(verdict, max_model_len=longest + 1)


@settings(max_examples=200)
@given(questions())
def test_most_is_the_most(question: tuple[Candidate, Machine, Workload]) -> None:
    """The most sequences fit, and one more does not, unless it is the limit."""
    verdict = fit(*question)
    assume(not verdict.obstacle)
    most = verdict.most_num_seqs
    assert 0 <= most <= MAX_SEQUENCES
    if most:
        assert asks_again(verdict, max_num_seqs=most)
    if most < MAX_SEQUENCES:
        assert not asks_again(verdict, max_num_seqs=most + 1)


@given(questions())
def test_longest_and_most_agree_with_the_verdict(question: tuple[Candidate, Machine, Workload]) -> None:
    """What fits, or is offloaded, is no longer than the longest and no more than the most."""
    verdict = fit(*question)
    fits = verdict.verdict in ("fits", "offload")
    assert fits == (verdict.longest_max_model_len >= verdict.workload.max_model_len)
    # vLLM left to itself prepares for a thousand sequences and more than one alone may then fit
    if verdict.workload.max_num_seqs or verdict.candidate.engine.name != "vllm":
        assert fits == (verdict.most_num_seqs >= verdict.workload.sequences)


@settings(max_examples=200)
@given(questions("llama.cpp"))
def test_offload_is_the_smallest(question: tuple[Candidate, Machine, Workload]) -> None:
    """Where experts go to the host, a layer's less would not fit; a workload's own number stays."""
    chosen, machine, workload = question
    verdict = fit(chosen, machine, workload)
    moved = verdict.workload.n_cpu_moe
    if workload.n_cpu_moe:
        assert verdict.workload == workload
    elif moved:
        assert verdict.verdict == "offload"
        fewer = fit(chosen, machine, replace(workload, n_cpu_moe=moved - 1), plan_offload=False)
        assert fewer.estimate.total.high > fewer.usable
        assert fit(chosen, machine, workload, plan_offload=False).verdict == "no"
    elif verdict.verdict == "no" and not machine.device.unified_memory:
        layers = chosen.plan.spec.num_hidden_layers
        for count in range(1, layers + 1):
            again = fit(chosen, machine, replace(workload, n_cpu_moe=count), plan_offload=False)
            assert again.verdict != "offload"


@settings(max_examples=50)
@given(questions("ollama"))
def test_ollama_offloads_whole_layers(question: tuple[Candidate, Machine, Workload]) -> None:
    """Ollama moves whole layers, as few as fit."""
    chosen, machine, workload = question
    verdict = fit(chosen, machine, workload)
    moved = verdict.workload.n_cpu_layers
    assert verdict.workload == replace(workload, n_cpu_layers=moved)
    if moved:
        assert verdict.verdict == "offload"
        fewer = fit(chosen, machine, replace(workload, n_cpu_layers=moved - 1), plan_offload=False)
        assert fewer.estimate.total.high > fewer.usable


@pytest.mark.parametrize("size", ["20b", "120b"])
@pytest.mark.parametrize("name", ["gguf-q8", "gguf-bf16"])
def test_offload_frees_the_device(size: str, name: str) -> None:
    """Every layer whose experts go to the host takes the same bytes of weights off the device and onto it."""
    layers = ModelSpec.published(size).num_hidden_layers
    found = [verdict_of(size, name, "llama.cpp", "h100-sxm", n_cpu_moe=count).estimate for count in range(layers + 1)]
    device = [needed.weights.expected for needed in found]
    steps = {before - after for before, after in pairwise(device)}
    assert len(steps) == 1
    assert steps.pop() > 0
    assert len({needed.weights.expected + needed.host_weights for needed in found}) == 1


def test_unified_memory_is_never_offloaded() -> None:
    """Where device and host share memory, moving experts frees nothing."""
    for device in SHARED:
        for engine, name in PAIRS:
            for size in ("20b", "120b"):
                verdict = verdict_of(size, name, engine, Machine(device, 1, None), max_model_len=FULL)
                assert verdict.verdict != "offload"
                assert not on_host(verdict)


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_every_device_gets_a_verdict(size: str) -> None:
    """Every device of the table is answered for, under every engine and format."""
    for device in devices():
        for engine, name in PAIRS:
            verdict = verdict_of(size, name, engine, Machine(device, 1, None))
            assert verdict.verdict in ("fits", "tight", "offload", "no")
            assert verdict.verdict == "no" or not verdict.obstacle


@pytest.mark.parametrize(
    ("size", "name", "engine", "machine", "asked", "verdict"),
    [
        ("20b", "gguf-q8", "llama.cpp", "5060ti-16g", {"max_model_len": FULL}, "fits"),
        ("20b", "gguf-q8", "llama.cpp", "16GB", {"max_model_len": 8192}, "fits"),
        ("20b", "gguf-q8", "llama.cpp", "3060 12gb", {"max_model_len": 8192}, "offload"),
        ("20b", "bf16", "transformers", "4090", {"max_model_len": 1}, "no"),
        ("20b", "hybrid", "transformers", "4090", {"max_model_len": 8192}, "fits"),
        ("20b", "mxfp4", "vllm", "4090", {"max_model_len": 8192}, "fits"),
        ("120b", "gguf-q8", "llama.cpp", "4090", {"max_model_len": FULL}, "offload"),
        ("120b", "mxfp4", "vllm", "4090", {"max_model_len": 1}, "no"),
        ("120b", "gguf-q8", "llama.cpp", "h100-sxm", {"max_model_len": FULL}, "fits"),
        ("120b", "gguf-q8", "llama.cpp", "m4max", {"max_model_len": FULL}, "fits"),
        ("120b", "mxfp4", "mlx", "m4max", {"max_model_len": FULL}, "fits"),
        ("20b", "mxfp4", "mlx", "m4", {"max_model_len": 8192}, "no"),
        ("120b", "gguf-q8", "llama.cpp", "strix-halo", {"max_model_len": FULL}, "fits"),
        ("120b", "mxfp4", "vllm", "h200", {"max_model_len": FULL}, "fits"),
        ("120b", "bf16", "vllm", "h200", {"max_model_len": 1}, "no"),
    ],
)
def test_known_pairs(size: str, name: str, engine: str, machine: str, asked: dict[str, Any], verdict: str) -> None:
    """What is widely run fits, and what is widely known to fail does not."""
    assert verdict_of(size, name, engine, machine, **asked).verdict == verdict


@pytest.mark.parametrize("gpu", ["5060ti-16g", "4080", "4060ti 16gb", "5080", "a4000"])
def test_vllm_on_16_gb(gpu: str) -> None:
    """The 20b with its whole context does not fit a card of 16 GB under vLLM."""
    assert verdict_of("20b", "mxfp4", "vllm", gpu, max_model_len=FULL).verdict != "fits"


@pytest.mark.parametrize(
    ("size", "name", "engine", "version", "machine", "asked"),
    [
        ("20b", "bf16", "transformers", None, "3090", {"max_model_len": 1}),
        ("20b", "bf16", "transformers", None, "4090", {"max_model_len": 1}),
        ("120b", "mxfp4", "vllm", "0.11.0", "h100-sxm",
         {"max_model_len": FULL, "gpu_memory_utilization": 0.95, "max_num_batched_tokens": 1024}),
        ("120b", "mxfp4", "vllm", "0.10.1", "h100-sxm", {"max_model_len": FULL}),
        ("120b", "gguf-q8", "llama.cpp", "b7099", "5090", {"max_model_len": 1}),
    ],
)  # fmt: skip
def test_published_out_of_memory(
    size: str, name: str, engine: str, version: str | None, machine: str, asked: dict[str, Any]
) -> None:
    """What ran out of memory in published reports never fits."""
    verdict = verdict_of(size, name, engine, machine, version=version, plan_offload=False, **asked)
    assert verdict.verdict != "fits"


def test_host_memory() -> None:
    """To the byte: experts go to the host only if it holds them beside the process."""
    needed = verdict_of("120b", "gguf-q8", "llama.cpp", "4090").estimate.host_total
    device = find_device("4090")
    enough = verdict_of("120b", "gguf-q8", "llama.cpp", Machine(device, 1, needed))
    lacking = verdict_of("120b", "gguf-q8", "llama.cpp", Machine(device, 1, needed - 1))
    assert (enough.verdict, lacking.verdict) == ("offload", "no")
    assert (lacking.workload.n_cpu_moe, lacking.decode) == (0, None)


def test_small_host_stops_everything() -> None:
    """A host too small for the process alone is a no, however large the device."""
    assert verdict_of("20b", "gguf-q8", "llama.cpp", Machine(find_device("h200"), 1, GIB // 2)).verdict == "no"


def test_shared_memory_holds_both() -> None:
    """Where memory is shared, the host's part counts against it too."""
    device = replace(find_device("strix-halo"), usable_bytes=128 * GIB)
    needed = verdict_of("120b", "gguf-q8", "llama.cpp", Machine(device, 1, None)).estimate
    both = (needed.total.expected + needed.host_weights) / GIB
    for spare, verdict in ((0.01, "fits"), (-0.01, "no")):
        sized = replace(device, memory_gb=both + spare)
        assert verdict_of("120b", "gguf-q8", "llama.cpp", Machine(sized, 1, None)).verdict == verdict


@pytest.mark.parametrize(
    ("machine", "asked", "message"),
    [
        ("1080ti", {}, "no kernels"),
        ("v100 32gb", {}, "no kernels"),
        ("2080ti", {}, "no kernels"),
        ("3x4090", {}, "cannot split 64 attention heads over 3"),
        ("2x4090", {"tensor_parallel": 4}, "--tp 4 needs 4 GPUs, there are 2"),
    ],
)
def test_obstacles(machine: str, asked: dict[str, Any], message: str) -> None:
    """What vLLM cannot run at all is a no that says why."""
    verdict = verdict_of("20b", "mxfp4", "vllm", machine, **asked)
    assert message in verdict.obstacle
    assert verdict.verdict == "no"


@pytest.mark.parametrize(("machine", "stopped"), [("4090", True), ("strix-halo", True), ("2xm4max", True),
                                                  ("m4max", False), ("24GB", True)])  # fmt: skip
def test_mlx_is_for_apple(machine: str, stopped: bool) -> None:
    """mlx is counted on one of Apple's GPUs, and nowhere else."""
    verdict = verdict_of("20b", "mxfp4", "mlx", machine)
    assert ("Apple" in verdict.obstacle, verdict.verdict == "no") == (stopped, stopped)


def test_no_obstacle_elsewhere() -> None:
    """Three cards are no obstacle for llama.cpp, nor an older one, nor two of three cards for vLLM."""
    assert not verdict_of("120b", "gguf-q8", "llama.cpp", "3x3090").obstacle
    assert not verdict_of("20b", "gguf-q8", "llama.cpp", "1080ti").obstacle
    assert not verdict_of("20b", "mxfp4", "vllm", "3x4090", tensor_parallel=2).obstacle


def test_several_devices_add_up() -> None:
    """Several devices have their memory together, under vLLM those of --tp."""
    usable = find_device("4090").usable_bytes
    assert verdict_of("20b", "gguf-q8", "llama.cpp", "4x4090").usable == 4 * usable
    assert verdict_of("20b", "mxfp4", "transformers", "4x4090").usable == 4 * usable
    assert verdict_of("20b", "mxfp4", "vllm", "4x4090").usable == int(0.92 * 4 * usable)
    asked = {"tensor_parallel": 2, "gpu_memory_utilization": 0.5}
    assert verdict_of("20b", "mxfp4", "vllm", "4x4090", **asked).usable == usable


@pytest.mark.parametrize(("gpu", "expanded"), [("m4max", True), ("1080ti", True), ("4090", False), ("24GB", False)])
def test_bf16_fallback(gpu: str, expanded: bool) -> None:
    """Where transformers has no MXFP4 kernels the weights are those of bf16."""
    verdict = verdict_of("20b", "mxfp4", "transformers", gpu)
    assert falls_back(verdict.candidate, verdict.machine.device) == expanded
    name = "bf16" if expanded else "mxfp4"
    assert verdict.estimate.weights.low == make_plan(ModelSpec.published("20b"), FORMATS[name]).nbytes


def test_fallback_is_transformers_alone() -> None:
    """No other engine and no other format is expanded."""
    metal = find_device("m4max")
    assert not falls_back(candidate_of("20b", "hybrid", "transformers"), metal)
    assert not falls_back(candidate_of("20b", "mxfp4", "vllm"), metal)


@pytest.mark.parametrize("engine", ENGINES)
def test_formats_of_an_engine(engine: str) -> None:
    """What an engine loads is planned, what it does not is a usage error that says what it loads."""
    for name in FORMATS:
        if name in ENGINE_FORMATS[engine]:
            assert candidate("20b", ModelSpec.published("20b"), name, parse_engine(engine)).plan.nbytes > 0
        else:
            with pytest.raises(UsageError, match=f"{engine} does not load {name}") as caught:
                candidate("20b", ModelSpec.published("20b"), name, parse_engine(engine))
            assert ENGINE_FORMATS[engine][0] in str(caught.value.hint)


@pytest.mark.parametrize("length", [0, FULL + 1])
def test_length_out_of_range(length: int) -> None:
    """A context the model does not have is a usage error; that nothing fits is an answer."""
    for engine, name in PAIRS:
        with pytest.raises(UsageError, match=f"max_model_len cannot be {length}"):
            verdict_of("20b", name, engine, "4090", max_model_len=length)


def test_price() -> None:
    """Rent grows with the number of devices, and a million tokens cost what the hours do."""
    verdict = verdict_of("20b", "gguf-q8", "llama.cpp", "2x4090")
    assert verdict.usd_per_hour == pytest.approx(2 * 0.34)
    assert verdict.decode is not None
    cheap, dear = verdict.usd_per_million_tokens() or (0, 0)
    assert 0 < cheap < dear
    assert cheap == pytest.approx(2 * 0.34 / (verdict.decode.high * 3600) * 1e6)
    assert dear == pytest.approx(2 * 0.34 / (verdict.decode.low * 3600) * 1e6)


@pytest.mark.parametrize("gpu", ["5060ti-16g", "24GB"])
def test_unknown_price(gpu: str) -> None:
    """Without a known rent nothing is said about cost."""
    verdict = verdict_of("20b", "gguf-q8", "llama.cpp", gpu)
    assert (verdict.usd_per_hour, verdict.usd_per_million_tokens()) == (None, None)


def test_best() -> None:
    """What fits comes before what is tight, that before offload; then the larger model, then the first."""
    fits_20b = verdict_of("20b", "gguf-q8", "llama.cpp", "4090")
    again = verdict_of("20b", "mxfp4", "vllm", "4090", max_model_len=4096)
    fits_120b = verdict_of("120b", "gguf-q8", "llama.cpp", "h100-sxm")
    offload = verdict_of("120b", "gguf-q8", "llama.cpp", "4090")
    no = verdict_of("120b", "mxfp4", "vllm", "4090")
    tight = replace(fits_120b, verdict="tight")
    assert (fits_20b.verdict, again.verdict, offload.verdict, no.verdict) == ("fits", "fits", "offload", "no")
    assert best([no, offload, tight, fits_20b]) is fits_20b
    assert best([no, offload, tight]) is tight
    assert best([no, offload]) is offload
    assert best([fits_20b, fits_120b]) is fits_120b
    assert best([again, fits_20b]) is again


@pytest.mark.parametrize("name", FORMATS)
def test_stored_format(name: str) -> None:
    """A plan's format is named as in the table."""
    assert stored_format(make_plan(ModelSpec.published("20b"), FORMATS[name])) == name


@pytest.mark.parametrize(
    ("experts", "dense"), [("mxfp4", "q4_0"), ("q5_0", "q8_0"), ("q4_0", "bf16"), ("bf16", "bf16")]
)
def test_stored_gguf(experts: str, dense: str) -> None:
    """A GGUF that has no name in the table is a "gguf", for llama.cpp and Ollama alone; its norms are in f32."""
    schemes = dict.fromkeys(Role, Scheme("f32")) | {Role.EXPERTS: Scheme(experts)}
    schemes |= dict.fromkeys((Role.ATTENTION, Role.EMBEDDING, Role.LM_HEAD), Scheme(dense))
    plan = make_plan(ModelSpec.published("20b"), Recipe("mine", "", schemes))
    assert stored_format(plan) == "gguf"
    assert [engine for engine in ENGINES if loads_stored(parse_engine(engine), plan)] == ["llama.cpp", "ollama"]


@pytest.mark.parametrize(("name", "able"), [
    ("mxfp4", {"vllm", "mlx", "transformers"}), ("bf16", {"vllm", "transformers"}), ("int4", {"vllm"}),
    ("hybrid", {"transformers"}), ("gguf-q8", {"llama.cpp", "ollama"}), ("gguf-bf16", {"llama.cpp", "ollama"}),
])  # fmt: skip
def test_loads_stored(name: str, able: set[str]) -> None:
    """Each form is loaded by the engines that read it."""
    plan = make_plan(ModelSpec.published("20b"), FORMATS[name])
    assert {engine for engine in ENGINES if loads_stored(parse_engine(engine), plan)} == able


def test_estimate_is_the_engines() -> None:
    """A verdict rests on the estimate for the machine's devices."""
    chosen, workload = candidate_of("120b", "gguf-q8", "llama.cpp", "b8164"), Workload(max_model_len=FULL)
    machine = find_machine("4x3090")
    verdict = fit(chosen, machine, workload)
    assert verdict.estimate == estimate(chosen.plan, chosen.engine, workload, machine.device, 4)


def test_cold() -> None:
    """Fit needs neither torch nor anything else that is slow to load."""
    heavy = {"torch", "transformers", "bitsandbytes", "numpy", "numba", "rich"}
    program = f"import sys; import {fit_module.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "ossquant.fit" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
