import shutil
from pathlib import Path

from ossquant.checkpoint.fingerprint import SAMPLES, fingerprint
from ossquant.checkpoint.reader import open_checkpoint


def of(folder: Path) -> str:
    with open_checkpoint(folder) as checkpoint:
        return fingerprint(checkpoint)


def test_a_copy_is_the_same_checkpoint(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """The same bytes under another name have one fingerprint; every scheme has one of its own."""
    shutil.copytree(trained, tmp_path / "copy")
    assert of(tmp_path / "copy") == of(trained) == of(quantized["mxfp4"])
    assert len({of(folder) for folder in quantized.values()}) == len(quantized)


def test_changed_weights_are_another_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Weights that differ in one byte of a sampled piece are another checkpoint, with the same names and sizes."""
    before = of(trained)
    shutil.copytree(trained, tmp_path / "copy")
    with open_checkpoint(tmp_path / "copy") as checkpoint:
        location = checkpoint.locations["model.layers.0.self_attn.q_proj.weight"]
        assert location.placed.tensor.nbytes < SAMPLES * 4096
    raw = bytearray(location.path.read_bytes())
    raw[location.placed.offset + 70_001] ^= 1
    location.path.write_bytes(raw)
    assert of(tmp_path / "copy") != before
