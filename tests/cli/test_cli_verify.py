"""`ossquant verify` as a user runs it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import run_cli
from ossquant.checkpoint.reader import open_checkpoint


@pytest.fixture
def made(quantized: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the trained model in nf4."""
    return Path(shutil.copytree(quantized["nf4"], tmp_path / "nf4"))


def flip(folder: Path, name: str) -> str:
    with open_checkpoint(folder) as checkpoint:
        location = checkpoint.locations[name]
    raw = bytearray(location.path.read_bytes())
    raw[location.placed.offset] ^= 1
    location.path.write_bytes(raw)
    return location.path.name


def test_whole(made: Path) -> None:
    """A whole checkpoint exits 0 and says how many hashes agree, and what it was made of."""
    done = run_cli("verify", made)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "whole: 583 tensors, 583 hashes agree; 8 files beside them, 8 agree"
    assert "made of tiny by recipe nf4" in done.stdout
    assert "bits/weight" in done.stdout


def test_damaged(made: Path) -> None:
    """One flipped bit: exit code 3, the file and the tensor by name."""
    name = "model.layers.1.mlp.experts.down_projs.2.weight.absmax"
    file = flip(made, name)
    done = run_cli("verify", made)
    assert done.returncode == 3
    assert f"{file}: '{name}' differs" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("not whole: 583 tensors, 582 hashes agree")
    assert file in done.stdout.splitlines()[-1]


def test_a_changed_side_file(made: Path) -> None:
    """A tokenizer that differs: exit code 3, the file, and what now; an added file of weights is to be removed."""
    path = made / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    done = run_cli("verify", made)
    assert done.returncode == 3
    assert done.stdout.splitlines()[-2] == "tokenizer.json: differs"
    last = done.stdout.splitlines()[-1]
    assert last.startswith("not whole: 583 tensors, 583 hashes agree; 8 files beside them, 7 agree; fetch again: token")
    assert "quantize again" in last
    (made / "more.safetensors").write_bytes(b"")
    assert run_cli("verify", made).stdout.endswith("remove what was added: more.safetensors\n")


def test_cut_short(made: Path) -> None:
    """A file that is cut short: exit code 3, one error, no traceback."""
    path = sorted(made.glob("*.safetensors"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    done = run_cli("verify", made)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path.name}")
    assert "Traceback" not in done.stderr


def test_no_manifest(trained: Path) -> None:
    """Without a manifest it says that no hash is checked, and exits 0."""
    done = run_cli("verify", trained)
    assert done.returncode == 0
    assert "no hash is checked" in done.stdout.splitlines()[-1]


def test_against(made: Path, trained: Path) -> None:
    """Beside its source: a line a role with its error, then the worst tensors, as many as asked for."""
    done = run_cli("verify", made, "--against", trained, "--worst", "3")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    experts = next(line.split() for line in lines if line.startswith("experts"))
    assert experts[1:3] == ["nf4", "mxfp4"]
    assert 0.05 < float(experts[-2]) < 0.1
    assert next(line.split() for line in lines if line.startswith("router"))[-2:] == ["exact", "0"]
    worst = lines.index("worst tensors")
    assert len(lines) - worst == 2 + 3 + 2
    assert all("self_attn" in line for line in lines[worst + 2 : worst + 5])


def test_json(made: Path, trained: Path) -> None:
    """One object with all of it, and nothing else on stdout."""
    done = run_cli("verify", made, "--against", trained, "--worst", "2", "--json")
    report = json.loads(done.stdout)
    assert report["whole"] is True
    assert report["tensors"] == report["hashes_agree"] == 583
    assert report["side_files"] == report["side_files_agree"] == 8
    assert report["manifest"]["source"] == "tiny"
    assert report["roles"]["experts"]["format"] == "nf4"
    assert 0.05 < report["roles"]["experts"]["relative_error"] < 0.1
    assert report["roles"]["router"]["max_error"] == 0
    assert len(report["worst"]) == 2
    assert report["worst"][0]["relative_error"] >= report["worst"][1]["relative_error"]


def test_json_of_a_damaged_one(made: Path) -> None:
    """The object names every fault; the exit code is 3."""
    file = flip(made, "lm_head.weight")
    done = run_cli("verify", made, "--json")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert report["whole"] is False
    assert report["faults"] == [{"tensor": "lm_head.weight", "file": file, "kind": "differs"}]
    assert "worst" not in report


def test_another_model(made: Path, tmp_path: Path) -> None:
    """A source of another shape is an error with a hint."""
    from make_checkpoint import TINY, make_checkpoint

    make_checkpoint(tmp_path / "other", replace(TINY, vocab_size=TINY.vocab_size + 64))
    done = run_cli("verify", made, "--against", tmp_path / "other")
    assert done.returncode == 3
    assert "--against takes" in done.stderr


@pytest.mark.parametrize("arguments", [["nowhere-at-all"], [], [".", "--worst", "-1"]])
def test_usage(arguments: list[str]) -> None:
    """A wrong argument is a usage error."""
    done = run_cli("verify", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
