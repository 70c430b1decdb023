"""`ossquant quantize` as a user runs it: kills, Ctrl-C, --force, the hub's cache, JSON."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import run_cli
from ossquant.checkpoint.manifest import MANIFEST
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.spec import alternating_layer_types

SHARD = 500_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A random checkpoint that takes about a second, most of it spent on some twenty small files."""
    from make_checkpoint import TINY, make_checkpoint

    spec = replace(TINY, num_hidden_layers=16, layer_types=alternating_layer_types(16))
    folder = tmp_path_factory.mktemp("large") / "source"
    make_checkpoint(folder, spec)
    with (folder / "notes.txt").open("wb") as file:
        file.truncate(16 * 2**20)  # a while to copy, after the weights have their names
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, large: Path) -> dict[str, str]:
    """The digests of the files that an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    quantize(large, folder, built_in("nf4"), max_shard_size=SHARD)
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """Hash a checkpoint's files, but for the manifest, which names the source."""
    beside = (path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in beside}


def command(source: Path, output: Path) -> list[str]:
    program = str(Path(sys.executable).parent / "ossquant")
    return [program, "quantize", str(source), str(output), "--scheme", "nf4", "--max-shard-size", str(SHARD), "--json"]


def start(source: Path, output: Path, until: Callable[[Path], bool]) -> subprocess.Popen[str]:
    """Start the command and wait for a moment of it; on a busy machine it may end first, and is started anew."""
    for _ in range(5):
        process = subprocess.Popen(command(source, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            if until(output):
                return process
            time.sleep(0.0005)
        process.communicate()
        shutil.rmtree(output)
    pytest.fail("it ended before the moment came")


def begun(output: Path) -> bool:
    return any(output.glob("model-*.partial"))


def half_done(output: Path) -> bool:
    job = output / "ossquant-job.json"
    return job.exists() and len(json.loads(job.read_text())["done"]) >= 10


def committing(output: Path) -> bool:
    return any(output.glob("model-*.safetensors"))


def run_again(source: Path, output: Path) -> dict[str, object]:
    done = subprocess.run(command(source, output), capture_output=True, text=True, check=True)
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("moment", [begun, half_done, committing], ids=lambda moment: moment.__name__)
def test_killed(large: Path, undisturbed: dict[str, str], moment: Callable[[Path], bool], tmp_path: Path) -> None:
    """Killed at any moment, OUTPUT is refused; run again, its files are those of an undisturbed run."""
    out = tmp_path / "out"
    process = start(large, out, moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="unfinished job"):
        open_checkpoint(out)
    assert run_again(large, out)["resumed"] or moment is begun
    assert digests(out) == undisturbed


def test_finished_files_are_checked(large: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A bit that flips in a finished file of an interrupted job is found by its hash, and the file made again."""
    out = tmp_path / "out"
    process = start(large, out, half_done)
    process.kill()
    process.communicate()
    done = sorted(json.loads((out / "ossquant-job.json").read_text())["done"])
    with (out / f"{done[3]}.partial").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    assert run_again(large, out)["resumed"]
    assert digests(out) == undisturbed


def test_interrupted(large: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C ends with exit code 130 and a sentence; the same command goes on."""
    out = tmp_path / "out"
    process = start(large, out, half_done)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == f"interrupted; the same command goes on from here. {out} is not a checkpoint yet."
    assert "Traceback" not in stderr
    assert run_again(large, out)["resumed"] is True
    assert digests(out) == undisturbed


def test_two_at_once(large: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A second run into the same OUTPUT is refused while the first one is at work, which it does not disturb."""
    out = tmp_path / "out"
    first = start(large, out, half_done)
    first.send_signal(signal.SIGSTOP)  # so that it is at work as long as the second takes
    second = subprocess.run(command(large, out), capture_output=True, text=True, check=False)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 2)
    assert "error: " in second.stderr
    assert digests(out) == undisturbed


def test_output_exists(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A finished checkpoint is neither written again nor touched; with --force it is replaced, no old shard left."""
    out = tmp_path / "out"
    shutil.copytree(quantized["bf16"], out)
    before = digests(out)
    done = run_cli("quantize", trained, out)
    assert done.returncode == 2
    assert f"error: {out} exists and is not empty" in done.stderr.splitlines()
    assert digests(out) == before
    done = run_cli("quantize", trained, out, "--scheme", "nf4", "--max-shard-size", "1MB", "--force")
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(quantized["nf4"])


def test_recipe(trained: Path, tmp_path: Path) -> None:
    """A recipe file stands in for a scheme, and --double-quant applies to it."""
    recipe = Path(__file__).parents[2] / "recipes/nf4-finest.toml"
    command = ("quantize", trained, "--dry-run", "--json", "--recipe", recipe)
    plans = [json.loads(run_cli(*command, *options).stdout) for options in ((), ("--double-quant",))]
    assert [plan["scheme"] for plan in plans] == ["nf4-finest", "nf4-finest"]
    assert plans[1]["bytes"] < plans[0]["bytes"]


def test_dry_run(trained: Path, tmp_path: Path) -> None:
    """A dry run writes nothing, and its JSON is one object whose bytes are those of the run and of its files."""
    command = ("quantize", trained, tmp_path / "out", "--scheme", "nf4", "--no-double-quant", "--json")
    dry = run_cli(*command, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "out").exists()
    run = run_cli(*command)
    assert run.returncode == 0, run.stderr
    planned, made = json.loads(dry.stdout), json.loads(run.stdout)
    same = ("scheme", "parameters", "parameters_4bit", "bytes", "roles")
    assert [planned[key] for key in same] == [made[key] for key in same]
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert made["bytes"] == sum(tensor.nbytes for tensor in checkpoint.stored.values())
    assert made["bytes"] == sum(role["bytes"] for role in made["roles"].values())
    assert (made["source_bytes"], made["files"], made["resumed"]) == (2_974_688, 1, False)


def test_dry_run_table(trained: Path) -> None:
    """Without --json the plan is a table, one line a role, with the total in bytes."""
    done = run_cli("quantize", trained, "--dry-run", "--scheme", "nf4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines[2:-1]} == {
        "experts", "attention", "embedding", "lm_head", "expert_bias", "router", "bias", "norm"}  # fmt: skip
    assert lines[-1].split()[:1] == ["total"]
    assert "2.16 MB" in lines[-1]


def test_rounding_is_said(random_bf16: Path) -> None:
    """Where bf16 experts are to be rounded to MXFP4, stderr says so."""
    assert "rounded to MXFP4" in run_cli("quantize", random_bf16, "--dry-run").stderr


@pytest.fixture
def hub(trained: Path, tmp_path: Path) -> dict[str, str]:
    """A hub cache, as huggingface_hub keeps it, that holds the trained model; and the variables that point to it."""
    cache = tmp_path / "hub"
    repo, commit = cache / "models--org--tiny", "0123456789abcdef0123456789abcdef01234567"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    for path in trained.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repo / "blobs" / blob)
        (repo / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{blob}")
    return os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def test_hub_id(hub: dict[str, str], quantized: dict[str, Path], tmp_path: Path) -> None:
    """A hub id is taken from the cache when offline. Without a scheme the hybrid is made.

    stdout has one line of result; stderr says why this scheme, and what each one costs.
    """
    done = run_cli("quantize", "org/tiny", tmp_path / "out", "--max-shard-size", "1MB", env=hub)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(quantized["hybrid"])
    assert len(done.stdout.splitlines()) == 1
    assert f"{tmp_path / 'out'}: 2.12 MB in 3 files" in done.stdout
    assert all(word in done.stderr for word in ("hybrid: ", "Stored now: 2.97 MB", "nf4 2.16 MB", "bf16 6.44 MB"))
    assert "rounded" not in done.stderr


def test_absent_hub_id(hub: dict[str, str], tmp_path: Path) -> None:
    """A hub id that is not in the cache is one clear sentence when offline, and the command that fetches it."""
    done = run_cli("quantize", "org/absent", tmp_path / "out", env=hub)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: no folder 'org/absent', and the hub has not given it")
    assert hint == "  try: when online: hf download org/absent"
    assert not (tmp_path / "out").exists()
