"""The Modelfile beside a GGUF file: what it says, what it names, and that the manifest vouches for it."""

import hashlib
from pathlib import Path

from ossquant.checkpoint.manifest import MODELFILE, read_manifest
from ossquant.export.gguf import GgufPlan, export_gguf
from ossquant.export.ollama import modelfile


def beside(planned: GgufPlan) -> dict[str, bytes]:
    return {MODELFILE: modelfile(planned.files[0].name)}


def test_lines() -> None:
    """It loads the file beside it, asks for a version that can, and samples as OpenAI recommends; nothing else."""
    assert modelfile("tiny-mxfp4-q8_0.gguf").decode().splitlines() == [
        "FROM ./tiny-mxfp4-q8_0.gguf",
        "REQUIRES 0.30.0",
        "PARAMETER temperature 1",
        "PARAMETER top_k 0",
        "PARAMETER top_p 1",
    ]


def test_file(trained: Path, tmp_path: Path) -> None:
    """The file that it names lies beside it, and is the only one."""
    export_gguf(trained, tmp_path, made=beside)
    text = (tmp_path / MODELFILE).read_text("utf-8")
    named = [line.removeprefix("FROM ./") for line in text.splitlines() if line.startswith("FROM ")]
    assert named == [path.name for path in tmp_path.glob("*.gguf")] != []
    assert text.endswith("\n")


def test_manifest(trained: Path, tmp_path: Path) -> None:
    """The manifest, which is read again, lists it with its size and hash."""
    export_gguf(trained, tmp_path, made=beside)
    data, manifest = (tmp_path / MODELFILE).read_bytes(), read_manifest(tmp_path)
    assert manifest is not None
    entry = manifest.side_files[MODELFILE]
    assert (entry.nbytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert set(manifest.side_files) == {MODELFILE, "config.json"}
