"""How fast commands start, and what they load for it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import export_ollama, run_cli
from made_documents import loaded_result

RUNTIME = {"torch", "transformers", "bitsandbytes", "accelerate"}
CODEC = {"numpy", "numba", "rich", "safetensors", "huggingface_hub"}
NETWORK = {"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "ssl"}
LISTED = """
import json, sys
from ossquant.cli import main
try:
    main()
finally:
    print()
    print(json.dumps(sorted(sys.modules)))
"""
# refuses every connection and every look-up of a host
DEAF = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
"""
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Absent())
from ossquant.cli import main
main()
"""


def cpu_seconds(*arguments: str) -> float:
    """CPU time of a command, system and user."""
    program = str(Path(sys.executable).parent / "ossquant")
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def slowness() -> float:
    """How much longer this machine takes just now than the one that the limits are for; 1.0 if it does not."""
    started = time.process_time()
    sum(range(5_000_000))
    [str(number) for number in range(300_000)]
    return max(1.0, (time.process_time() - started) / 0.10)


def reaches(limit: float, *arguments: str) -> bool:
    """Whether a command stays within limit seconds of CPU once in ten times; a busy machine counts too many."""
    return any(cpu_seconds(*arguments) <= limit * slowness() for _ in range(10))


def modules(*arguments: str | Path) -> set[str]:
    """The packages that a command has loaded when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", LISTED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_help_is_fast() -> None:
    """`ossquant --help` takes no more than 0.15 s of CPU."""
    assert reaches(0.15, "--help")


def test_fit_is_fast() -> None:
    """`ossquant fit --gpu 4090` takes no more than 0.30 s of CPU: both models, every engine and format."""
    assert reaches(0.30, "fit", "--gpu", "4090")


@pytest.mark.parametrize(
    "command",
    ["fit", "quantize", "export", "verify", "serve-command", "merge", "run", "chat", "warmup", "bench", "eval", ""],
)
def test_help_is_cold(command: str) -> None:
    """Help loads neither the runtime nor numpy, numba or rich."""
    assert not modules(*command.split(), "--help") & (RUNTIME | CODEC)


@pytest.mark.parametrize(
    "options",
    [["--gpu", "4090"], ["--gpu", "4090", "--json"], ["--compare", "4090", "a100"], ["--cheapest"]],
    ids=lambda options: " ".join(options),
)
def test_fit_is_cold(options: list[str]) -> None:
    """`fit` draws a table, and loads no more than that takes: no runtime, no codec, nothing of a network."""
    assert not modules("fit", *options) & (RUNTIME | NETWORK | CODEC - {"rich"})


def test_compare_and_report_are_cold(tmp_path: Path) -> None:
    """Two results are compared and reported on without numpy, torch or a network."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps(loaded_result().to_json()))
    (tmp_path / "g.toml").write_text("[ttft]\nmax = 1\n")
    for command in (["compare", path, path, "--gate", tmp_path / "g.toml"], ["report", path, "--html", tmp_path / "p"]):
        assert not modules(*command) & (RUNTIME | NETWORK | CODEC - {"rich"} | {"scipy"})


@pytest.mark.parametrize(
    "options",
    [["fit", "4090"], ["fit", "--compare", "4090"], ["fit", "4090", "--model", "tiny"],
     ["serve-command", "20b", "--gpu", "4090"], ["serve-command", "tiny", "--gpu", "4090"]],
    ids=" ".join,
)  # fmt: skip
def test_fit_asks_nobody(options: list[str], trained: Path, tmp_path: Path) -> None:
    """`fit` and `serve-command` open no connection, as long as no hub id is named."""
    (tmp_path / "tiny").symlink_to(trained)
    program = DEAF + "from ossquant.cli import main\nmain()"
    asked = [sys.executable, "-c", program, *options]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_refusal_would_be_seen(tmp_path: Path) -> None:
    """With a hub id the same program does ask, and is refused."""
    program = DEAF + "from ossquant.cli import main\nmain()"
    asked = [sys.executable, "-c", program, "fit", "4090", "--model", "someone/gpt-oss-mine"]
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert done.stderr.startswith("socket.")


@pytest.mark.parametrize("engine", ["llama.cpp", "ollama", "vllm", "transformers"])
def test_serve_command_is_cold(engine: str) -> None:
    """`serve-command` loads no more than `fit` does, and no rich either."""
    loaded = modules("serve-command", "20b", "--gpu", "h100-sxm", "--engine", engine)
    assert not loaded & (RUNTIME | NETWORK | CODEC)


def test_serve_command_of_a_folder_is_cold(trained: Path, tmp_path: Path) -> None:
    """A GGUF folder is read without numpy, and without the gguf package."""
    export_ollama(trained, tmp_path / "export")
    loaded = modules("serve-command", tmp_path / "export", "--gpu", "4090")
    assert not loaded & (RUNTIME | NETWORK | CODEC | {"gguf"})


def test_serve_command_is_fast() -> None:
    """`ossquant serve-command 20b` takes no more than 0.30 s of CPU, as `fit` does."""
    assert reaches(0.30, "serve-command", "20b", "--gpu", "4090")


def test_quantize_is_cold(trained: Path, tmp_path: Path) -> None:
    """A whole quantization loads neither torch nor transformers nor bitsandbytes, nor what only the hub takes."""
    loaded = modules("quantize", trained, tmp_path / "out", "--scheme", "nf4")
    assert (tmp_path / "out/config.json").exists()
    assert not loaded & (RUNTIME | {"huggingface_hub", "safetensors"})


@pytest.mark.parametrize("target", ["gguf", "vllm-int4"])
def test_export_is_cold(target: str, trained: Path, tmp_path: Path) -> None:
    """A whole export loads neither torch nor transformers nor bitsandbytes, nor anything of a network."""
    loaded = modules("export", trained, tmp_path / "out", "--to", target)
    assert (tmp_path / "out/config.json").exists()
    assert not loaded & (RUNTIME | {"huggingface_hub", "safetensors", "aiohttp"})


@pytest.mark.parametrize(
    "command",
    [["run", "model", "hello"], ["chat", "model"], ["warmup", "model"], ["bench", "model"],
     ["eval", "model", "--against", "source"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_without_the_runtime(command: list[str]) -> None:
    """Where the runtime is not installed, the error names what is missing and the pip command that installs it."""
    done = subprocess.run([sys.executable, "-c", WITHOUT, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-2:] == [
        "error: running a model needs 'torch', which is not installed",
        "  try: pip install 'ossquant[run]'",
    ]


def test_version() -> None:
    """--version prints the installed version."""
    from importlib.metadata import version

    assert run_cli("--version").stdout == f"ossquant {version('ossquant')}\n"
