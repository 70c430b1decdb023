"""Whether a checkpoint is whole, and how far it is from its source."""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossquant.checkpoint.header import read_header
from ossquant.checkpoint.manifest import MANIFEST, hash_tensors, read_manifest
from ossquant.checkpoint.reader import INDEX, JOB, open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.layout import Role
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.spec import alternating_layer_types
from ossquant.verify import Fault, verify


@pytest.fixture(scope="module")
def made(quantized: dict[str, Path], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in every scheme; nf4-single in one file."""
    single = tmp_path_factory.mktemp("made") / "nf4-single"
    quantize(trained, single, built_in("nf4").with_double_quant(False))
    return quantized | {single.name: single}


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies of them, to be damaged."""
    return lambda scheme: Path(shutil.copytree(made[scheme], tmp_path / scheme))


def change(folder: Path, name: str, offset: int, mask: int) -> str:
    """Flip bits of one byte of a stored tensor; gives its file's name."""
    with open_checkpoint(folder) as checkpoint:
        location = checkpoint.locations[name]
    flip(location.path, location.placed.offset + offset, mask)
    return location.path.name


def flip(path: Path, position: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ mask]))


SCHEMES = ("hybrid", "nf4", "fp4", "bf16", "nf4-single")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_whole(made: dict[str, Path], scheme: str) -> None:
    """What quantize wrote is whole: as many hashes agree as there are tensors."""
    report = verify(made[scheme])
    assert report.whole
    assert report.comparison is None
    with open_checkpoint(made[scheme]) as checkpoint:
        assert report.hashes_agree == report.stored == len(checkpoint.stored)
    beside = {path.name for path in made[scheme].iterdir()} - {path.name for path in checkpoint.files} - {MANIFEST}
    assert report.manifest is not None
    assert set(report.manifest.side_files) == beside
    assert report.side_files_agree == len(beside) >= 5 + (scheme != "nf4-single")


@pytest.mark.parametrize("scheme", ("hybrid", "nf4", "fp4", "bf16"))
def test_manifest_of_quantize(quantized: dict[str, Path], trained: Path, scheme: str) -> None:
    """The manifest that quantize writes as it goes holds what hashing its result afterwards gives."""
    manifest = read_manifest(quantized[scheme])
    assert manifest is not None
    assert manifest.recipe == scheme
    assert {name for name, _ in manifest.source.files} == {path.name for path in trained.glob("*.safetensors")}
    with open_checkpoint(quantized[scheme]) as checkpoint:
        pieces = {name: entry.piece for name, entry in manifest.tensors.items()}
        assert hash_tensors(checkpoint, pieces) == {name: entry.sha256 for name, entry in manifest.tensors.items()}
        assert manifest.tensors.keys() == checkpoint.stored.keys()


def kinds(folder: Path) -> list[str]:
    """Stored tensors of every kind: one by each suffix and role."""
    found: dict[tuple[str, str], str] = {}
    with open_checkpoint(folder) as checkpoint:
        for entry in checkpoint.plan.tensors:
            for part in entry.stored:
                suffix = part.name.removeprefix(entry.tensor.name).lstrip("s.0123456789")
                found[entry.tensor.role, suffix] = part.name  # the last one of its kind
    return list(found.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_flipped_bit(scheme: str, copy: Callable[[str], Path]) -> None:
    """One bit of a stored tensor of any kind, in its first or its last byte, is found, and no other tensor is named."""
    folder = copy(scheme)
    names = kinds(folder)
    assert len(names) >= {"bf16": 8, "hybrid": 14}.get(scheme, 16)
    with open_checkpoint(folder) as checkpoint:
        last = {name: checkpoint.stored[name].nbytes - 1 for name in names}
    for offsets in (dict.fromkeys(names, 0), last):
        files = [change(folder, name, offsets[name], 1 << number % 8) for number, name in enumerate(names)]
        report = verify(folder)
        expected = {Fault(name, file, "differs") for name, file in zip(names, files, strict=True)}
        assert set(report.faults) == expected
        assert len(report.faults) == len(names)
        assert not report.whole
        assert report.hashes_agree == report.stored - len(names)
        for number, name in enumerate(names):
            change(folder, name, offsets[name], 1 << number % 8)
    assert verify(folder).whole


def test_a_flipped_bit_in_a_header(copy: Callable[[str], Path]) -> None:
    """One bit of a header, names, shapes, dtypes, places or blanks, is found, except in what no one reads."""
    folder = copy("hybrid")
    path = sorted(folder.glob("*.safetensors"))[0]
    sound = read_header(path)
    raw = path.read_bytes()
    length = len(raw) - sum(placed.tensor.nbytes for placed in sound)
    metadata = raw.index(b'"pt"')
    random = np.random.default_rng(1)
    text = raw.rindex(b"}", 0, length)
    positions = [*range(8), *random.integers(8, text, 300), *random.integers(text, length, 20)]
    for position in (int(p) for p in positions):
        if metadata - 30 < position < metadata + 4:
            continue
        mask = 1 << int(random.integers(8))
        flip(path, position, mask)
        with suppress(CheckpointError):
            assert not verify(folder).whole, (position, mask)
        flip(path, position, mask)
    assert verify(folder).whole


def side_files(folder: Path) -> list[Path]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return [folder / name for name in manifest.side_files]


@pytest.mark.parametrize("scheme", ["hybrid", "nf4-single"])
def test_a_flipped_bit_beside_the_weights(scheme: str, copy: Callable[[str], Path]) -> None:
    """One bit of the config, the index, the tokenizer or any other side file is found, and the file is named."""
    folder = copy(scheme)
    random = np.random.default_rng(2)
    for path in side_files(folder):
        size = path.stat().st_size
        for position in {0, size - 1, *(int(p) for p in random.integers(size, size=12))}:
            mask = 1 << int(random.integers(8))
            flip(path, position, mask)
            try:
                assert verify(folder).faults == (Fault(None, path.name, "differs"),)
            except CheckpointError as error:  # what the folder cannot be opened without
                assert path.name in ("config.json", INDEX)
                assert f"{path.name}: not as {MANIFEST} has it" in error.message
            flip(path, position, mask)
    assert verify(folder).whole


def test_missing_side_files(copy: Callable[[str], Path]) -> None:
    """Each side file that is gone is named; without config.json or the index nothing opens, and they are named too."""
    folder = copy("hybrid")
    for path in side_files(folder):
        path.rename(folder / "aside")
        if path.name in ("config.json", INDEX):
            with pytest.raises(CheckpointError, match=f"{path.name}: not as {MANIFEST}"):
                verify(folder)
        else:
            report = verify(folder)
            assert report.faults == (Fault(None, path.name, "not in the checkpoint"),)
            assert report.hashes_agree == report.stored
            assert report.side_files_agree == len(side_files(folder)) - 1
        (folder / "aside").rename(path)


def test_a_config_that_asks_for_other_tensors(copy: Callable[[str], Path]) -> None:
    """Where a changed config only shows in the tensors, the config is named beside them."""
    folder = copy("hybrid")
    text = (folder / "config.json").read_text()
    changed = text.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    assert changed != text
    (folder / "config.json").write_text(changed.replace('"layer_types"', '"types"'))
    with pytest.raises(CheckpointError, match=rf"config\.json: not as {MANIFEST} has it; .*model\.layers\.4"):
        verify(folder)


def test_a_checkpoint_that_is_being_replaced(copy: Callable[[str], Path]) -> None:
    """An unfinished job is called that, whatever the old manifest says."""
    folder = copy("hybrid")
    (folder / "config.json").unlink()
    (folder / JOB).write_text("{}")
    with pytest.raises(CheckpointError, match="unfinished job") as error:
        verify(folder)
    assert MANIFEST not in error.value.message


def test_files_added_later(copy: Callable[[str], Path]) -> None:
    """A file of the user's own is no fault, in whatever suffix; one that would be loaded as weights is."""
    folder = copy("hybrid")
    for name in ("README.md", "notes.txt", "added_tokens.json", ".gitattributes"):
        (folder / name).write_text("{}")
    assert verify(folder).whole
    shutil.copy(sorted(folder.glob("*.safetensors"))[0], folder / "adapter.safetensors")
    report = verify(folder)
    assert report.faults == (Fault(None, "adapter.safetensors", "not in the manifest"),)
    assert report.hashes_agree == report.stored


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_side_file(copy: Callable[[str], Path]) -> None:
    """A side file that may not be read is an error that names it."""
    folder = copy("hybrid")
    (folder / "tokenizer.json").chmod(0)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: Permission denied"):
        verify(folder)


def test_names_of_side_files(trained: Path, tmp_path: Path) -> None:
    """A side file of any name that can be shown is copied and hashed; one that would steer a terminal is left out."""
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    for name in ("notes of mine.txt", "größe.json", "line\nend.json", ".json"):
        (source / name).write_text("{}")
    quantize(source, tmp_path / "out", built_in("hybrid"))
    report = verify(tmp_path / "out")
    assert report.whole
    assert report.manifest is not None
    assert {"notes of mine.txt", "größe.json"} < set(report.manifest.side_files)
    assert not any((tmp_path / "out" / name).exists() for name in ("line\nend.json", ".json"))


def test_swapped_tensors(copy: Callable[[str], Path]) -> None:
    """Two tensors of the same shape in each other's place are both found."""
    folder = copy("nf4-single")
    names = [f"model.layers.0.mlp.experts.down_projs.{expert}.weight" for expert in (0, 1)]
    with open_checkpoint(folder) as checkpoint:
        places = [checkpoint.locations[name] for name in names]
        nbytes = checkpoint.stored[names[0]].nbytes
    raw = bytearray(places[0].path.read_bytes())
    begins = [place.placed.offset for place in places]
    first, second = (bytes(raw[begin : begin + nbytes]) for begin in begins)
    raw[begins[0] : begins[0] + nbytes], raw[begins[1] : begins[1] + nbytes] = second, first
    places[0].path.write_bytes(raw)
    assert [fault.tensor for fault in verify(folder).faults] == names


def test_two_renamed_files(copy: Callable[[str], Path]) -> None:
    """Two shards under each other's names are found by the index."""
    folder = copy("nf4")
    one, two, *_ = sorted(folder.glob("*.safetensors"))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    with pytest.raises(CheckpointError, match=INDEX):
        verify(folder)


@pytest.mark.parametrize("more", [-1, -100_000, 1])
def test_file_of_another_length(copy: Callable[[str], Path], more: int) -> None:
    """A file that is cut short, or longer, is a CheckpointError that names it."""
    folder = copy("hybrid")
    path = sorted(folder.glob("*.safetensors"))[0]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + more)
    with pytest.raises(CheckpointError, match=path.name):
        verify(folder)


def test_missing_file(copy: Callable[[str], Path]) -> None:
    """A shard that is gone is a CheckpointError that names it."""
    folder = copy("hybrid")
    path = sorted(folder.glob("*.safetensors"))[0]
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        verify(folder)


def edit(folder: Path, edit_tensors: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads((folder / MANIFEST).read_bytes())
    edit_tensors(table["tensors"])
    (folder / MANIFEST).write_text(json.dumps(table))


def test_manifest_of_other_tensors(copy: Callable[[str], Path]) -> None:
    """A tensor that the manifest does not list, and one that it lists in vain, are named."""
    folder = copy("hybrid")
    edit(folder, lambda tensors: tensors.update(extra=tensors.pop("model.norm.weight")))
    report = verify(folder)
    assert {(fault.tensor, fault.kind) for fault in report.faults} == {
        ("model.norm.weight", "not in the manifest"),
        ("extra", "not in the checkpoint"),
    }
    assert report.hashes_agree == report.stored - 1


def test_manifest_with_endless_pieces(copy: Callable[[str], Path]) -> None:
    """A manifest cannot make verify hash a tensor byte by byte."""
    folder = copy("nf4-single")
    edit(folder, lambda tensors: tensors["lm_head.weight"].update(piece=1))
    with pytest.raises(CheckpointError, match="pieces of 1 bytes"):
        verify(folder)


def test_pieces_beyond_the_tensor(copy: Callable[[str], Path]) -> None:
    """A piece larger than its tensor is the tensor, and the same hash as one of its size."""
    folder = copy("hybrid")
    edit(folder, lambda tensors: tensors["model.norm.weight"].update(piece=2**62))
    assert verify(folder).whole


def test_no_manifest(trained: Path) -> None:
    """A checkpoint of others has no manifest: its headers are checked, and no hash is said to agree."""
    report = verify(trained)
    assert report.whole
    assert report.manifest is None
    assert report.hashes_agree == 0


def test_hostile_manifest(copy: Callable[[str], Path]) -> None:
    """A manifest that is none is an error, not a missing one."""
    folder = copy("hybrid")
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(folder)


@cache
def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def dense(folder: Path, name: str) -> torch.Tensor:
    """A weight as transformers and bitsandbytes expand it, in float64."""
    stored = load(folder)
    if f"{name}_blocks" in stored:
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).double()
    one_by_one = [key for key in stored if key.startswith(f"{name}s.") and key.endswith(".weight")]
    matrices = [name] if f"{name}.quant_map" in stored else sorted(one_by_one, key=lambda key: int(key.split(".")[-2]))
    if not matrices:
        found = stored[name].double()
        return found.transpose(1, 2) if found.ndim == 3 else found
    rows = []
    for matrix in matrices:
        parts = {k.removeprefix(f"{matrix}."): part for k, part in stored.items() if k.startswith(f"{matrix}.")}
        state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        rows.append(bnb.dequantize_4bit(stored[matrix], state).double())
    return torch.stack(rows) if one_by_one else rows[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors(made: dict[str, Path], trained: Path, scheme: str) -> None:
    """Each role's and each tensor's error is what torch makes of the libraries' own expansions."""
    comparison = verify(made[scheme], trained).comparison
    assert comparison is not None
    squares, norms = dict.fromkeys(Role, 0.0), dict.fromkeys(Role, 0.0)
    largest = dict.fromkeys(Role, 0.0)
    for tensor, error in comparison.tensors:
        if tensor.role in (Role.EXPERTS, Role.ATTENTION):
            a, b = dense(made[scheme], tensor.name), dense(trained, tensor.name)
            relative, furthest = float((a - b).norm() / b.norm()), float((a - b).abs().max())
            assert error.relative == pytest.approx(relative, rel=1e-5, abs=1e-12)
            assert error.largest == pytest.approx(furthest, rel=1e-4, abs=1e-9)
            squares[tensor.role] += float((a - b).square().sum())
            norms[tensor.role] += float(b.square().sum())
            largest[tensor.role] = max(largest[tensor.role], furthest)
        else:
            assert error.relative == error.largest == 0
    for role, error in comparison.roles.items():
        if norms[role]:
            assert error.relative == pytest.approx(math.sqrt(squares[role] / norms[role]), rel=1e-5, abs=1e-12)
            assert error.largest == pytest.approx(largest[role], rel=1e-4, abs=1e-9)
    assert [error.relative for _, error in comparison.tensors] == sorted(
        (error.relative for _, error in comparison.tensors), reverse=True
    )
    kept = {"hybrid": (Role.EXPERTS,), "bf16": (Role.EXPERTS, Role.ATTENTION)}.get(scheme, ())
    for role in (Role.EXPERTS, Role.ATTENTION):
        assert (comparison.roles[role].relative == 0) == (role in kept)
        assert comparison.roles[role].relative < 0.13


def test_errors_do_not_depend_on_threads(made: dict[str, Path], trained: Path) -> None:
    """The same figures every time, to the last bit."""
    first, second = (verify(made["nf4"], trained).comparison for _ in range(2))
    assert first == second


def test_errors_of_expert_biases(made: dict[str, Path], trained: Path, copy: Callable[[str], Path]) -> None:
    """A bias of one expert that differs is found, though nf4 stores biases one by one and the source does not."""
    folder = copy("nf4")
    name = "model.layers.1.mlp.experts.down_projs.2.bias"
    value = float(load(trained)["model.layers.1.mlp.experts.down_proj_bias"][2, 0])
    change(folder, name, 1, 0x80)  # the sign of the first
    report = verify(folder, trained)
    assert [fault.tensor for fault in report.faults] == [name]
    assert report.comparison is not None
    assert report.comparison.roles[Role.EXPERT_BIAS].largest == pytest.approx(2 * abs(value))
    assert value != 0


def test_another_model(made: dict[str, Path], tmp_path: Path) -> None:
    """A source of another shape, or with more layers, is a CheckpointError."""
    from make_checkpoint import TINY, make_checkpoint

    with open_checkpoint(made["nf4"]) as checkpoint:
        spec = checkpoint.spec
    layers = spec.num_hidden_layers + 1
    more = replace(spec, num_hidden_layers=layers, layer_types=alternating_layer_types(layers))
    for number, other in enumerate((more, replace(TINY, vocab_size=spec.vocab_size + 64))):
        make_checkpoint(tmp_path / str(number), other)
        for pair in ((made["nf4"], tmp_path / str(number)), (tmp_path / str(number), made["nf4"])):
            with pytest.raises(CheckpointError, match="made of"):
                verify(*pair)


@pytest.mark.parametrize("against", [False, True])
def test_progress(made: dict[str, Path], trained: Path, against: bool) -> None:
    """Bytes rise to all that is read: once to hash it, once to expand it, and the source."""
    told: list[tuple[int, int]] = []
    report = verify(made["nf4"], trained if against else None, lambda done, total: told.append((done, total)))
    with open_checkpoint(trained) as source:
        total = report.plan.nbytes * (1 + against) + source.plan.nbytes * against
    assert {each for _, each in told} == {total}
    done = [each for each, _ in told]
    assert done == sorted(done)
    assert 0.99 * total < done[-1] <= total
    assert (done[-1] == total) or against
