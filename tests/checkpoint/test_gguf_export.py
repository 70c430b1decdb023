"""An export to GGUF is known by what lies beside it; other GGUFs are refused with what to do."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import export_ollama
from ossquant.checkpoint.gguf_export import read_gguf_export
from ossquant.checkpoint.manifest import MANIFEST
from ossquant.checkpoint.reader import JOB
from ossquant.errors import CheckpointError, OssquantError, UsageError
from ossquant.fit import stored_format
from ossquant.layout import Role


@pytest.fixture
def export(trained: Path, tmp_path: Path) -> Path:
    export_ollama(trained, tmp_path / "export")
    return tmp_path / "export"


@pytest.mark.parametrize(
    ("experts", "dense", "name"),
    [("mxfp4", "q8_0", "gguf-q8"), ("mxfp4", "bf16", "gguf-bf16"), ("mxfp4", "q4_0", "gguf"), ("q5_0", "q8_0", "gguf"),
     ("q4_0", "f32", "gguf"), ("bf16", "bf16", "gguf")],
)  # fmt: skip
def test_plan(trained: Path, tmp_path: Path, experts: str, dense: str, name: str) -> None:
    """The plan is the one that was exported, byte for byte, whatever each role is in."""
    plan = export_ollama(trained, tmp_path / "export", experts=experts, dense=dense)
    found = read_gguf_export(str(tmp_path / "export"))
    assert found is not None
    assert (found.plan.nbytes, stored_format(found.plan)) == (plan.nbytes, name)
    assert [found.plan.scheme(role).format for role in (Role.EXPERTS, Role.LM_HEAD, Role.ROUTER)] == [
        experts, dense, "f32"
    ]  # fmt: skip


def test_real_size(export: Path) -> None:
    """The tensors of llama.cpp's own conversion of this model, MXFP4 and q8_0, are as many bytes as the plan has."""
    found = read_gguf_export(str(export))
    assert found is not None
    assert found.plan.nbytes == 2241472  # convert_hf_to_gguf.py --outtype q8_0 of tests/data/tiny, 2026-11-26


def test_files(trained: Path, tmp_path: Path) -> None:
    """A server is given the first of several files, by the folder or by any of them."""
    export_ollama(trained, tmp_path / "export", split_max_size=900_000)
    for source in (
        "export",
        "export/tiny-mxfp4-q8_0-00001-of-00003.gguf",
        "export/tiny-mxfp4-q8_0-00003-of-00003.gguf",
    ):
        found = read_gguf_export(str(tmp_path / source))
        assert found is not None
        assert found.first == tmp_path / "export/tiny-mxfp4-q8_0-00001-of-00003.gguf"
        assert found.modelfile == tmp_path / "export/Modelfile"
    (tmp_path / "export/Modelfile").unlink()
    found = read_gguf_export(str(tmp_path / "export"))
    assert found is not None and found.modelfile is None


def test_others(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """What holds no GGUF is left to others: checkpoints, also with a GGUF beside them, hub ids, and no path at all."""
    for source in (trained, quantized["nf4"], tmp_path, tmp_path / "absent", "openai/gpt-oss-20b", "x" * 5000, "a\0b",
                   trained / "config.json"):  # fmt: skip
        assert read_gguf_export(str(source)) is None
    (quantized["fp4"] / "other.gguf").touch()
    assert read_gguf_export(str(quantized["fp4"])) is None
    (quantized["fp4"] / "other.gguf").unlink()


def test_foreign(export: Path, tmp_path: Path) -> None:
    """A GGUF without a manifest, or one that the manifest does not name, is refused, and the hint says what goes."""
    (tmp_path / "other.gguf").touch()
    (export / "other.gguf").touch()
    for source in (tmp_path / "other.gguf", export / "other.gguf"):
        with pytest.raises(UsageError, match=r"other\.gguf: no ossquant-manifest\.json") as caught:
            read_gguf_export(str(source))
        assert "20b or a checkpoint folder" in caught.value.hint
    assert read_gguf_export(str(export)) is not None


def _cut(folder: Path) -> None:
    os.truncate(folder / "tiny-mxfp4-q8_0.gguf", 1000)


def _rename(folder: Path) -> None:
    (folder / "tiny-mxfp4-q8_0.gguf").rename(folder / "renamed.gguf")


def _unknown(folder: Path) -> None:
    _change(folder, "experts", {"format": "iq4_nl"})


def _straddling(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 200}))


def _change(folder: Path, role: str, scheme: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["scheme"][role] = scheme
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "1.00 kB of 2.2"),
        (_rename, "tiny-mxfp4-q8_0.gguf: named in"),
        (_unknown, "experts in 'iq4_nl', which no GGUF"),
        (_straddling, "do not divide"),
        (lambda folder: (folder / JOB).touch(), "unfinished"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), MANIFEST),
        (lambda folder: _change(folder, "experts", 7), MANIFEST),
    ],
    ids=["cut", "renamed", "unknown", "straddling", "unfinished", "no config", "no object", "empty", "no scheme"],
)
def test_damaged(export: Path, damage: Callable[[Path], object], words: str) -> None:
    """What is not whole is a bad checkpoint that names the file, never a traceback."""
    damage(export)
    with pytest.raises(CheckpointError) as caught:
        read_gguf_export(str(export))
    assert words in str(caught.value), caught.value


def test_link_out(export: Path, tmp_path: Path) -> None:
    """A config.json that is a link out of the folder is not followed."""
    (export / "config.json").rename(tmp_path / "config.json")
    (export / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(OssquantError, match="a link out of its folder"):
        read_gguf_export(str(export))
