"""`ossquant fit` as people type it: every option, what it prints, and how it ends."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Done, export_ollama, run_cli, run_here
from ossquant.cli import render
from ossquant.fit import ENGINE_FORMATS
from ossquant.hardware import devices
from ossquant.units import GIB

LOGS = sorted((ROOT / "tests/data/logs").glob("*.log"))
# lines to be copied are never broken
COPYABLE = re.compile(r"(\S+: )?(llama-server|vllm serve|OLLAMA_\S+|ossquant run|transformers serve|mlx_lm.server) ")
ENGINES = tuple(ENGINE_FORMATS)
ELSEWHERE = tuple(engine for engine in ENGINES if engine != "mlx")  # not on a Mac


Fit = Callable[..., Done]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Runs `ossquant fit` in this process, 80 columns wide or as wide as asked."""

    def run(*arguments: str | Path, width: int = 80) -> Done:
        monkeypatch.setattr(render.out, "width", width)
        return run_here(monkeypatch, capsys, "fit", *arguments)

    return run


def answer(done: Done) -> dict[str, Any]:
    assert done.code in (0, 4), done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


def refused(done: Done, *words: str) -> None:
    """Exit code 2, nothing on stdout, one sentence and a hint."""
    assert (done.code, done.stdout) == (2, ""), (done.code, done.stdout[:300], done.stderr)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith(("Usage:", "Try '"))]
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  try: ")), done.stderr
    assert lines[0].lower().startswith("error: ")
    assert all(word in done.stderr for word in words), done.stderr


# the overview


def test_overview(fit: Fit) -> None:
    """One screen for both models: every engine and format, a bar, context, tokens/s, and a line to type for each."""
    done = fit("--gpu", "4090")
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    assert "GeForce RTX 4090" in lines[0]
    assert "24564 MiB" in lines[0]
    rows = [line.split() for line in lines if re.match(r"(20b|120b) ", line)]
    assert {(row[0], row[1]) for row in rows} == {(model, engine) for model in ("20b", "120b") for engine in ELSEWHERE}
    assert all(re.search(r"[█░]{5,}[█░+]", line) for line in lines if re.match(r"(20b|120b) ", line))
    assert "131072" in done.stdout
    assert all(re.fullmatch(r"\d+-\d+|-", row[-1]) for row in rows)
    assert any(re.fullmatch(r"20b: llama-server -hf \S+ -c 8192 .*", line) for line in lines)
    assert any(re.fullmatch(r"120b: llama-server -hf \S+ -c 8192 .*--n-cpu-moe \d+ .*", line) for line in lines)
    assert "no 4-bit format squeezes the 120B into 24 GB" in done.stderr


@pytest.mark.parametrize(("arguments", "shown"), [
    (["m4max"], True), (["4090"], False), (["4090", "--engine", "mlx"], True), (["--compare", "4090", "m4max"], True),
    (["--compare", "4090", "5090"], False), (["--cheapest"], False),
])  # fmt: skip
def test_mlx(fit: Fit, arguments: list[str], shown: bool) -> None:
    """mlx is shown where a Mac is asked about, or where it is named."""
    done = fit(*arguments)
    assert (re.search(r"\bmlx\b", done.stdout) is not None) == shown


def test_both_units(fit: Fit) -> None:
    """GiB and GB stand together, and say the same."""
    for line in fit("--gpu", "4090").stdout.splitlines():
        if found := re.search(r"[█░+]{6} +([\d.]+) +([\d.]+) ", line):
            assert abs(float(found[1]) * GIB / 1e9 - float(found[2])) <= 0.11


def test_one_combination(fit: Fit) -> None:
    """A model, an engine and a format: each term low, expected, high and on what it rests."""
    done = fit("4090", "--model", "20b", "--engine", "llama.cpp", "--format", "gguf-q8")
    assert done.code == 0
    for term in ("weights", "KV cache", "compute buffers", "driver, runtime", "total"):
        assert re.search(rf"^{term} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +(exact|measured|heuristic)", done.stdout, re.M)
    for words in ("longest context", "most sequences", "tokens/s", "USD an hour", "\nllama-server -hf ggml-org/"):
        assert words in done.stdout


def test_nothing_fits(fit: Fit) -> None:
    """Exit code 4 and what it would take."""
    done = fit("8GB", "--model", "120b", "--engine", "vllm")
    assert (done.code, "it takes" in done.stdout) == (4, True)
    assert fit("8GB", "--model", "120b", "--engine", "vllm", "--json").code == 4
    assert fit("--compare", "8GB", "10GB", "--model", "120b", "--engine", "vllm").code == 4


# devices


@pytest.mark.parametrize(
    ("arguments", "name", "count"),
    [
        (["4090"], "GeForce RTX 4090", 1),
        (["--gpu", "rtx 4090"], "GeForce RTX 4090", 1),
        (["h100-nvl"], "H100 NVL 94GB", 1),
        (["4xA100-80G"], "A100 80GB SXM", 4),
        (["--gpu", "4xA100-80G"], "A100 80GB SXM", 4),
        (["4090", "--gpus", "4"], "GeForce RTX 4090", 4),
        (["24GB"], "24GB", 1),
        (["2x24GB"], "24GB", 2),
        (["m4 max 64gb"], "Apple M4 Max 64GB", 1),
    ],
)
def test_devices(fit: Fit, arguments: list[str], name: str, count: int) -> None:
    """Names as people type them, alone or behind --gpu, and plain sizes."""
    device = answer(fit(*arguments, "--model", "20b", "--engine", "vllm", "--json"))["device"]
    assert (device["count"], name.split()[0] in device["name"]) == (count, True)
    if name.startswith(("GeForce", "A100", "24GB")):
        assert device["name"] == name


def test_a_plain_size_is_all_usable(fit: Fit) -> None:
    """24GB are 24 * 10**9 bytes."""
    device = answer(fit("24GB", "--model", "20b", "--engine", "llama.cpp", "--json"))["device"]
    assert (device["memory"], device["usable"]) == (24 * 10**9, 24 * 10**9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "a100"], ["more than one", "A100 40GB", "A100 80GB PCIe", "A100 80GB SXM"]),
        (["9090"], ["unknown device '9090'", "did you mean"]),
        (["4090x"], ["GeForce RTX 4090"]),
        (["--gpu", "auto"], ["no GPU found on this machine", "--gpu 4090"]),
        ([], ["no GPU found on this machine"]),
        ([""], ["unknown device ''"]),
        ([" "], ["unknown device"]),
        (["0x4090"], ["0 devices"]),
        (["99999999x4090"], ["1 to 1024"]),
        (["4090\x1b[2J"], ["unknown device"]),
        (["9" * 5000], ["unknown device"]),
        (["0GB"], ["unknown device '0GB'"]),
        (["1e9GB"], ["unknown device"]),
        (["--gpu", "-5GB"], ["unknown device '-5GB'"]),
        (["4090", "5090"], ["several GPUs", "--compare"]),
        (["4090", "--gpu", "5090"], ["several GPUs"]),
        (["4090", "--gpus", "0"], ["--gpus"]),
        (["4090", "--gpus", "-1"], ["--gpus"]),
        (["4090", "--gpus", "99999"], ["1024"]),
        (["2x4090", "--gpus", "2"], ["say the number once"]),
        (["--compare"], ["--compare without GPUs"]),
        (["--compare", "4090", "9090"], ["unknown device '9090'"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_what_is_no_device(fit: Fit, arguments: list[str], words: list[str]) -> None:
    """An ambiguous name lists the candidates, an unknown one the nearest; counts and sizes have bounds."""
    if "auto" in arguments or not arguments:
        _skip_with_gpu()
    refused(fit(*arguments), *words)


def _skip_with_gpu() -> None:
    if Path("/dev/nvidia0").exists() or Path("/dev/dri").exists() or sys.platform == "darwin":
        pytest.skip("this machine has a GPU")


# options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "vllm", "--ubatch", "512"], ["vllm has no ubatch"]),
        (["--engine", "vllm", "--n-cpu-moe", "4"], ["vllm has no n_cpu_moe"]),
        (["--engine", "vllm", "--kv-unified"], ["vllm has no kv_unified"]),
        (["--engine", "vllm", "--swa-full"], ["vllm has no swa_full"]),
        (["--engine", "vllm", "--kv-cache-dtype", "q8_0"], ["vllm has no kv_cache_dtype q8_0"]),
        (["--engine", "llama.cpp", "--kv-cache-dtype", "fp8"], ["llama.cpp has no kv_cache_dtype fp8"]),
        (["--engine", "llama.cpp", "--tp", "2"], ["llama.cpp has no tensor_parallel"]),
        (["--engine", "llama.cpp", "--gpu-memory-utilization", "0.5"], ["llama.cpp has no gpu_memory_utilization"]),
        (["--engine", "ollama", "--max-num-batched-tokens", "64"], ["ollama has no max_num_batched_tokens"]),
        (["--engine", "ollama", "--n-cpu-moe", "3"], ["ollama has no n_cpu_moe"]),
        (["--engine", "transformers", "--ubatch", "3"], ["transformers has no ubatch"]),
        (["--engine", "vlm"], ["unknown engine 'vlm'", "did you mean 'vllm'"]),
        (["--engine", ""], ["engine"]),
        (["--engine-version", "0.11"], ["--engine-version without --engine"]),
        (["--engine", "vllm", "--engine-version", "new"], ["'new' is no version of vllm"]),
        (["--engine", "vllm", "--engine-version", "9" * 40], ["is no version of vllm"]),
        (["--format", "int3"], ["unknown format 'int3'", "int4"]),
        (["--format", ""], ["format"]),
        (["--engine", "vllm", "--format", "gguf-q8"], ["vllm does not load gguf-q8", "mxfp4"]),
        (["--model", "7b"], ["7b"]),
        (["--model", ""], ["the model's name is empty"]),
        (["--model", "a\0b"], ["no checkpoint"]),
        (["--model", "x" * 5000], ["no checkpoint"]),
        (["--kv-cache-dtype", "nonsense"], ["nonsense"]),
        (["--engine", "vllm", "--kv-cache-dtype", "nonsense"], ["nonsense"]),
        (["--max-model-len", "0"], ["max_model_len cannot be 0"]),
        (["--max-model-len", "-1"], ["max_model_len cannot be -1"]),
        (["--max-model-len", "131073"], ["131072"]),
        (["--max-model-len", "9" * 30], ["max_model_len"]),
        (["--max-model-len", "many"], ["many"]),
        (["--max-num-seqs", "0"], ["max_num_seqs cannot be 0"]),
        (["--max-num-seqs", "9" * 30], ["max_num_seqs"]),
        (["--ubatch", "0"], ["ubatch"]),
        (["--ubatch", "-5"], ["ubatch"]),
        (["--max-num-batched-tokens", "0"], ["max_num_batched_tokens"]),
        (["--gpu-memory-utilization", "0"], ["gpu_memory_utilization"]),
        (["--gpu-memory-utilization", "1.01"], ["gpu_memory_utilization"]),
        (["--gpu-memory-utilization", "nan"], ["gpu_memory_utilization"]),
        (["--tp", "0"], ["tensor_parallel"]),
        (["--tp", "99999"], ["tensor_parallel"]),
        (["--n-cpu-moe", "-1"], ["n_cpu_moe"]),
        (["--model", "20b", "--n-cpu-moe", "25"], ["0 to 24"]),
        (["--host-memory", "nonsense"], ["'nonsense' is not a size"]),
        (["--host-memory", "-1"], ["'-1' is not a size"]),
        (["--nonsense"], ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value)[:50] if value[0].startswith("--") else "",
)
def test_what_cannot_be_meant(fit: Fit, options: list[str], words: list[str]) -> None:
    """An option that the engine does not have, an unknown word, a number out of bounds: one sentence, never ignored."""
    refused(fit("4090", *options), *words)


def test_an_option_asks_for_its_engines(fit: Fit) -> None:
    """Over several engines an option leaves those that have it."""
    plain = answer(fit("4090", "--model", "20b", "--json"))
    with_fp8 = answer(fit("4090", "--model", "20b", "--kv-cache-dtype", "fp8", "--json"))
    assert with_fp8["engine"] == "vllm" and "alternatives" not in with_fp8
    whole = next(row for row in plain["alternatives"] if row["engine"] == "vllm")["device_memory"]["kv_cache"]
    assert with_fp8["device_memory"]["kv_cache"]["expected"] * 2 == whole["expected"]
    with_ubatch = answer(fit("4090", "--model", "20b", "--ubatch", "2048", "--json"))
    assert {row["engine"] for row in [with_ubatch, *with_ubatch["alternatives"]]} == {"llama.cpp", "ollama"}


ONE = ("4090", "--model", "20b", "--engine")


@pytest.mark.parametrize(
    ("engine", "option", "term", "direction"),
    [
        ("llama.cpp", ["--max-model-len", "65536"], "kv_cache", 1),
        ("llama.cpp", ["--max-num-seqs", "4"], "kv_cache", 1),
        ("llama.cpp", ["--kv-cache-dtype", "q8_0"], "kv_cache", -1),
        ("llama.cpp", ["--swa-full"], "kv_cache", 1),
        ("llama.cpp", ["--ubatch", "2048"], "compute", 1),
        ("llama.cpp", ["--n-cpu-moe", "8"], "weights", -1),
        ("llama.cpp", ["--gpus", "2"], "overhead", 1),
        ("llama.cpp", ["--engine-version", "b10000"], "compute", -1),
        ("ollama", ["--max-num-seqs", "4"], "kv_cache", 1),
        ("vllm", ["--max-num-batched-tokens", "16384"], "kv_cache", 1),
        ("vllm", ["--max-num-seqs", "512"], "compute", 1),
        ("vllm", ["--gpus", "2", "--tp", "2"], "overhead", 1),
        ("vllm", ["--engine-version", "0.11.0"], "compute", 1),
        ("vllm", ["--kv-cache-dtype", "fp8"], "kv_cache", -1),
        ("transformers", ["--max-num-batched-tokens", "2048"], "compute", 1),
        ("transformers", ["--format", "bf16"], "weights", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_count(fit: Fit, engine: str, option: list[str], term: str, direction: int) -> None:
    """Every option changes what it is about, in its direction."""
    form = [] if "--format" in option else ["--format", ENGINE_FORMATS[engine][0]]
    before = answer(fit(*ONE, engine, "--format", ENGINE_FORMATS[engine][0], "--json"))["device_memory"][term]
    after = answer(fit(*ONE, engine, *form, *option, "--json"))["device_memory"][term]
    assert (after["expected"] - before["expected"]) * direction > 0


def test_kv_unified_shares_the_context(fit: Fit) -> None:
    """Four sequences with --kv-unified take less than four of their own, and the command says -kvu."""
    four = (*ONE, "llama.cpp", "--format", "gguf-q8", "--max-num-seqs", "4", "--json")
    own, shared = answer(fit(*four)), answer(fit(*four, "--kv-unified"))
    assert shared["device_memory"]["kv_cache"]["expected"] < own["device_memory"]["kv_cache"]["expected"]
    assert " -c 32768 -np 4 " in own["command"]
    assert " -kvu " in shared["command"]
    assert " -c 8192 -np 4 " in shared["command"]


def test_gpu_memory_utilization_is_what_is_usable(fit: Fit) -> None:
    """vLLM has its share of the card, and the command says so."""
    half = answer(fit(*ONE, "vllm", "--format", "mxfp4", "--gpu-memory-utilization", "0.75", "--json"))
    whole = answer(fit(*ONE, "vllm", "--format", "mxfp4", "--gpu-memory-utilization", "1", "--json"))
    assert abs(half["device"]["usable"] / whole["device"]["usable"] - 0.75) < 1e-6
    assert "--gpu-memory-utilization 0.75" in half["command"]


@pytest.mark.parametrize(
    ("split", "says"),
    [(["--gpus", "3"], "3 GPUs"), (["--gpus", "16", "--tp", "3"], "3 GPUs"), (["--tp", "2"], "2 GPUs")],
)
def test_what_vllm_cannot_split(fit: Fit, split: list[str], says: str) -> None:
    """Three GPUs do not divide the heads, and one GPU is not two."""
    done = fit(*ONE, "vllm", *split, "--json")
    value = answer(done)
    assert (done.code, value["verdict"], value["command"]) == (4, "no", None)
    assert any(says in warning for warning in value["warnings"])


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16, 32, 64])
def test_tensor_parallel(fit: Fit, tp: int) -> None:
    """The command carries the number of GPUs."""
    value = answer(fit("h100-sxm", "--gpus", tp, "--model", "120b", "--engine", "vllm", "--format", "mxfp4", "--json"))
    assert (f"--tensor-parallel-size {tp}" in value["command"]) == (tp > 1)
    assert value["device"]["count"] == tp


def test_offload_is_planned(fit: Fit) -> None:
    """The 120b on 24 GB keeps experts of some layers on the host: as few as fit, and fewer on a larger card."""
    rows = [answer(fit(gpu, "--model", "120b", "--engine", "llama.cpp", "--format", "gguf-q8", "--json"))
            for gpu in ("12GB", "4090", "5090")]  # fmt: skip
    moved = [row["n_cpu_moe"] for row in rows]
    assert [row["verdict"] for row in rows] == ["offload"] * 3
    assert 36 >= moved[0] > moved[1] > moved[2] > 0
    assert all(f"--n-cpu-moe {row['n_cpu_moe']}" in row["command"] for row in rows)
    fewer = fit("4090", "--model", "120b", "--engine", "llama.cpp", "--n-cpu-moe", moved[1] - 1, "--format", "gguf-q8")
    assert not fewer.stdout.splitlines()[-1].startswith("offload")


def test_too_little_host_memory(fit: Fit) -> None:
    """Offload needs the host: with too little it is refused, and the sentence says how much is needed."""
    question = ("4090", "--model", "120b", "--engine", "llama.cpp", "--format", "gguf-q8", "--host-memory")
    assert fit(*question, "64GB").code == 0
    done = fit(*question, "32GB")
    assert done.code == 4
    assert re.search(r"needs \d+\.\d+ GB .* of host memory, and 32.00 GB .* are free", done.stderr + done.stdout), (
        done.stdout + done.stderr
    )


# --compare, --cheapest


def test_compare(fit: Fit) -> None:
    """GPUs side by side; a name that several share is all of them."""
    done = fit("--compare", "4090", "5090", "a100", "--model", "20b")
    assert done.code == 0
    assert re.findall(r"^([A-E]): (?:\d+ x )?([^,\n]+)", done.stdout, re.M) == [
        ("A", "GeForce RTX 4090"), ("B", "GeForce RTX 5090"), ("C", "A100 40GB"), ("D", "A100 80GB PCIe"),
        ("E", "A100 80GB SXM"),
    ]  # fmt: skip
    found = answer(fit("--compare", "4090", "2x5090", "a100", "--model", "20b", "--engine", "vllm", "--json"))
    names = [(row["device"]["name"], row["device"]["count"]) for row in found["comparison"] if row["format"] == "mxfp4"]
    assert names == [("GeForce RTX 4090", 1), ("GeForce RTX 5090", 2), ("A100 40GB", 1), ("A100 80GB PCIe", 1),
                     ("A100 80GB SXM", 1)]  # fmt: skip


def test_cheapest(fit: Fit) -> None:
    """What carries a workload, cheapest first, each at a rent whose source and date are said."""
    done = fit("--cheapest", "--model", "120b", "--max-model-len", "131072")
    assert done.code == 0
    assert re.search(r"rents: .*20\d\d-\d\d-\d\d", done.stderr)
    rows = answer(fit("--cheapest", "--model", "120b", "--json"))["cheapest"]
    rents = [row["usd_per_hour"] for row in rows]
    assert rents == sorted(rents)
    assert all(row["verdict"] == "fits" and row["usd_per_million_tokens"]["low"] > 0 for row in rows)
    for row in rows:
        check_object(row)


def test_cheapest_has_none(fit: Fit) -> None:
    """A workload that no rented GPU carries ends with 4."""
    question = ("--cheapest", "--model", "120b", "--engine", "transformers", "--max-model-len", "131072",
                "--max-num-seqs", "500")  # fmt: skip
    assert fit(*question).code == 4
    assert answer(fit(*question, "--json")) == {"schema_version": 1, "cheapest": []}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cheapest", "4090"],
        ["--cheapest", "--gpu", "4090"],
        ["--cheapest", "--compare", "4090"],
        ["--compare", "4090", "--gpu", "5090"],
        ["--log", str(LOGS[0]), "--compare", "4090"],
        ["--log", str(LOGS[0]), "--cheapest"],
        ["--log", str(LOGS[0]), "--engine", "vllm"],
        ["--log", str(LOGS[0]), "4090", "5090"],
    ],
    ids=lambda value: " ".join(Path(word).name for word in value),
)
def test_nothing_is_ignored(fit: Fit, arguments: list[str]) -> None:
    """What does not go together is refused, not left out of account."""
    refused(fit(*arguments))


# --log


def _log_options(path: Path) -> list[str]:
    return ["--log", str(path), *(["--model", "120b"] if path.name == "vllm_h100_120b.log" else [])]


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_log(fit: Fit, path: Path) -> None:
    """Every log is shown term by term: predicted, measured, and how far off."""
    done = fit(*_log_options(path))
    assert done.code == 0, done.stderr
    assert re.search(r"^weights +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[+-][\d.]+% +(exact|measured)", done.stdout, re.M)
    value = answer(fit(*_log_options(path), "--json"))
    assert set(value) == {"schema_version", "engine", "engine_version", "model", "format", "device", "terms", "assumed"}
    for term in value["terms"].values():
        assert set(term["predicted"]) == {"low", "expected", "high", "basis"}
        assert type(term["measured"]) is int
        if term["measured"] > 0:
            assert term["error"] == pytest.approx(term["predicted"]["expected"] / term["measured"] - 1)


def test_log_with_a_gpu(fit: Fit) -> None:
    """With the GPU named, what vLLM left for the cache is held against the prediction too."""
    options = _log_options(ROOT / "tests/data/logs/vllm_h100_120b.log")
    assert "say --gpu" in fit(*options).stderr
    assert "available_kv_cache" in answer(fit(*options, "--gpu", "h100-sxm", "--json"))["terms"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no start-up log"),
        (b"\0\xff\xfe" * 1000, "no start-up log"),
        (b"hello\n" * 1000, "no start-up log"),
        (b"load_tensors: nothing more\n", "states no memory"),
        (b"INFO Model loading took 13.7 GiB\n", "does not say which model"),
        (b"INFO Model loading took 99999999999999999999 GiB\n", "memory"),
    ],
)
def test_bad_logs(fit: Fit, text: bytes, words: str, tmp_path: Path) -> None:
    """A file that is no log, says too little or nonsense ends with 2."""
    path = tmp_path / "server.log"
    path.write_bytes(text)
    refused(fit("--log", path), words)


@pytest.mark.parametrize("path", ["absent.log", ".", "x" * 5000, "/dev/zero", "/proc/self/mem"])
def test_no_log(fit: Fit, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not a file to read ends with 2."""
    monkeypatch.chdir(tmp_path)
    refused(fit("--log", path))


# --json


KEYS = {
    "model", "engine", "format", "device", "workload", "verdict", "device_memory", "host_memory", "n_cpu_moe",
    "headroom", "longest_max_model_len", "most_num_seqs", "decode_tokens_per_second", "usd_per_hour", "command",
    "warnings",
}  # fmt: skip
TERMS = ("weights", "kv_cache", "compute", "overhead")


def check_object(row: dict[str, Any]) -> None:
    """One verdict: its keys, their types, sums, and a verdict that agrees with them."""
    assert set(row) - {"schema_version", "alternatives", "usd_per_million_tokens"} == KEYS
    assert [type(row[key]) for key in ("model", "engine", "format", "verdict")] == [str] * 4
    device, memory, host = row["device"], row["device_memory"], row["host_memory"]
    assert set(device) == {"name", "count", "memory", "usable"}
    assert [type(device[key]) for key in ("name", "count", "memory", "usable")] == [str, int, int, int]
    assert set(row["workload"]) == {"max_model_len", "max_num_seqs", "kv_cache_dtype"}
    assert [type(value) for value in row["workload"].values()] == [int, int, str]
    assert set(memory) == {*TERMS, "total"}
    for term in memory.values():
        assert set(term) == {"low", "expected", "high", "basis"}
        assert all(type(term[bound]) is int for bound in ("low", "expected", "high"))
        assert 0 <= term["low"] <= term["expected"] <= term["high"]
        assert term["basis"] in ("exact", "measured", "heuristic")
        assert term["basis"] != "exact" or term["low"] == term["high"]
    for bound in ("low", "expected", "high"):
        assert memory["total"][bound] == sum(memory[term][bound] for term in TERMS)
    assert set(host) == {"weights", "total"}
    assert 0 <= host["weights"] <= host["total"]
    assert row["headroom"] == device["usable"] - memory["total"]["expected"]
    assert (row["n_cpu_moe"] is None) == (row["engine"] not in ("llama.cpp", "transformers"))
    assert 0 <= row["longest_max_model_len"] <= 131072
    assert type(row["most_num_seqs"]) is int
    if row["decode_tokens_per_second"]:
        assert 0 < row["decode_tokens_per_second"]["low"] <= row["decode_tokens_per_second"]["high"]
    assert row["usd_per_hour"] is None or row["usd_per_hour"] > 0
    assert (row["command"] is None) == (row["verdict"] == "no")
    assert all(type(warning) is str and warning.endswith(".") for warning in row["warnings"])
    if row["verdict"] == "tight":
        assert memory["total"]["expected"] <= device["usable"] < memory["total"]["high"]
    elif row["verdict"] != "no":
        assert row["verdict"] in ("fits", "offload")
        assert memory["total"]["high"] <= device["usable"]
    if row["verdict"] in ("fits", "offload"):
        assert row["longest_max_model_len"] >= row["workload"]["max_model_len"]
        assert row["most_num_seqs"] >= row["workload"]["max_num_seqs"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["20b", "120b"])
def test_json_of_one(fit: Fit, engine: str, model: str) -> None:
    """One combination is one object with the documented keys, on stdout alone."""
    done = fit("4090", "--model", model, "--engine", engine, "--format", ENGINE_FORMATS[engine][0], "--json")
    value = answer(done)
    assert set(value) == KEYS | {"schema_version"}
    assert value["schema_version"] == 1
    check_object(value)
    assert done.stderr == ""
    assert (done.code == 4) == (value["verdict"] == "no")


def test_json_of_several(fit: Fit) -> None:
    """The best is the object itself, every other one stands under alternatives."""
    value = answer(fit("4090", "--json"))
    assert set(value) == KEYS | {"schema_version", "alternatives"}
    rows = [value, *value["alternatives"]]
    assert {(row["model"], row["engine"]) for row in rows} == {(m, e) for m in ("20b", "120b") for e in ELSEWHERE}
    for row in rows:
        check_object(row)
    assert value["verdict"] == "fits"


@pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)
def test_every_device(fit: Fit, device: Any) -> None:
    """Every device of the table is judged."""
    value = answer(fit(device.name, "--json"))
    for row in [value, *value["alternatives"]]:
        assert row["device"]["name"] == device.name
        check_object(row)


# form


def check_form(done: Done, width: int) -> None:
    """Nothing cut, nothing too wide but what is to be copied, no colours, no line of blanks."""
    assert done.code in (0, 4), done.stderr
    assert "…" not in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    for line in done.stdout.splitlines():
        assert line == line.rstrip(), repr(line)
        assert len(line) <= width or COPYABLE.match(line), line


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ["4090"],
        ["8xh100-sxm", "--max-num-seqs", "256", "--max-model-len", "131072"],
        ["1TB"],
        ["4090", "--model", "120b", "--engine", "llama.cpp", "--format", "gguf-q8"],
        ["8xb200", "--model", "120b", "--engine", "vllm", "--format", "mxfp4", "--max-num-seqs", "4096"],
        ["--compare", "4090", "5090", "a100"],
        ["--compare", "3090", "4090", "5090", "l4", "l40s", "a6000"],
        ["--cheapest"],
        ["--cheapest", "--model", "120b", "--max-num-seqs", "64"],
        *(_log_options(path) for path in LOGS),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else None,
)
def test_form(fit: Fit, arguments: list[str], width: int) -> None:
    """At 80 and 120 columns the same facts stand there whole."""
    check_form(fit(*arguments, width=width), width)


def test_form_of_every_device(fit: Fit) -> None:
    """No device's name or memory is too long for 80 columns."""
    for device in devices():
        check_form(fit(device.name), 80)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("engine", [[], ["--engine", "transformers"]])
def test_form_of_a_folder(fit: Fit, quantized: dict[str, Path], engine: list[str], width: int) -> None:
    """A long path cuts nothing off the figures."""
    check_form(fit("4090", "--model", quantized["hybrid"], *engine, width=width), width)


def test_pipes() -> None:
    """A pipe gets plain text, no escapes, and the reader may leave after a line."""
    done = run_cli("fit", "4090", env=os.environ | {"COLUMNS": "80", "TERM": "xterm-256color"})
    check_form(Done(done.returncode, done.stdout, done.stderr), 80)
    program = Path(sys.executable).parent / "ossquant"
    head = subprocess.run(
        ["/bin/sh", "-c", f"'{program}' fit 4090 | head -1"], capture_output=True, text=True, check=True
    )
    assert "RTX 4090" in head.stdout
    assert "Traceback" not in head.stderr


def test_ascii() -> None:
    """Where the terminal knows ASCII only, bars are drawn in it."""
    done = run_cli("fit", "4090", env=os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout.isascii(), done.stderr.isascii()) == (0, True, True)
    assert "###..." in done.stdout


def on_terminal(*arguments: str, **env: str) -> str:
    """What a terminal is sent."""
    leader, follower = pty.openpty()
    program = str(Path(sys.executable).parent / "ossquant")
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "CI")}
    settings = {"TERM": "xterm-256color", "COLUMNS": "80"} | env
    with subprocess.Popen([program, *arguments], stdout=follower, stderr=follower, env=clean | settings) as process:
        os.close(follower)
        sent = b""
        while True:
            try:
                block = os.read(leader, 65536)
            except OSError:  # Linux says so when the last writer has gone
                break
            if not block:
                break
            sent += block
    os.close(leader)
    assert process.returncode == 0
    return sent.decode()


def test_no_color() -> None:
    """A terminal gets colours, and none with NO_COLOR."""
    colour = re.compile(r"\x1b\[(3\d|9\d|38)[;m\d]*")
    assert colour.search(on_terminal("fit", "4090"))
    assert not colour.search(on_terminal("fit", "4090", NO_COLOR="1"))
    assert "\x1b" not in on_terminal("fit", "4090", "--json")


def test_gguf_without_a_modelfile(fit: Fit, trained: Path, tmp_path: Path) -> None:
    """A GGUF export is judged for Ollama only where the Modelfile lies that its line names."""
    export_ollama(trained, tmp_path / "out")
    assert "ollama create" in fit("4090", "--model", tmp_path / "out", "--engine", "ollama").stdout
    (tmp_path / "out/Modelfile").unlink()
    overview = fit("4090", "--model", tmp_path / "out")
    assert (overview.code, "ollama" in overview.stdout) == (0, False)
    refused = fit("4090", "--model", tmp_path / "out", "--engine", "ollama")
    assert refused.code == 2
    assert "no Modelfile for Ollama" in refused.stderr and "--to ollama" in refused.stderr
