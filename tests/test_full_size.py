"""The main job at full size, on random weights in the published shapes. Takes half an hour and 50 GB of disk."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest

from conftest import ROOT
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.spec import ModelSpec

PEAK_RSS = 2**30
MAKER_RSS = 10**9
PUBLISHED_BYTES = 13_761_264_768

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Done:
    """What a command printed and returned, and the most memory that it held."""

    stdout: str
    code: int
    peak_rss: int

    @property
    def mib(self) -> str:
        """That memory, to print."""
        return f"{self.peak_rss / 2**20:.0f} MiB"


# A child's peak is never told below the memory of the process that started it: so this small one does.
LAUNCH = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}")
"""


def run(*command: str | Path) -> Done:
    """Run a command to its end."""
    with NamedTemporaryFile("r") as told:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, told.name, *map(str, command)]
        done = subprocess.run(launcher, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        code, peak = map(int, told.read().split())
    return Done(done.stdout, code, peak * 1024)


def ossquant(*arguments: str | Path) -> Done:
    return run(Path(sys.executable).parent / "ossquant", *arguments)


def make(folder: Path, *arguments: str) -> Done:
    done = run(sys.executable, ROOT / "scripts/make_checkpoint.py", folder, *arguments)
    assert done.code == 0
    return done


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Done]]:
    """A random 20b checkpoint, removed afterwards."""
    folder = tmp_path_factory.mktemp("full") / "20b"
    yield folder, make(folder, "20b")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bf16_slice(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four layers of a random 20b in bf16, 8.9 GB in two shards, removed afterwards."""
    folder = tmp_path_factory.mktemp("slice") / "bf16"
    make(folder, "20b", "--layers", "4", "--form", "bf16")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Four layers of the 20b, 4 GB, and of the 120b, 9 GB, as published, removed afterwards."""
    folder = tmp_path_factory.mktemp("slices")
    for size in ("20b", "120b"):
        make(folder / size, size, "--layers", "4")
    yield {size: folder / size for size in ("20b", "120b")}
    shutil.rmtree(folder)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A place for a result, removed afterwards."""
    yield tmp_path / "output"
    shutil.rmtree(tmp_path / "output", ignore_errors=True)


def flip_a_bit(folder: Path) -> tuple[str, str]:
    """Flip a bit in the middle of a tensor in the middle of the last shard; gives the tensor's and the file's name."""
    with open_checkpoint(folder) as checkpoint:
        last = [place for place in checkpoint.locations.values() if place.path == checkpoint.files[-1]]
    place = last[len(last) // 2]
    with place.path.open("r+b") as file:
        file.seek(place.placed.offset + place.placed.tensor.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    return place.placed.tensor.name, place.path.name


def check_verify(source: Path, output: Path) -> None:
    """`verify` finds the result whole, and one flipped bit in it by its tensor's name, both in little memory."""
    whole = ossquant("verify", output)
    assert whole.code == 0
    assert whole.stdout.splitlines()[-1].startswith("whole: ")
    assert whole.peak_rss <= PEAK_RSS
    tensor, file = flip_a_bit(output)
    damaged = ossquant("verify", output, "--against", source, "--json")
    assert damaged.code == 3
    assert json.loads(damaged.stdout)["faults"] == [{"tensor": tensor, "file": file, "kind": "differs"}]
    assert damaged.peak_rss <= PEAK_RSS
    sys.stdout.write(f"verify: {whole.mib}, with --against {damaged.mib}\n")


def test_the_20b_is_made_in_little_memory(full_size: tuple[Path, Done]) -> None:
    """make_checkpoint streams: the published bytes to the byte, in less than 1 GB of memory."""
    folder, made = full_size
    assert made.peak_rss <= MAKER_RSS
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == PUBLISHED_BYTES


@pytest.mark.parametrize("scheme", ["nf4", "hybrid", "int4"])
def test_the_20b_is_quantized_in_little_memory(scheme: str, full_size: tuple[Path, Done], output: Path) -> None:
    """`quantize` of the whole model peaks at 1 GiB or less, writes what its plan says, and `verify` checks it."""
    done = ossquant("quantize", full_size[0], output, "--scheme", scheme)
    assert done.code == 0
    assert done.peak_rss <= PEAK_RSS
    sys.stdout.write(f"{scheme}: {done.mib}\n")
    with open_checkpoint(output) as checkpoint:
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert checkpoint.plan.nbytes == index["metadata"]["total_size"]
        assert checkpoint.plan.parameters == 20_914_757_184
    check_verify(full_size[0], output)


@pytest.mark.parametrize("scheme", ["mxfp4", "int4", "nf4"])
def test_a_bf16_source_in_little_memory(scheme: str, bf16_slice: Path, output: Path) -> None:
    """From bf16, as transformers stores it, `quantize` and `verify` peak at 1 GiB or less, too."""
    done = ossquant("quantize", bf16_slice, output, "--scheme", scheme, "--max-shard-size", "1GB")
    assert done.code == 0
    assert done.peak_rss <= PEAK_RSS
    sys.stdout.write(f"{scheme} from bf16: {done.mib}\n")
    check_verify(bf16_slice, output)


@pytest.mark.parametrize("scheme", ["nf4", "hybrid", "int4"])
def test_memory_does_not_grow_with_the_model(scheme: str, slices: dict[str, Path], output: Path) -> None:
    """Layers of the 120b, with four times the experts, take the memory that the 20b's take, within a quarter."""
    peaks = {}
    for size, source in slices.items():
        done = ossquant("quantize", source, output, "--scheme", scheme)
        assert done.code == 0
        peaks[size] = done.peak_rss
        shutil.rmtree(output)
    sys.stdout.write(f"{scheme}: " + ", ".join(f"{size} {peak / 2**20:.0f} MiB" for size, peak in peaks.items()) + "\n")
    assert max(peaks.values()) <= PEAK_RSS
    assert max(peaks.values()) <= 1.25 * min(peaks.values())


def test_the_20b_is_exported_to_gguf(full_size: tuple[Path, Done], output: Path, llama_cpp: Any) -> None:
    """`export` of the whole model peaks at 1 GiB or less, writes the size it told, and llama.cpp answers with it."""
    planned = json.loads(ossquant("export", full_size[0], "--dry-run", "--json").stdout)["files"]
    done = ossquant("export", full_size[0], output)
    assert done.code == 0
    assert done.peak_rss <= PEAK_RSS
    (path,) = output.glob("*.gguf")
    assert [{"name": path.name, "bytes": path.stat().st_size}] == planned
    ((answer,),) = llama_cpp([path], ["<|start|>user<|message|>Hi<|end|><|start|>assistant"], 2)
    assert len(answer["tokens"]) == 2
    sys.stdout.write(f"gguf: {done.mib}\n")


@pytest.mark.parametrize("stored", ["as published", "hybrid"])
def test_the_20b_loads_in_little_memory(stored: str, full_size: tuple[Path, Done], output: Path) -> None:
    """`run` in hybrid on the CPU peaks at 1.5 GiB above the weights, quantized on load or before, and says a token."""
    checkpoint = full_size[0]
    if stored == "hybrid":
        checkpoint = output
        assert ossquant("quantize", full_size[0], output, "--scheme", "hybrid").code == 0
    scheme = ["--scheme", "hybrid"] if stored == "as published" else []
    done = ossquant("run", checkpoint, "Hi", *scheme, "--device-map", "cpu", "--max-new-tokens", "1", "--json")
    assert done.code == 0
    answer = json.loads(done.stdout)
    weights = make_plan(ModelSpec.published("20b"), built_in("hybrid")).nbytes
    sys.stdout.write(f"run, {stored}: {done.mib} of host memory for {weights / 2**20:.0f} MiB of weights\n")
    assert answer["completion_tokens"] == 1
    assert answer["bytes_by_device"]["cpu"] == pytest.approx(weights, rel=0.01)
    assert done.peak_rss <= weights + 1.5 * 2**30
