"""What a user has to know of an engine's server."""

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from ossquant.advice import command
from ossquant.fit import ENGINE_FORMATS, FORMATS, FitVerdict, candidate, fit
from ossquant.hardware import find_machine
from ossquant.memory import ENGINES, Workload, parse_engine
from ossquant.plan import make_plan
from ossquant.servers import LOOPBACK, PORTS, loads, minimum_version, notes, program, refusal
from ossquant.spec import ModelSpec
from ossquant.units import GIB


@cache
def verdict_of(engine: str, name: str, gpu: str = "h100-sxm", host_memory: int | None = None) -> FitVerdict:
    chosen = candidate("20b", ModelSpec.published("20b"), name, parse_engine(engine))
    return fit(chosen, replace(find_machine(gpu), host_memory=host_memory), Workload())


@pytest.mark.parametrize(("engine", "name"), [(engine, ENGINE_FORMATS[engine][0]) for engine in ENGINES])
def test_every_engine(engine: str, name: str) -> None:
    """Each engine has a port of its own, a version it is meant for, and remarks that are sentences."""
    verdict = verdict_of(engine, name, "m4max" if engine == "mlx" else "h100-sxm")
    assert str(PORTS[engine]) in command(verdict)
    assert re.fullmatch(r"b\d+|\d+(\.\d+)+", minimum_version(verdict))
    assert parse_engine(engine, minimum_version(verdict)).version is not None
    assert program(verdict.candidate.engine)
    assert notes(verdict)
    assert all(note.endswith(".") for note in notes(verdict, "example.org"))


def test_int4_wants_a_newer_vllm() -> None:
    """Our INT4 names were loaded by vLLM 0.32, and by none before."""
    assert minimum_version(verdict_of("vllm", "int4")) == "0.32"
    assert minimum_version(verdict_of("vllm", "mxfp4")) == "0.10.2"


@pytest.mark.parametrize(("host_memory", "said"), [(None, True), (8 * GIB, True), (9 * GIB, True), (64 * GIB, False)])
def test_prompts_on_the_host(host_memory: int | None, said: bool) -> None:
    """What llama-server keeps of prompts is said unless the host surely holds it."""
    found = notes(verdict_of("llama.cpp", "gguf-q8", "h100-sxm", host_memory))
    assert any("--cache-ram 0" in note for note in found) == said


def test_prompts_in_shared_memory() -> None:
    """On a Mac the same bytes are the GPU's."""
    assert any("--cache-ram 0" in note for note in notes(verdict_of("llama.cpp", "gguf-q8", "m4max", 128 * GIB)))


@pytest.mark.parametrize(
    ("host", "said"),
    [(LOOPBACK, False), ("localhost", False), ("::1", False), ("127.0.0.2", False), ("192.0.2.1", True), ("::", True),
     ("1270.example.org", True)],
)  # fmt: skip
def test_reachable(host: str, said: bool) -> None:
    """A server that others reach is said to be one."""
    assert any("no key is asked" in note for note in notes(verdict_of("vllm", "mxfp4"), host)) == said


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("engine", ENGINES)
def test_loads(engine: str, name: str) -> None:
    """A server loads what the engine does, but for transformers, which serves nothing of ours."""
    plan = make_plan(ModelSpec.published("20b"), FORMATS[name])
    own = {"hybrid", "nf4", "fp4"} if engine == "transformers" else set[Any]()
    assert loads(parse_engine(engine), plan) == (name in ENGINE_FORMATS[engine] and name not in own)


@pytest.mark.parametrize(
    ("name", "engine", "words"),
    [
        ("mxfp4", "llama.cpp", ["vllm or mlx or transformers does", "ossquant export 'my model' OUTPUT --to gguf"]),
        ("bf16", "mlx", ["vllm or transformers does", "ossquant export 'my model' OUTPUT --to mxfp4"]),
        ("hybrid", "vllm", ["ossquant run or chat do", "ossquant export CHECKPOINT OUTPUT --to mxfp4"]),
        ("int4", "ollama", ["vllm does", "ossquant export CHECKPOINT OUTPUT --to gguf"]),
        ("gguf-q8", "vllm", ["llama.cpp or ollama does", "ossquant export CHECKPOINT OUTPUT --to mxfp4"]),
        ("nf4", None, ["ossquant run or chat do; for a server", "--to mxfp4"]),
    ],
)
def test_refusal(name: str, engine: str | None, words: list[str]) -> None:
    """A refusal names who does serve the form, and the export that makes what the asked engine loads."""
    error = refusal("my model", make_plan(ModelSpec.published("20b"), FORMATS[name]), engine)
    assert name in error.message
    assert (engine or "no server") in error.message
    assert all(word in error.hint for word in words), error.hint
