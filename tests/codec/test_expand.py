"""Every scheme as float32, held against transformers' and bitsandbytes' own dequantization."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossquant.checkpoint.header import build_header
from ossquant.checkpoint.reader import Checkpoint, Location, open_checkpoint
from ossquant.codec import expand as module
from ossquant.codec import int4
from ossquant.codec.expand import Distance, Piece, distance, expand, pieces
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role, TensorInfo
from ossquant.plan import TensorPlan
from ossquant.quantize import quantize
from ossquant.recipe import Recipe, built_in
from ossquant.scheme import Scheme

FORMS = ("published", "hybrid", "nf4", "fp4", "bf16", "nf4-single", "fp4-32")


@pytest.fixture(scope="module")
def forms(quantized: dict[str, Path], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in every form."""
    made = tmp_path_factory.mktemp("forms")
    quantize(trained, made / "nf4-single", built_in("nf4").with_double_quant(False))
    finest = {Role.EXPERTS: Scheme("fp4", 32), Role.ATTENTION: Scheme("nf4", 32)}
    quantize(trained, made / "fp4-32", Recipe("fp4-32", "", finest))
    return {"published": trained, **quantized, **{path.name: path for path in made.iterdir()}}


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def by_bitsandbytes(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    parts = {key.removeprefix(f"{name}."): part for key, part in stored.items() if key.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return bnb.dequantize_4bit(stored[name], state)


def reference(stored: dict[str, torch.Tensor], tensor: TensorInfo) -> torch.Tensor:
    """The weights as the libraries that these formats come from expand them."""
    name, experts = tensor.name, range(tensor.shape[0])
    if f"{name}_blocks" in stored:
        dense = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.float32)
        return dense.transpose(1, 2)
    if tensor.role is Role.EXPERT_BIAS and name not in stored:
        return torch.stack([stored[f"{name.removesuffix('_bias')}s.{e}.bias"].float() for e in experts])
    if tensor.role is Role.EXPERTS and name not in stored:
        return torch.stack([by_bitsandbytes(stored, f"{name}s.{e}.weight") for e in experts])
    if f"{name}.quant_map" in stored:
        return by_bitsandbytes(stored, name)
    dense = stored[name].float()
    return dense.transpose(1, 2) if tensor.role is Role.EXPERTS else dense


def all_of(checkpoint: Checkpoint, entry: TensorPlan) -> np.ndarray:
    rows = [np.concatenate(list(expand(checkpoint, entry, piece))) for piece in pieces(entry.tensor)]
    return np.concatenate(rows).reshape(entry.tensor.shape)


@pytest.mark.parametrize("weights", [None, 700, 5000], ids=["whole", "row by row", "in steps"])
@pytest.mark.parametrize("form", FORMS)
def test_weights(forms: dict[str, Path], form: str, weights: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of every form is what its library expands it to, whatever the steps."""
    if weights:
        monkeypatch.setattr(module, "PIECE_WEIGHTS", 3 * weights)
        monkeypatch.setattr(module, "STEP_WEIGHTS", weights)
    stored = load(forms[form])
    with open_checkpoint(forms[form]) as checkpoint:
        for entry in checkpoint.plan.tensors:
            expected = reference(stored, entry.tensor).numpy()
            # bitsandbytes multiplies in another order than we do by at most one rounding
            np.testing.assert_allclose(all_of(checkpoint, entry), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("form", FORMS[1:])
def test_forms_line_up(forms: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forms of a model step through it alike, a few rows at a time."""
    monkeypatch.setattr(module, "PIECE_WEIGHTS", 5000)
    monkeypatch.setattr(module, "STEP_WEIGHTS", 2000)
    with open_checkpoint(forms["published"]) as source, open_checkpoint(forms[form]) as other:
        for old, new in zip(source.plan.tensors, other.plan.tensors, strict=True):
            for piece in pieces(old.tensor):
                shapes = [rows.shape for rows in expand(source, old, piece)]
                assert shapes == [rows.shape for rows in expand(other, new, piece)]
                assert all(rows == 1 or rows * columns <= 2000 for rows, columns in shapes)


def test_pieces_of_the_full_size() -> None:
    """The head of the 20b is read 16 M weights at a time, its experts one by one."""
    head = pieces(TensorInfo("lm_head.weight", (201088, 2880), Role.LM_HEAD))
    assert (head[0].begin, head[-1].end) == (0, 201088)
    assert all(a.end == b.begin for a, b in pairwise(head))
    assert max(piece.end - piece.begin for piece in head) * 2880 <= 2**24
    experts = pieces(TensorInfo("x.gate_up_proj", (32, 5760, 2880), Role.EXPERTS))
    assert experts[3] == Piece("x.gate_up_proj[3]", 3, 0, 5760)
    assert len(experts) == 32


@pytest.mark.parametrize("form", ["published", "nf4", "bf16"])
def test_reads_no_more_than_it_needs(forms: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert is expanded from its own bytes, some rows of the head from theirs."""
    read: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: Any, offset: int) -> int:
        read.append(sum(len(buffer) for buffer in buffers))
        return preadv(file, buffers, offset)

    with open_checkpoint(forms[form]) as checkpoint:
        monkeypatch.setattr(os, "preadv", counted)
        experts = next(entry for entry in checkpoint.plan.tensors if entry.tensor.role is Role.EXPERTS)
        list(expand(checkpoint, experts, pieces(experts.tensor)[1]))
        assert sum(read) <= 1.05 * experts.nbytes / experts.tensor.shape[0]
        read.clear()
        head = checkpoint.plan.tensors[-1]
        list(expand(checkpoint, head, Piece("some rows", None, 5, 8)))
        assert sum(read) == 3 * head.tensor.shape[1] * 2


def checkpoint_of(folder: Path, entry: TensorPlan, parts: dict[str, np.ndarray]) -> Checkpoint:
    """Write one tensor as entry has it stored."""
    header, placed = build_header(entry.stored, {})
    path = folder / "model.safetensors"
    path.write_bytes(header + b"".join(parts[part.name].tobytes() for part in entry.stored))
    return Checkpoint(folder, {}, {p.tensor.name: Location(path, p) for p in placed})


def test_int4_experts(tmp_path: Path) -> None:
    """INT4 is (code - 8) times the scale of its group of 32, rounded to bf16; each expert has its own."""
    entry = TensorPlan(TensorInfo("mlp.experts.down_proj", (3, 24, 64), Role.EXPERTS), Scheme("int4"))
    random = np.random.default_rng(1)
    weights = torch.from_numpy(random.normal(size=(3, 24, 64)).astype(np.float32)).bfloat16()
    packed: dict[str, np.ndarray] = {}
    for expert in range(3):
        parts = list(int4.quantize(weights[expert].view(torch.int16).numpy().view(np.uint16)).values())
        names = [part.name for part in entry.stored[2 * expert : 2 * expert + 2]]
        packed |= dict(zip(names, parts, strict=True))
    with checkpoint_of(tmp_path, entry, packed) as checkpoint:
        found = all_of(checkpoint, entry)
    for expert in range(3):
        words, scales = (packed[part.name] for part in entry.stored[2 * expert : 2 * expert + 2])
        codes = np.stack([(words.view(np.uint32) >> (4 * i)) & 15 for i in range(8)], -1).reshape(24, 64)
        scale = torch.from_numpy(scales.view(np.int16)).view(torch.bfloat16).repeat_interleave(32, dim=1)
        values = (torch.from_numpy(codes.astype(np.float32)) - 8) * scale.float()
        assert np.array_equal(found[expert], values.bfloat16().float().numpy())
    assert np.abs(found - weights.float().numpy()).max() < 0.5


def test_f32(tmp_path: Path) -> None:
    """Float32 is as it stands."""
    entry = TensorPlan(TensorInfo("norm.weight", (7,), Role.NORM), Scheme("f32"))
    values = np.arange(7, dtype=np.float32) / 3
    with checkpoint_of(tmp_path, entry, {"norm.weight": values}) as checkpoint:
        assert np.array_equal(all_of(checkpoint, entry), values)
        with pytest.raises(UnsupportedError, match="q8_0"):
            all_of(checkpoint, TensorPlan(entry.tensor, Scheme("q8_0")))


def test_distance(tmp_path: Path) -> None:
    """Sums are float64's, the largest difference is found whatever its sign, and zero weights have no relative."""
    entry = TensorPlan(TensorInfo("a", (5,), Role.NORM), Scheme("f32"))
    (tmp_path / "b").mkdir()
    a, b = np.array([1, 2, 3, 4, 1e15], np.float32), np.array([1, 2.5, 1, 4, 1e15], np.float32)
    with checkpoint_of(tmp_path, entry, {"a": a}) as x, checkpoint_of(tmp_path / "b", entry, {"a": b}) as y:
        found = distance(x, entry, y, entry, pieces(entry.tensor)[0])
    assert found.squares == 0.25 + 4
    assert found.norm == pytest.approx(1e30, rel=1e-6)
    assert found.largest == 2
    assert Distance(0.0, 0.0).relative == 0
    assert Distance(1.0, 0.0).relative == float("inf")
    assert (Distance(9, 16, 1) + Distance(16, 9, 3)) == Distance(25, 25, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite(tmp_path: Path, value: float, side: int) -> None:
    """NaN and infinity on either side are an error, not a figure."""
    entry = TensorPlan(TensorInfo("a", (100,), Role.NORM), Scheme("f32"))
    values = [np.ones(100, np.float32), np.ones(100, np.float32)]
    values[side][17] = value
    (tmp_path / "b").mkdir()
    with (
        checkpoint_of(tmp_path, entry, {"a": values[0]}) as x,
        checkpoint_of(tmp_path / "b", entry, {"a": values[1]}) as y,
        pytest.raises(CheckpointError, match="NaN or infinity"),
    ):
        distance(x, entry, y, entry, pieces(entry.tensor)[0])


def other_state(raw: bytearray, **changes: object) -> None:
    state = json.loads(raw)
    raw[:] = json.dumps(state | changes).encode()[: len(raw)].ljust(len(raw))


DAMAGE: dict[str, tuple[str, str, Callable[[bytearray], None]]] = {
    "state not JSON": ("nf4", ".quant_state.bitsandbytes__nf4", lambda raw: raw.__setitem__(0, 0)),
    "another block size": ("nf4", ".quant_state.bitsandbytes__nf4", lambda raw: other_state(raw, blocksize=32)),
    "another shape": ("nf4", ".quant_state.bitsandbytes__nf4", lambda raw: other_state(raw, shape=[1, 2])),
    "no offset": ("nf4", ".quant_state.bitsandbytes__nf4", lambda raw: other_state(raw, nested_offset=None)),
    "endless offset": ("nf4", ".quant_state.bitsandbytes__nf4",
                       lambda raw: other_state(raw, nested_offset=float("inf"))),
    "another code book": ("nf4", ".quant_map", lambda raw: raw.__setitem__(3, 0)),
    "NaN in a code book": ("nf4", ".nested_quant_map", lambda raw: raw.__setitem__(slice(0, 4), b"\xff" * 4)),
    "a scale of 255": ("hybrid", "_scales", lambda raw: raw.__setitem__(5, 255)),
}  # fmt: skip


@pytest.mark.parametrize(("form", "suffix", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged(
    forms: dict[str, Path], tmp_path: Path, form: str, suffix: str, damage: Callable[[bytearray], None]
) -> None:
    """Statistics that contradict the shapes or the format are a CheckpointError."""
    folder = Path(shutil.copytree(forms[form], tmp_path / "model"))
    with open_checkpoint(folder) as checkpoint:
        name = next(name for name in checkpoint.stored if ".experts." in name and name.endswith(suffix))
        raw = bytearray(checkpoint.stored[name].nbytes)
        checkpoint.read_into(name, memoryview(raw))
        damage(raw)
        location = checkpoint.locations[name]
    with location.path.open("r+b") as file:
        file.seek(location.placed.offset)
        file.write(raw)
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError):
        for entry in checkpoint.plan.tensors:
            all_of(checkpoint, entry)
