"""Checkpoints to test with: random ones in the published layout, and the trained one in tests/data/tiny."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ossquant.plan import Plan
from ossquant.quantize import quantize
from ossquant.recipe import built_in

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "tests/data/tiny"
LLAMA = ROOT / ".venv/llama"
SCHEMES = ("hybrid", "nf4", "fp4", "mxfp4", "int4", "bf16")

sys.path.insert(0, str(ROOT / "scripts"))


def pytest_configure() -> None:
    """Have Triton interpret kernels on the CPU, which it decides when it is imported, and Ctrl-C work.

    pytest-xdist's processes ignore it, and so would every command that a test starts there.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def trained() -> Path:
    """The trained tiny model, as published: MXFP4 in two shards."""
    return TRAINED


@pytest.fixture(scope="session")
def random_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in the published layout."""
    return _make(tmp_path_factory.mktemp("random") / "tiny", "mxfp4")


@pytest.fixture(scope="session")
def random_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny checkpoint in the bf16 layout that transformers writes."""
    return _make(tmp_path_factory.mktemp("random") / "bf16", "bf16")


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> dict[str, Path]:
    """The trained model in every scheme."""
    folder = tmp_path_factory.mktemp("quantized")
    for scheme in SCHEMES:
        quantize(trained, folder / scheme, built_in(scheme), max_shard_size=10**6)
    return {scheme: folder / scheme for scheme in SCHEMES}


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., list[list[dict[str, Any]]]]:
    """Have a real llama.cpp load models and answer prompts, the likeliest token each time.

    Gives a list a model of {"prompt", "tokens", "text"}, one a prompt.
    """
    if not (LLAMA / "version").is_file():
        pytest.fail("no llama.cpp: run scripts/setup_llama")

    def answer(models: Sequence[Path], prompts: Sequence[str], most_tokens: int = 320) -> list[list[dict[str, Any]]]:
        job = {"llama": str(LLAMA), "models": list(map(str, models)), "prompts": prompts, "maxTokens": most_tokens}
        command = ["node", str(ROOT / "tests/export/generate.mjs")]
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        found: list[list[dict[str, Any]]] = json.loads(done.stdout)
        return found

    return answer


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of a given size, that can be given another one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def of_size(nbytes: int) -> Path:
        nonlocal mounted
        options = f"size={nbytes}" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        mounted = True
        return folder

    yield of_size
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def _make(output: Path, form: str) -> Path:
    from make_checkpoint import TINY, make_checkpoint

    make_checkpoint(output, TINY, form)
    return output


def export_ollama(source: Path, folder: Path, split_max_size: int | None = None, **formats: str) -> Plan:
    """Export to GGUF with a Modelfile beside it; formats are experts and dense."""
    from ossquant.export.gguf import export_gguf
    from ossquant.export.ollama import modelfile

    report = export_gguf(
        source, folder, split_max_size=split_max_size, **formats,  # type: ignore[arg-type]
        made=lambda planned: {"Modelfile": modelfile(planned.files[0].name)},
    )  # fmt: skip
    return report.result


@dataclass(frozen=True)
class Done:
    """How a command ended that ran in this process."""

    code: int
    stdout: str
    stderr: str


def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path | int) -> Done:
    """Run `ossquant` in this process: many times faster."""
    from ossquant.cli import main

    monkeypatch.setattr(sys, "argv", ["ossquant", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0 if done.code is None else 1
    return Done(code, *capsys.readouterr())


def run_cli(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `ossquant` as a user does."""
    command = [str(Path(sys.executable).parent / "ossquant"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def killed(run: Callable[[], Any], folder: Path, operation: int) -> bool:
    """Run in a child that dies at its nth operation on a file in folder; False if it came to its end."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = operation

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.mkdir", "os.remove", "os.rename") and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        run()
    finally:
        os._exit(0)
