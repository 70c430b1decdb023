"""What to type next, and where a user would be caught."""

import shlex
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from ossquant.advice import command, warnings
from ossquant.fit import ENGINE_FORMATS, Candidate, FitVerdict, candidate, fit
from ossquant.hardware import Machine, devices, find_device, find_machine
from ossquant.memory import ENGINES, Workload, parse_engine
from ossquant.spec import ModelSpec
from ossquant.units import GIB

PAIRS = [(engine, name) for engine in ENGINES for name in ENGINE_FORMATS[engine]]
FULL = 131072


@cache
def candidate_of(size: str, name: str, engine: str, model: str = "") -> Candidate:
    return candidate(model or size, ModelSpec.published(size), name, parse_engine(engine))


def verdict_of(
    size: str, name: str, engine: str, machine: str | Machine, *, model: str = "", **asked: Any
) -> FitVerdict:
    found = find_machine(machine) if isinstance(machine, str) else machine
    return fit(candidate_of(size, name, engine, model), found, Workload(**asked))


def words(verdict: FitVerdict) -> list[str]:
    return shlex.split(command(verdict))


def value(verdict: FitVerdict, flag: str) -> str:
    """What follows a flag that stands once."""
    found = words(verdict)
    assert found.count(flag) == 1
    return found[found.index(flag) + 1]


def test_every_command() -> None:
    """On every device every verdict but no has a line of its engine's program, and no has none."""
    programs = {"llama.cpp": "llama-server", "vllm": "vllm", "ollama": "ollama", "mlx": "mlx_lm.server"}
    for device in devices():
        for engine, name in PAIRS:
            for size in ("20b", "120b"):
                verdict = verdict_of(size, name, engine, Machine(device, 1, None))
                if verdict.verdict == "no":
                    assert command(verdict) == ""
                elif engine in programs:
                    assert programs[engine] in words(verdict)
                else:
                    assert words(verdict)[0] in ("ossquant", "transformers")
                assert "\n" not in command(verdict)


@pytest.mark.parametrize(
    ("size", "name", "source"),
    [
        ("20b", "gguf-q8", ["-hf", "ggml-org/gpt-oss-20b-GGUF"]),
        ("120b", "gguf-q8", ["-hf", "ggml-org/gpt-oss-120b-GGUF"]),
        ("20b", "gguf-bf16", ["-m", "gpt-oss-20b-gguf-bf16.gguf"]),
    ],
)
def test_llama_server(size: str, name: str, source: list[str]) -> None:
    """llama-server gets the published GGUF where there is one, the context, one slot, all layers, and the loopback."""
    verdict = verdict_of(size, name, "llama.cpp", "h100-sxm", max_model_len=FULL)
    sized = ["-c", "131072", "-np", "1", "-ngl", "99"]
    assert words(verdict) == ["llama-server", *source, *sized, "--jinja", "--host", "127.0.0.1", "--port", "8080"]


@pytest.mark.parametrize(("engine", "name", "gpu", "port"), [
    ("llama.cpp", "gguf-q8", "h100-sxm", "8080"), ("vllm", "mxfp4", "h100-sxm", "8000"),
    ("transformers", "mxfp4", "h100-sxm", "8000"), ("mlx", "mxfp4", "m4max", "8080"),
])  # fmt: skip
def test_address(engine: str, name: str, gpu: str, port: str) -> None:
    """A server listens on the loopback and its own port, unless another host and port are asked for."""
    verdict = verdict_of("20b", name, engine, gpu)
    assert (value(verdict, "--host"), value(verdict, "--port")) == ("127.0.0.1", port)
    other = shlex.split(command(verdict, "0.0.0.0; rm -rf x", 1234))
    assert other[-4:] == ["--host", "0.0.0.0; rm -rf x", "--port", "1234"]


def test_gguf_of_ours() -> None:
    """A GGUF in a folder is served from there, by whatever its files are called."""
    chosen = replace(candidate_of("20b", "gguf-q8", "llama.cpp"), model="my g", path="my g/a-00001-of-00003.gguf")
    verdict = fit(chosen, find_machine("4090"), Workload())
    assert value(verdict, "-m") == "my g/a-00001-of-00003.gguf"
    assert "-hf" not in words(verdict)
    in_a_folder_20b = fit(replace(chosen, model="20b"), find_machine("4090"), Workload())
    assert value(in_a_folder_20b, "-m") == value(verdict, "-m")
    chosen = replace(candidate_of("20b", "gguf-q8", "ollama"), model="My g (2)", path="My g (2)/a.gguf")
    assert words(fit(chosen, find_machine("4090"), Workload()))[-5:] == [
        "ollama", "create", "my-g-2", "-f", "My g (2)/Modelfile"
    ]  # fmt: skip


def test_llama_server_offload() -> None:
    """Experts that go to the host are named by --n-cpu-moe, as many layers as were planned."""
    verdict = verdict_of("120b", "gguf-q8", "llama.cpp", "4090", max_model_len=FULL)
    assert verdict.verdict == "offload"
    assert value(verdict, "--n-cpu-moe") == str(verdict.workload.n_cpu_moe)
    assert verdict.workload.n_cpu_moe > 20
    assert "--load-mode" not in words(verdict)


def test_llama_server_sequences() -> None:
    """Slots of their own take their number of times the context; shared ones the context once."""
    own = verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", max_model_len=4096, max_num_seqs=4)
    assert (value(own, "-c"), value(own, "-np")) == ("16384", "4")
    shared = verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", max_model_len=4096, max_num_seqs=4, kv_unified=True)
    assert (value(shared, "-c"), value(shared, "-np")) == ("4096", "4")
    assert ("-kvu" in words(shared), "-kvu" in words(own)) == (True, False)


def test_llama_server_options() -> None:
    """Batch, cache type and whole sliding caches are passed on where they are asked for, and not else."""
    asked = {"ubatch": 4096, "kv_cache_dtype": "q8_0", "swa_full": True}
    verdict = verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", **asked)
    assert [value(verdict, flag) for flag in ("-ub", "-b", "-ctk", "-ctv")] == ["4096", "4096", "q8_0", "q8_0"]
    assert "--swa-full" in words(verdict)
    assert value(verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", ubatch=1024), "-b") == "2048"
    plain = words(verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", ubatch=512))
    assert not {"-ub", "-b", "-ctk", "-ctv", "--swa-full", "--n-cpu-moe"} & set(plain)


def test_apple_offload() -> None:
    """On Metal a mapped file defeats offload, so the command turns mmap off and a warning says why."""
    verdict = verdict_of("20b", "gguf-q8", "llama.cpp", "m4max", n_cpu_moe=5)
    assert value(verdict, "--load-mode") == "none"
    assert any("without --load-mode none" in warning for warning in warnings(verdict))
    for build, flag in (("b8164", "--no-mmap"), ("b10874", "--no-mmap"), ("b10875", "--load-mode")):
        chosen = replace(verdict.candidate, engine=parse_engine("llama.cpp", build))
        assert flag in words(fit(chosen, verdict.machine, Workload(n_cpu_moe=5)))
    for other in (verdict_of("20b", "gguf-q8", "llama.cpp", "m4max"),
                  verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm", n_cpu_moe=5)):  # fmt: skip
        assert "--load-mode" not in words(other)
        assert not any("--load-mode" in warning for warning in warnings(other))


def test_vllm() -> None:
    """vLLM gets the published checkpoint, the share that is counted, tools, and no more than the workload says."""
    plain = verdict_of("20b", "mxfp4", "vllm", "h100-sxm", max_model_len=4096)
    assert words(plain) == [
        "vllm", "serve", "openai/gpt-oss-20b", "--max-model-len", "4096", "--gpu-memory-utilization", "0.92",
        "--enable-auto-tool-choice", "--tool-call-parser", "openai", "--host", "127.0.0.1", "--port", "8000",
    ]  # fmt: skip
    old = fit(replace(plain.candidate, engine=parse_engine("vllm", "0.10.1")), plain.machine, Workload())
    assert value(old, "--gpu-memory-utilization") == "0.9"
    assert "--tool-call-parser" not in words(old)
    asked = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "kv_cache_dtype": "fp8", "gpu_memory_utilization": 0.95}
    full = verdict_of("120b", "mxfp4", "vllm", "4xh100-sxm", **asked)
    flags = ("--tensor-parallel-size", "--max-num-seqs", "--max-num-batched-tokens", "--kv-cache-dtype",
             "--gpu-memory-utilization")  # fmt: skip
    assert [value(full, flag) for flag in flags] == ["4", "8", "1024", "fp8", "0.95"]
    assert value(verdict_of("20b", "mxfp4", "vllm", "4xh100-sxm", tensor_parallel=2), flags[0]) == "2"


@pytest.mark.parametrize(("asked", "said"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp8_e4m3", "fp8_e4m3")])
def test_vllm_dtypes(asked: str, said: str) -> None:
    """A cache type is said in vLLM's words."""
    assert value(verdict_of("20b", "mxfp4", "vllm", "h100-sxm", kv_cache_dtype=asked), "--kv-cache-dtype") == said


def test_mlx() -> None:
    """mlx-lm's server runs, reads and keeps as many conversations as are counted."""
    verdict = verdict_of("20b", "mxfp4", "mlx", "m4max", max_num_seqs=3, max_num_batched_tokens=512)
    assert words(verdict)[:3] == ["mlx_lm.server", "--model", "openai/gpt-oss-20b"]
    for flag in ("--decode-concurrency", "--prompt-concurrency", "--prompt-cache-size"):
        assert value(verdict, flag) == "3"
    assert value(verdict, "--prefill-step-size") == "512"


def test_transformers_serve() -> None:
    """transformers serves what is stored in mxfp4 or bf16; of the published models no bf16 checkpoint is there."""
    for name, model in (("mxfp4", ""), ("mxfp4", "./mine"), ("bf16", "./mine")):
        verdict = verdict_of("20b", name, "transformers", "h100-sxm", model=model)
        assert words(verdict)[:3] == ["transformers", "serve", model or "openai/gpt-oss-20b"]


def test_whole_prompts() -> None:
    """What a prompt at once takes above the counted chunks is said, until it is counted."""
    chunks = verdict_of("20b", "mxfp4", "transformers", "h100-sxm")
    whole = verdict_of("20b", "mxfp4", "transformers", "h100-sxm", max_num_batched_tokens=8192)
    said = next(warning for warning in warnings(chunks) if "computes a prompt at once" in warning)
    more = (whole.estimate.total.expected - chunks.estimate.total.expected) / GIB
    assert f"one of 8,192 tokens takes {more:.1f} GiB more" in said
    assert not any("at once" in warning for warning in warnings(whole))
    assert not any("at once" in each for each in warnings(verdict_of("20b", "hybrid", "transformers", "h100-sxm")))


def test_ollama() -> None:
    """Ollama is told the context and the slots by its variables."""
    verdict = verdict_of("20b", "gguf-bf16", "ollama", "h100-sxm", max_model_len=32768, max_num_seqs=2)
    assert {"OLLAMA_CONTEXT_LENGTH=32768", "OLLAMA_NUM_PARALLEL=2", "gpt-oss:20b"} <= set(words(verdict))
    assert "OLLAMA_KV_CACHE_TYPE" not in command(verdict)
    assert words(verdict).count("OLLAMA_HOST=127.0.0.1:11434") == 2  # of the server and of its client
    assert "OLLAMA_HOST='[::1]:80'" in command(verdict, "::1", 80)
    q8 = verdict_of("20b", "gguf-q8", "ollama", "h100-sxm")
    assert words(q8)[-3:] == ["ollama", "run", "hf.co/ggml-org/gpt-oss-20b-GGUF"]
    quantized = verdict_of("20b", "gguf-bf16", "ollama", "h100-sxm", kv_cache_dtype="q8_0")
    assert {"OLLAMA_FLASH_ATTENTION=1", "OLLAMA_KV_CACHE_TYPE=q8_0"} <= set(words(quantized))


@pytest.mark.parametrize("name", ["hybrid", "nf4", "fp4", "bf16"])
def test_ossquant(name: str) -> None:
    """What ossquant makes, `ossquant run` runs."""
    verdict = verdict_of("20b", name, "transformers", "h100-sxm")
    assert words(verdict)[:3] == ["ossquant", "run", "openai/gpt-oss-20b"]
    assert value(verdict, "--scheme") == name


@pytest.mark.parametrize("model", ["./my model", "it's/gpt-oss-20b", "a;b", "$(x)/gpt-oss-20b-mine"])
@pytest.mark.parametrize(("engine", "name"), [("vllm", "mxfp4"), ("transformers", "hybrid"), ("llama.cpp", "gguf-q8")])
def test_hostile_names(model: str, engine: str, name: str) -> None:
    """A model's name is one word of the line, whatever it holds."""
    found = words(verdict_of("20b", name, engine, "h100-sxm", model=model))
    if engine == "llama.cpp":
        assert found[found.index("-m") + 1].endswith("-gguf-q8.gguf")
        assert len(found) == len(words(verdict_of("20b", name, engine, "h100-sxm")))
    else:
        assert model in found


WARNINGS = {
    "fallback": "expands to bf16",
    "experts": "stock load_in_4bit leaves the experts in bf16",
    "padding": "padding and copies are",
    "nvml": "by the larger figure this would fit",
    "needs": "the host needs",
    "must": "of free host memory; --host-memory checks it",
    "claim": "no 4-bit format squeezes the 120B into 24 GB",
    "unknown": "has MXFP4 kernels for",
}


def kinds(verdict: FitVerdict) -> set[str]:
    found = warnings(verdict)
    assert all(sentence.rstrip()[-1] in ".)" for sentence in found)
    return {kind for kind, text in WARNINGS.items() if any(text in sentence for sentence in found)}


@pytest.mark.parametrize(
    ("size", "name", "engine", "machine", "expected"),
    [
        ("20b", "gguf-q8", "llama.cpp", "h100-sxm", set()),
        ("120b", "gguf-q8", "llama.cpp", "h100-sxm", set()),
        ("20b", "mxfp4", "vllm", "h100-sxm", set()),
        ("20b", "mxfp4", "transformers", "4090", {"fallback"}),
        ("20b", "bf16", "transformers", "h100-sxm", set()),
        ("20b", "hybrid", "transformers", "4090", {"experts"}),
        ("20b", "nf4", "transformers", "4090", {"experts"}),
        ("120b", "mxfp4", "vllm", "8xb200", {"padding"}),
        ("120b", "mxfp4", "vllm", "2xb200", set()),
        ("120b", "mxfp4", "vllm", "4xh100-sxm", set()),
        ("120b", "bf16", "vllm", "8xb200", set()),
        ("120b", "gguf-q8", "llama.cpp", "4090", {"claim", "must"}),
        ("120b", "gguf-q8", "llama.cpp", "5090", {"claim", "must"}),
        ("120b", "mxfp4", "vllm", "4090", {"claim"}),
        ("120b", "gguf-q8", "llama.cpp", "2x3090", {"must"}),
        ("20b", "mxfp4", "vllm", "rx 7900 xtx", {"unknown"}),
        ("20b", "gguf-q8", "llama.cpp", "rx 7900 xtx", set()),
        ("20b", "mxfp4", "vllm", "24GB", set()),
    ],
)
def test_warnings(size: str, name: str, engine: str, machine: str, expected: set[str]) -> None:
    """Each warning stands where it must, and nowhere else."""
    assert kinds(verdict_of(size, name, engine, machine)) == expected


def test_bf16_fallback() -> None:
    """Silent expansion is said with its size, and that it is certain where no kernels are."""
    certain = warnings(verdict_of("20b", "mxfp4", "transformers", "m4max"))
    assert any("no MXFP4 kernels for" in warning and "39.0 GiB" in warning for warning in certain)
    possible = warnings(verdict_of("20b", "mxfp4", "transformers", "4090"))
    assert any("packages kernels and triton" in warning and "39.0 GiB" in warning for warning in possible)


@pytest.mark.parametrize(("size", "gib"), [("20b", 37.7), ("120b", 215.9)])
def test_skipped_experts(size: str, gib: float) -> None:
    """What stock bitsandbytes leaves is nearly all of bf16."""
    sentence = next(
        each for each in warnings(verdict_of(size, "nf4", "transformers", "b300")) if "load_in_4bit" in each
    )
    said = float(sentence.partition("takes ")[2].partition(" GiB")[0])
    assert said == pytest.approx(gib, rel=0.02)


def test_padding_share() -> None:
    """At eight GPUs padding and copies are a share of vLLM's weights that the sums give."""
    verdict = verdict_of("120b", "mxfp4", "vllm", "8xb200")
    share = 1 - verdict.candidate.plan.nbytes / verdict.estimate.weights.expected
    assert share >= 0.1
    assert any(f"tensor parallel 8 padding and copies are {share:.0%}" in warning for warning in warnings(verdict))


@pytest.mark.parametrize(("spare", "warned"), [(-1, False), (0, True), (0.5, True), (1, True), (1.01, False)])
def test_nvml_total(spare: float, warned: bool) -> None:
    """Where only the driver's larger total would hold the high figure, that is said."""
    device = find_device("4090")
    needed = verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm").estimate.total.high
    kept = GIB // 2
    usable = needed - int(spare * kept) if spare >= 0 else needed + 1
    sized = Machine(replace(device, usable_bytes=usable, nvml_bytes=usable + kept), 1, None)
    verdict = verdict_of("20b", "gguf-q8", "llama.cpp", sized)
    verdict = verdict if not verdict.workload.n_cpu_moe else fit(verdict.candidate, sized, Workload(), False)
    assert ("nvml" in kinds(verdict)) == warned


def test_no_nvml_total() -> None:
    """Where the driver's total is not known nothing is said of it."""
    device = find_device("4090")
    needed = verdict_of("20b", "gguf-q8", "llama.cpp", "h100-sxm").estimate.total.high
    sized = replace(device, usable_bytes=needed - 1, nvml_bytes=None)
    assert "nvml" not in kinds(verdict_of("20b", "gguf-q8", "llama.cpp", Machine(sized, 1, None)))


def test_host_memory() -> None:
    """What the host lacks is said where it is known, what it must have where it is not."""
    device = find_device("4090")
    small, large, unknown = (
        verdict_of("120b", "gguf-q8", "llama.cpp", Machine(device, 1, host)) for host in (16 * GIB, 96 * GIB, None)
    )
    assert (small.verdict, large.verdict, unknown.verdict) == ("no", "offload", "offload")
    assert not {"needs", "must"} & kinds(large)
    assert "must" in kinds(unknown)
    asked = verdict_of("120b", "gguf-q8", "llama.cpp", Machine(device, 1, 16 * GIB), n_cpu_moe=30)
    assert "needs" in kinds(asked)


def test_obstacle_is_said() -> None:
    """What stops an engine altogether is the first warning."""
    verdict = verdict_of("20b", "mxfp4", "vllm", "3x4090")
    assert warnings(verdict)[0] == f"{verdict.obstacle}."
    assert command(verdict) == ""
