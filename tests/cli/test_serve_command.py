"""`ossquant serve-command`: one line on stdout, all else on stderr, and only what fits and is loaded."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TRAINED, Done, export_ollama, run_cli, run_here
from ossquant.fit import ENGINE_FORMATS, candidate, fit
from ossquant.hardware import devices, find_machine
from ossquant.memory import Workload, parse_engine
from ossquant.spec import ModelSpec

GPUS = {"mlx": "m4max", "transformers": "h100-sxm"}


Serve = Callable[..., Done]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Serve:
    """Runs `ossquant serve-command` in this process."""

    def run(*arguments: str | Path | int) -> Done:
        return run_here(monkeypatch, capsys, "serve-command", *arguments)

    return run


@pytest.fixture
def gguf(trained: Path, tmp_path: Path) -> Path:
    export_ollama(trained, tmp_path / "My export", split_max_size=1_300_000)
    return tmp_path / "My export"


def line(done: Done) -> list[str]:
    """The words of the one line on stdout."""
    assert done.code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("\n")
    return shlex.split(done.stdout)


def value(done: Done, flag: str) -> str:
    found = line(done)
    assert found.count(flag) == 1
    return found[found.index(flag) + 1]


def refused(done: Done, code: int, *words: str) -> None:
    assert (done.code, done.stdout) == (code, ""), (done.code, done.stdout, done.stderr)
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


# what is served


@pytest.mark.parametrize("model", ["20b", "120b", "openai/gpt-oss-20b"])
@pytest.mark.parametrize("engine", ENGINE_FORMATS)
def test_published(serve: Serve, model: str, engine: str) -> None:
    """Every engine's server gets the published model in the form that it loads, on the loopback."""
    done = serve(model, "--engine", engine, "--gpu", GPUS.get(engine, "h200"), "--max-model-len", 4096)
    size = "120b" if model == "120b" else "20b"
    assert {
        "llama.cpp": f"ggml-org/gpt-oss-{size}-GGUF", "ollama": f"gpt-oss:{size}",
    }.get(engine, f"openai/gpt-oss-{size}") in line(done)  # fmt: skip
    assert "127.0.0.1" in done.stdout
    assert re.search(rf"^{size} in {re.escape(engine)}, \S+, on [^:]+: fits, [\d.]+ ", done.stderr), done.stderr
    assert re.search(r" of [\d.]+ GiB; 4,096 tokens, [\d,]+ fit$", done.stderr.splitlines()[0])
    assert re.search(r"^\S+ b?[\d.]+ or newer$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_published_gguf(serve: Serve, size: str) -> None:
    """The hub's GGUF is known by its name."""
    done = serve(f"ggml-org/gpt-oss-{size}-GGUF", "--gpu", "h200")
    assert line(done)[:3] == ["llama-server", "-hf", f"ggml-org/gpt-oss-{size}-GGUF"]
    ollama = serve(f"ggml-org/gpt-oss-{size}-GGUF", "--gpu", "h200", "--engine", "ollama")
    assert line(ollama)[-1] == f"hf.co/ggml-org/gpt-oss-{size}-GGUF"
    refused(serve(f"ggml-org/gpt-oss-{size}-GGUF", "--gpu", "h200", "--engine", "vllm"), 2, "vllm does not load",
            "llama.cpp or ollama", "--to mxfp4")  # fmt: skip


SERVED = {
    "mxfp4": {"vllm": "vllm", "mlx": "mlx_lm.server", "transformers": "transformers"},
    "bf16": {"vllm": "vllm", "transformers": "transformers"},
    "int4": {"vllm": "vllm"},
    "hybrid": {},
    "nf4": {},
    "fp4": {},
}


@pytest.mark.parametrize(("form", "engine"), [(form, engine) for form in SERVED for engine in ENGINE_FORMATS])
def test_checkpoints(serve: Serve, quantized: dict[str, Path], form: str, engine: str) -> None:
    """A folder is served by the engines whose servers load its form; others are refused with what does and helps."""
    folder = quantized[form]
    done = serve(folder, "--engine", engine, "--gpu", GPUS.get(engine, "4090"), "--max-model-len", 512)
    if engine in SERVED[form]:
        assert line(done)[0] == SERVED[form][engine]
        assert str(folder) in line(done)
        return
    target = "gguf" if engine in ("llama.cpp", "ollama") else "mxfp4"
    source = folder if form in ("mxfp4", "bf16") else "CHECKPOINT"
    refused(done, 2, f"{engine} does not load a checkpoint in {form}", f"ossquant export {source} OUTPUT --to {target}")
    if SERVED[form]:
        assert f"try: {' or '.join(SERVED[form])} does" in done.stderr
    else:
        assert "try: ossquant run or chat do" in done.stderr


@pytest.mark.parametrize("form", ["hybrid", "nf4", "fp4"])
def test_no_server(serve: Serve, quantized: dict[str, Path], form: str) -> None:
    """Without an engine, too, what only ossquant reads is refused."""
    done = serve(quantized[form], "--gpu", "4090")
    refused(done, 2, f"error: no server loads a checkpoint in {form}", "ossquant run or chat do", "--to mxfp4")


def test_gguf(serve: Serve, gguf: Path) -> None:
    """An export to GGUF goes to llama-server by its first file, named by the folder or by a file."""
    for source in (gguf, gguf / "tiny-mxfp4-q8_0-00002-of-00002.gguf"):
        done = serve(source, "--gpu", "4090")
        assert line(done)[0] == "llama-server"
        assert value(done, "-m") == str(gguf / "tiny-mxfp4-q8_0-00001-of-00002.gguf")
    for engine in ("vllm", "transformers", "mlx"):
        refused(serve(gguf, "--gpu", "m4max", "--engine", engine), 2, f"{engine} does not load", "llama.cpp or ollama",
                "from the published or bf16 checkpoint", "--to mxfp4")  # fmt: skip


def test_gguf_in_ollama(serve: Serve, gguf: Path) -> None:
    """Ollama makes a model of the folder's Modelfile; without one there is nothing to make it of."""
    done = serve(gguf, "--gpu", "4090", "--engine", "ollama", "--port", 12345)
    assert line(done)[-5:] == ["ollama", "create", "my-export", "-f", str(gguf / "Modelfile")]
    assert line(done).count("OLLAMA_HOST=127.0.0.1:12345") == 2
    assert "into its own store" in done.stderr
    (gguf / "Modelfile").unlink()
    refused(serve(gguf, "--gpu", "4090", "--engine", "ollama"), 2, "no Modelfile", "--engine llama.cpp")
    assert line(serve(gguf, "--gpu", "4090"))[0] == "llama-server"


def test_foreign_gguf(serve: Serve, tmp_path: Path) -> None:
    """Some other GGUF is refused with what to name instead."""
    (tmp_path / "other.gguf").touch()
    for source in (tmp_path, tmp_path / "other.gguf"):
        refused(
            serve(source, "--gpu", "4090"), 2, "other.gguf: no ossquant-manifest.json", "20b or a checkpoint folder"
        )


def test_best_engine(serve: Serve, quantized: dict[str, Path]) -> None:
    """Without --engine it is the one that fits best: vLLM on a card, mlx on a Mac, llama.cpp where all fit."""
    folder = quantized["mxfp4"]
    assert line(serve(folder, "--gpu", "4090"))[0] == "vllm"
    assert line(serve(folder, "--gpu", "m4max"))[0] == "mlx_lm.server"
    assert line(serve("20b", "--gpu", "4090"))[0] == "llama-server"
    assert line(serve("20b", "--gpu", "4090", "--kv-cache-dtype", "fp8"))[0] == "vllm"


# how it is sized


@pytest.mark.parametrize("engine", [engine for engine in ENGINE_FORMATS if engine != "transformers"])
@pytest.mark.parametrize("gpu", ["4090", "h100-sxm", "m4max", "12GB"])
def test_agrees_with_fit(serve: Serve, engine: str, gpu: str) -> None:
    """The line is the one that fit prints, and the verdict is fit's."""
    options = ("--gpu", gpu, "--engine", engine, "--max-model-len", 16384, "--json")
    done = serve("20b", *options)
    own = json.loads(done.stdout)
    fits = run_cli("fit", "--model", "20b", "--format", ENGINE_FORMATS[engine][0], *map(str, options))
    assert done.code == fits.returncode
    theirs = json.loads(fits.stdout)
    assert set(own) - set(theirs) == {"minimum_version", "notes"}
    assert {key: own[key] for key in theirs} == theirs


def test_json(serve: Serve) -> None:
    """One object: fit's, with the line, the oldest version and what to know; nothing on stderr."""
    done = serve("120b", "--gpu", "4090", "--host-memory", "64GB", "--json")
    answer = json.loads(done.stdout)
    assert (done.code, done.stderr, answer["schema_version"], answer["verdict"]) == (0, "", 1, "offload")
    assert answer["command"].startswith("llama-server ")
    assert f"--n-cpu-moe {answer['n_cpu_moe']} " in answer["command"]
    assert answer["minimum_version"] == "b6325"
    assert all(type(note) is str and note.endswith(".") for note in answer["notes"])
    lacking = serve("120b", "--gpu", "4090", "--host-memory", "32GB", "--json")
    assert (lacking.code, json.loads(lacking.stdout)["command"]) == (4, None)


def test_does_not_fit(serve: Serve) -> None:
    """What does not fit is exit code 4 without a line, and what would fit."""
    done = serve("20b", "--gpu", "16GB", "--engine", "vllm", "--max-model-len", 131072)
    refused(done, 4, ": no, ", "! no: it takes ")
    longest = re.search(r"--max-model-len (\d+) fits", done.stderr)
    found = serve("20b", "--gpu", "8GB", "--engine", "vllm")
    refused(found, 4, "what else fits: ossquant fit --model 20b")
    assert longest is None or serve("20b", "--gpu", "16GB", "--engine", "vllm", "--max-model-len", longest[1]).code == 0


def test_way_out(serve: Serve) -> None:
    """The context that is named instead fits, and one token more does not."""
    done = serve("20b", "--gpu", "4090", "--engine", "transformers")
    assert done.code == 4
    longest = int(re.search(r"--max-model-len (\d+) fits", done.stderr)[1])  # type: ignore[index]
    for length, verdict in ((longest, ": fits,"), (longest + 1, ": tight,")):
        again = serve("20b", "--gpu", "4090", "--engine", "transformers", "--max-model-len", length)
        assert (again.code, verdict in again.stderr) == (0, True)


def test_tight(serve: Serve) -> None:
    """Where only the expected figure fits the line is given, with what surely fits."""
    done = serve("20b", "--gpu", "4090", "--engine", "transformers", "--max-model-len", 4300)
    assert line(done)[0] == "transformers"
    assert re.search(r"^! tight: --max-model-len 42\d\d fits\.$", done.stderr, re.MULTILINE)


def test_transformers_prompts_at_once(serve: Serve) -> None:
    """transformers serve is sized for a prompt at once, which takes more than the chunks of `ossquant run`."""
    answer = json.loads(serve("20b", "--gpu", "h100-sxm", "--engine", "transformers", "--json").stdout)
    chosen = candidate("20b", ModelSpec.published("20b"), "mxfp4", parse_engine("transformers"))
    chunks, whole = (
        fit(chosen, find_machine("h100-sxm"), Workload(max_num_batched_tokens=tokens)) for tokens in (512, 8192)
    )
    assert answer["device_memory"]["total"]["expected"] == whole.estimate.total.expected > chunks.estimate.total.high
    longest = answer["longest_max_model_len"]
    again = Workload(max_model_len=longest, max_num_batched_tokens=longest)
    assert fit(chosen, find_machine("h100-sxm"), again).verdict == "fits"


def test_options(serve: Serve) -> None:
    """Context, sequences, cache type, address, and number of GPUs reach the line."""
    done = serve("20b", "--gpu", "4090", "--max-model-len", 4096, "--max-num-seqs", 4, "--kv-cache-dtype", "q8_0",
                 "--host", "192.0.2.1", "--port", 9000, "--engine", "llama.cpp")  # fmt: skip
    assert [value(done, flag) for flag in ("-c", "-np", "-ctk", "--host", "--port")] == [
        "16384", "4", "q8_0", "192.0.2.1", "9000"]  # fmt: skip
    assert "whoever reaches 192.0.2.1 reaches the server" in done.stderr
    done = serve("120b", "--gpu", "h100-sxm", "--gpus", 4, "--engine", "vllm", "--max-num-seqs", 64)
    assert [value(done, flag) for flag in ("--tensor-parallel-size", "--max-num-seqs")] == ["4", "64"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["7b", "--gpu", "4090"], ["no checkpoint at 7b"]),
        (["", "--gpu", "4090"], ["name is empty"]),
        (["x" * 5000, "--gpu", "4090"], ["no checkpoint"]),
        (["20b", "--gpu", "9090"], ["unknown device '9090'"]),
        (["20b", "--gpu", "4090", "--engine", "vlm"], ["unknown engine 'vlm'", "vllm"]),
        (["20b", "--gpu", "4090", "--engine", "vllm", "--kv-cache-dtype", "q8_0"], ["vllm: no kv_cache_dtype q8_0"]),
        (["20b", "--gpu", "4090", "--kv-cache-dtype", "nonsense"], ["nonsense"]),
        (["20b", "--gpu", "4090", "--max-model-len", "131073"], ["131072"]),
        (["20b", "--gpu", "4090", "--max-model-len", "0"], ["max_model_len"]),
        (["20b", "--gpu", "4090", "--max-num-seqs", "0"], ["max_num_seqs"]),
        (["20b", "--gpu", "4090", "--port", "0"], ["port"]),
        (["20b", "--gpu", "4090", "--port", "65536"], ["port"]),
        (["20b", "--gpu", "4090", "--host", ""], ["--host"]),
        (["20b", "--gpu", "4090", "--host", "a\nb"], ["--host"]),
        (["20b", "--gpu", "2x4090", "--gpus", "2"], ["say the number once"]),
        (["20b", "--gpu", "4090", "--host-memory", "much"], ["'much' is not a size"]),
        (["20b", "--gpu", "4090", "--nonsense"], ["--nonsense"]),
        ([], ["source"]),
    ],
    ids=lambda value: " ".join(value)[:40] or "-" if value and not value[0][:1].isalpha() else None,
)
def test_what_cannot_be_meant(serve: Serve, arguments: list[str], words: list[str]) -> None:
    """Wrong usage is one sentence and exit code 2."""
    refused(serve(*arguments), 2, *words)


@pytest.mark.parametrize("engine", ENGINE_FORMATS)
def test_every_device(serve: Serve, engine: str) -> None:
    """On every device there is one line that a shell splits into words, or none and exit code 4."""
    for device in devices():
        done = serve("20b", "--engine", engine, "--gpu", device.name)
        if done.code == 0:
            assert line(done)
        else:
            refused(done, 4, "! ")


# with the programs themselves, where they are installed


def test_shell(gguf: Path, tmp_path: Path) -> None:
    """A shell that evaluates the line starts the program with those words, whatever the folder is called."""
    folder = gguf.rename(tmp_path / "it's a; $(touch x) `y`")
    seen = tmp_path / "bin/llama-server"
    seen.parent.mkdir()
    seen.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\n')
    seen.chmod(0o755)
    program = shlex.quote(str(Path(sys.executable).parent / "ossquant"))
    script = f'eval "$({program} serve-command {shlex.quote(str(folder))} --gpu 4090 2>/dev/null)"'
    path = f"{seen.parent}:{os.environ['PATH']}"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env=os.environ | {"PATH": path})  # fmt: skip
    assert done.stdout.splitlines()[:2] == ["[-m]", f"[{folder / 'tiny-mxfp4-q8_0-00001-of-00002.gguf'}]"]
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_transformers_serve(serve: Serve) -> None:
    """The printed line starts transformers' server, which answers on that port of the loopback alone."""
    pytest.importorskip("fastapi")  # transformers[serving]
    pytest.importorskip("uvicorn")
    port = free_port()
    words = line(serve(TRAINED, "--engine", "transformers", "--gpu", "4090", "--max-model-len", 512, "--port", port))
    words[0] = str(Path(sys.executable).parent / words[0])
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            assert b"capital of France is Paris" in answer_of(port, str(TRAINED), server)
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer_of(port: int, model: str, server: "subprocess.Popen[bytes]") -> bytes:
    """Ask a chat server, once it listens, for two minutes at most."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 60}  # fmt: skip
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(120):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310 - loopback
                return bytes(reply.read())
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(1)
    raise AssertionError("it does not listen")
