"""Whether an export to GGUF is whole, and what is said of one that is not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from conftest import export_ollama, run_cli
from ossquant.checkpoint.gguf_export import read_gguf_export
from ossquant.checkpoint.manifest import MANIFEST
from ossquant.errors import CheckpointError
from ossquant.export.verify_gguf import verify_gguf
from ossquant.verify import Fault, VerifyReport

TENSORS = 3 + 19 * 4
SECOND = "tiny-mxfp4-q8_0-00002-of-00003.gguf"


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in three files, with a Modelfile."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_ollama(trained, folder, split_max_size=900_000)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


def check(folder: Path) -> VerifyReport:
    export = read_gguf_export(str(folder))
    assert export is not None
    return verify_gguf(export)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_whole(exported: Path) -> None:
    """An export as it was written is whole, every tensor's hash agrees, and progress ends at all bytes."""
    seen: list[tuple[int, int]] = []
    export = read_gguf_export(str(exported))
    assert export is not None
    report = verify_gguf(export, lambda done, total: seen.append((done, total)))
    assert (report.whole, report.stored, report.hashes_agree, report.side_files_agree) == (True, TENSORS, TENSORS, 2)
    assert seen[-1][0] == seen[-1][1] > report.plan.nbytes


def test_any_bit(exported: Path, folder: Path) -> None:
    """One flipped bit is found wherever it is: in any tensor, which is named, or in a header."""
    for path in sorted(exported.glob("*.gguf")):
        tensors = gguf.GGUFReader(path).tensors
        places: dict[str | None, int] = {t.name: int(t.data_offset + t.n_bytes - 1) for t in tensors[::4]}
        for name, offset in (places | {None: 0, "": int(tensors[0].data_offset) - 40}).items():
            flip(folder / path.name, offset)
            report = check(folder)
            assert report.faults == (Fault(name or None, path.name, "differs"),)
            assert report.hashes_agree == TENSORS - bool(name)
            flip(folder / path.name, offset)
    assert check(folder).whole


@pytest.mark.parametrize("name", ["config.json", "Modelfile"])
def test_beside(folder: Path, name: str) -> None:
    """What lies beside the weights is checked, too."""
    path = folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert check(folder).faults == (Fault(None, name, "differs"),)


def test_more_weights(folder: Path) -> None:
    """A GGUF that was put there is told; a server that takes the folder might load it."""
    shutil.copy(folder / SECOND, folder / "other.gguf")
    assert check(folder).faults == (Fault(None, "other.gguf", "not in the manifest"),)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["tensors"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("output.weight"), "nothing on 'output.weight'"),
        (lambda tensors: tensors.pop(SECOND), "or on the header of its file"),
        (lambda tensors: tensors[SECOND].update(file="tiny-mxfp4-q8_0-00001-of-00003.gguf"), "on the header of"),
        (lambda tensors: tensors[SECOND].update(piece=2**40), f"{SECOND}: .* bytes, .* are its header and tensors"),
        (lambda tensors: tensors["output.weight"].update(piece=1), "'output.weight' in pieces of 1 bytes"),
    ],
)
def test_hostile_manifest(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    """A manifest that does not place every tensor, or asks for endless work, is refused."""
    change_manifest(folder, change)
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_other_tensors(folder: Path) -> None:
    """A tensor that only the manifest knows is a fault."""
    change_manifest(folder, lambda tensors: tensors.update(more=tensors["output.weight"]))
    (fault,) = check(folder).faults
    assert (fault.tensor, fault.kind) == ("more", "not in the checkpoint")


def test_cut(folder: Path) -> None:
    """A file that was cut, or grew, is named with its bytes and those it should have."""
    for change in (-32, 32):
        shutil.copy(folder / SECOND, folder / "kept")
        os.truncate(folder / SECOND, (folder / SECOND).stat().st_size + change)
        with pytest.raises(CheckpointError, match=f"{SECOND}: .* bytes"):
            check(folder)
        (folder / "kept").replace(folder / SECOND)


def test_command(exported: Path, folder: Path, trained: Path) -> None:
    """`ossquant verify` takes an export: exit code 0 or 3, the table counts GGUF's tensors; --against is refused."""
    done = run_cli("verify", exported)
    assert done.returncode == 0, done.stderr
    assert "experts       mxfp4       12" in done.stdout
    assert (
        done.stdout.splitlines()[-1]
        == f"whole: {TENSORS} tensors, {TENSORS} hashes agree; 2 files beside them, 2 agree"
    )
    flip(folder / SECOND, (folder / SECOND).stat().st_size // 2)
    done = run_cli("verify", folder, "--json")
    assert done.returncode == 3
    (fault,) = json.loads(done.stdout)["faults"]
    assert (fault["file"], fault["kind"]) == (SECOND, "differs")
    assert fault["tensor"].startswith("blk.")
    assert run_cli("verify", exported, "--against", trained).returncode == 2
