"""The manifest: hashes by pieces in any order, and hostile files."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ossquant.checkpoint.header import MAX_JSON_BYTES
from ossquant.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    SideFile,
    TensorHash,
    read_manifest,
)
from ossquant.checkpoint.reader import INDEX
from ossquant.errors import CheckpointError


def by_definition(data: bytes, piece: int) -> str:
    digests = [hashlib.sha256(data[i : i + piece]).digest() for i in range(0, len(data), piece)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.fixture(scope="module")
def manifest(quantized: dict[str, Path]) -> Manifest:
    """What quantize wrote beside the trained model in bf16."""
    found = read_manifest(quantized["bf16"])
    assert found is not None
    return found


@pytest.mark.parametrize("nbytes", [0, 1, 999, 1000, 1001, 12_345])
def test_pieces_in_any_order(nbytes: int) -> None:
    """Threads that add the pieces in any order get the hash that the definition gives."""
    random = np.random.default_rng(nbytes)
    data = random.bytes(nbytes)
    tensor = TensorHash(nbytes, 1000)
    offsets = list(range(0, nbytes, 1000))
    random.shuffle(offsets)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda offset: tensor.add(offset, memoryview(data)[offset : offset + 1000]), offsets))
    assert tensor.hexdigest() == by_definition(data, 1000)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 999), (0, 1001), (1, 1000), (1000, 1000), (1500, 1), (2000, 0)])
def test_what_is_no_piece(offset: int, nbytes: int) -> None:
    """Data that is not exactly one piece, the last one shorter, is refused."""
    with pytest.raises(ValueError, match="no piece"):
        TensorHash(1500, 1000).add(offset, bytes(nbytes))


def test_unfinished() -> None:
    """A tensor has no hash before its last piece."""
    tensor = TensorHash(1500, 1000)
    tensor.add(1000, bytes(500))
    with pytest.raises(ValueError, match="1 pieces"):
        tensor.hexdigest()


def test_hashes_of_a_checkpoint(quantized: dict[str, Path], manifest: Manifest) -> None:
    """Every stored tensor is there, hashed as defined over what the safetensors library reads."""
    files = quantized["bf16"].glob("*.safetensors")
    tensors = {(path.name, name): tensor for path in files for name, tensor in load_file(path).items()}
    assert {(entry.file, name) for name, entry in manifest.tensors.items()} == tensors.keys()
    for name, entry in manifest.tensors.items():
        tensor = tensors[entry.file, name]
        data = tensor.flatten().view(torch.uint8).numpy().tobytes()
        assert entry.sha256 == by_definition(data, entry.piece)
        if name.endswith(("gate_up_proj", "down_proj")):
            assert entry.piece * tensor.shape[0] == tensor.nbytes


def test_hashes_of_what_stands_beside(quantized: dict[str, Path], manifest: Manifest) -> None:
    """Every file but the weights and the manifest is listed, by its size and the SHA-256 of all of it."""
    expected = {
        path.name: SideFile(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in quantized["bf16"].iterdir()
        if path.suffix != ".safetensors" and path.name != MANIFEST
    }
    assert {"config.json", INDEX, "tokenizer.json", "chat_template.jinja", "generation_config.json"} < expected.keys()
    assert manifest.side_files == expected


def test_what_it_says(trained: Path, manifest: Manifest) -> None:
    """It names the source's files with their sizes, its config, and each role's scheme."""
    assert dict(manifest.source.files) == {p.name: p.stat().st_size for p in trained.glob("*.safetensors")}
    assert manifest.source.config_sha256 == hashlib.sha256((trained / "config.json").read_bytes()).hexdigest()
    assert manifest.scheme["experts"] == {"format": "bf16"}
    assert manifest.versions.keys() == {"numpy", "numba"}


def test_round_trip(manifest: Manifest, tmp_path: Path) -> None:
    """What is written is read."""
    (tmp_path / MANIFEST).write_bytes(manifest.to_json())
    assert read_manifest(tmp_path) == manifest


def test_none(tmp_path: Path) -> None:
    """A folder without one has none."""
    assert read_manifest(tmp_path) is None


SIDE_FILE = {"nbytes": 8, "sha256": "0" * 64}
ENTRY = {"file": "model.safetensors", "piece": 8, "sha256": "0" * 64}
SOURCE = {"name": "tiny", "files": [["a.safetensors", 1]], "config_sha256": "0" * 64}
HOSTILE: dict[str, dict[str, Any]] = {
    "version": {"format_version": 2},
    "version of another type": {"format_version": "1"},
    "unknown key": {"more": 1},
    "tensors a list": {"tensors": []},
    "tensor a text": {"tensors": {"x": "y"}},
    "tensor with more": {"tensors": {"x": ENTRY | {"more": 1}}},
    "name that steers the terminal": {"tensors": {"x\x1b[2J": ENTRY}},
    "endless name": {"tensors": {"x" * 301: ENTRY}},
    "file above": {"tensors": {"x": ENTRY | {"file": "../a.safetensors"}}},
    "file at the root": {"tensors": {"x": ENTRY | {"file": "/a.safetensors"}}},
    "file of another kind": {"tensors": {"x": ENTRY | {"file": "passwd"}}},
    "file a number": {"tensors": {"x": ENTRY | {"file": 1}}},
    "piece of nothing": {"tensors": {"x": ENTRY | {"piece": 0}}},
    "negative piece": {"tensors": {"x": ENTRY | {"piece": -8}}},
    "piece beyond all": {"tensors": {"x": ENTRY | {"piece": 2**63}}},
    "piece a float": {"tensors": {"x": ENTRY | {"piece": 8.0}}},
    "piece a bool": {"tensors": {"x": ENTRY | {"piece": True}}},
    "short hash": {"tensors": {"x": ENTRY | {"sha256": "0" * 63}}},
    "hash with a newline": {"tensors": {"x": ENTRY | {"sha256": "0" * 64 + "\n"}}},
    "hash a number": {"tensors": {"x": ENTRY | {"sha256": 0}}},
    "source a text": {"source": "tiny"},
    "source file above": {"source": SOURCE | {"files": [["../a.safetensors", 1]]}},
    "source file of negative size": {"source": SOURCE | {"files": [["a.safetensors", -1]]}},
    "source file without a size": {"source": SOURCE | {"files": [["a.safetensors"]]}},
    "source files a number": {"source": SOURCE | {"files": 3}},
    "recipe with a line end": {"recipe": "a\nb"},
    "empty recipe": {"recipe": ""},
    "unknown role": {"scheme": {"heart": {"format": "nf4"}}},
    "scheme without format": {"scheme": {"experts": {}}},
    "version a number": {"versions": {"numpy": 2}},
    "side files a list": {"side_files": []},
    "side file above": {"side_files": {"../config.json": SIDE_FILE}},
    "side file at the root": {"side_files": {"/etc/x.json": SIDE_FILE}},
    "side file below": {"side_files": {"a/config.json": SIDE_FILE}},
    "side file of another kind": {"side_files": {"passwd": SIDE_FILE}},
    "side file of weights": {"side_files": {"a.safetensors": SIDE_FILE}},
    "side file that steers the terminal": {"side_files": {"x\x1b[2J.json": SIDE_FILE}},
    "side file of half a character": {"side_files": {"\ud800.json": SIDE_FILE}},
    "side file with an endless name": {"side_files": {"é" * 126 + ".json": SIDE_FILE}},
    "side file a text": {"side_files": {"config.json": "0"}},
    "side file with more": {"side_files": {"config.json": SIDE_FILE | {"more": 1}}},
    "side file of negative size": {"side_files": {"config.json": SIDE_FILE | {"nbytes": -1}}},
    "side file of half a byte": {"side_files": {"config.json": SIDE_FILE | {"nbytes": 0.5}}},
    "side file with a short hash": {"side_files": {"config.json": SIDE_FILE | {"sha256": "0"}}},
    "more side files than names": {"side_files": {f"{i}.json": SIDE_FILE for i in range(80_000)}},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile(manifest: Manifest, tmp_path: Path, changes: dict[str, Any]) -> None:
    """What a manifest cannot say is a CheckpointError."""
    table = json.loads(manifest.to_json()) | changes
    (tmp_path / MANIFEST).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(tmp_path)


def test_a_key_less(manifest: Manifest, tmp_path: Path) -> None:
    """Each key must be there."""
    whole = json.loads(manifest.to_json())
    for key in whole:
        (tmp_path / MANIFEST).write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(CheckpointError, match=MANIFEST):
            read_manifest(tmp_path)


BOMBS = {
    "objects": b'{"a":[' + b"{}," * 10**7 + b"0]}",
    "some objects": b'{"a":[' + b"{}," * (2**19 - 3) + b"0]}",
    "lists": b'{"a":[' + b"[]," * 10**7 + b"0]}",
    "numbers": b'{"a":[' + b"1," * 15 * 10**6 + b"0]}",
    "keys": b"{" + b",".join(b'"%x":0' % i for i in range(2 * 10**6)) + b"}",
    "some keys": b"{" + b",".join(b'"%x":0' % i for i in range(2**19 - 2)) + b"}",
    "depth": b"[" * 10**6,
}


@pytest.mark.parametrize("raw", BOMBS.values(), ids=BOMBS.keys())
def test_bombs(tmp_path: Path, raw: bytes) -> None:
    """What is small on disk and large in memory is a CheckpointError in under a second."""
    (tmp_path / MANIFEST).write_bytes(raw)
    started = time.thread_time()
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(tmp_path)
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[1," * 1000])
def test_not_json(tmp_path: Path, raw: bytes) -> None:
    """Anything but a JSON object with unlike keys is a CheckpointError."""
    (tmp_path / MANIFEST).write_bytes(raw)
    with pytest.raises(CheckpointError, match=MANIFEST):
        read_manifest(tmp_path)


def test_giant(tmp_path: Path) -> None:
    """A file larger than any manifest is not read."""
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger"):
        read_manifest(tmp_path)


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    """A manifest that is no file is an error."""
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="no file"):
        read_manifest(tmp_path)
