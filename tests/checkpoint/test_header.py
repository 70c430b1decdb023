"""The header of a safetensors file, sound or hostile."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ossquant.checkpoint.header import build_header, parse_json, read_header
from ossquant.errors import CheckpointError
from ossquant.scheme import ITEMSIZE, StoredTensor


def entry(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


PAGE = 4096
SOUND = {"__metadata__": {"format": "pt"}, "a": entry(0, 16), "b": entry(16, 32, "F32", [2, 2])}
DATA = bytes(range(32))


def write(path: Path, header: bytes | dict[str, Any], data: bytes = DATA, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def test_sound(tmp_path: Path) -> None:
    """The tensors of a sound file are listed with their places."""
    path = write(tmp_path / "sound.safetensors", SOUND)
    found = {p.tensor.name: (p.tensor, path.read_bytes()[p.offset :][:16]) for p in read_header(path)}
    assert found == {
        "a": (StoredTensor("a", "U8", (16,)), DATA[:16]),
        "b": (StoredTensor("b", "F32", (2, 2)), DATA[16:]),
    }


def test_empty_tensor(tmp_path: Path) -> None:
    """An empty tensor takes no place, wherever it stands."""
    empty = {"c": entry(0, 0, shape=[0, 5]), "d": entry(16, 16), "e": entry(32, 32)}
    assert len(read_header(write(tmp_path / "a.safetensors", empty | SOUND))) == 5


HOSTILE: dict[str, bytes | dict[str, Any]] = {
    "overlap": SOUND | {"b": entry(8, 24, "F32", [2, 2])},
    "same place": SOUND | {"b": entry(0, 16)},
    "gap": SOUND | {"b": entry(20, 32)},
    "gap at the start": {"a": entry(4, 32)},
    "gap as long as what lies beyond the file": {"a": entry(0, 16), "b": entry(32, 48)},
    "uncovered end": {"a": entry(0, 16)},
    "beyond the file": SOUND | {"b": entry(16, 36)},
    "far beyond the file": SOUND | {"b": entry(16, 2**62)},
    "negative begin": SOUND | {"a": entry(-16, 0, shape=[16])},
    "negative end": {"a": entry(0, -1, shape=[1])},
    "backwards": SOUND | {"a": {"dtype": "U8", "shape": [16], "data_offsets": [16, 0]}},
    "huge offset": SOUND | {"a": {"dtype": "U8", "shape": [16], "data_offsets": [2**80, 2**80 + 16]}},
    "fractional offset": {"a": {"dtype": "U8", "shape": [32], "data_offsets": [0.0, 32.0]}},
    "one offset": {"a": {"dtype": "U8", "shape": [32], "data_offsets": [32]}},
    "three offsets": {"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 16, 32]}},
    "giant shape": {"a": entry(0, 32, shape=[2**40, 2**40])},
    "shape that wraps to 32": {"a": entry(0, 32, shape=[2**63 + 32])},
    "product that wraps": {"a": entry(0, 0, shape=[2**32, 2**32])},
    "negative shape": {"a": entry(0, 32, shape=[-32])},
    "two negatives": {"a": entry(0, 32, shape=[-4, -8])},
    "boolean shape": {"a": entry(0, 1, shape=[True])},
    "text shape": {"a": entry(0, 32, shape="32")},
    "nested shape": {"a": entry(0, 32, shape=[[32]])},
    "many dimensions": {"a": entry(0, 32, shape=[1] * 10**5 + [32])},
    "dtype too wide": {"a": entry(0, 32, "F64", [32])},
    "dtype too narrow": {"a": entry(0, 32, "BF16", [8])},
    "unknown dtype": {"a": entry(0, 32, "FLOAT", [32])},
    "no dtype": {"a": entry(0, 32, None)},
    "dtype a list": {"a": entry(0, 32, ["U8"])},
    "dtype a table": {"a": entry(0, 32, {"U8": 1})},
    "key missing": {"a": {"dtype": "U8", "data_offsets": [0, 32]}},
    "key too many": {"a": entry(0, 32) | {"strides": [1]}},
    "tensor is no table": {"a": [0, 32]},
    "empty header": b"",
    "no JSON": b"\x80\x04pickle",
    "cut off": json.dumps(SOUND).encode()[:-3],
    "not UTF-8": b'{"\xff": 1}',
    "a list": b"[]",
    "duplicate tensor": b'{"a":{"dtype":"U8","shape":[32],"data_offsets":[0,32]},'
    b'"a":{"dtype":"U8","shape":[32],"data_offsets":[0,32]}}',
    "duplicate key": b'{"a":{"dtype":"U8","dtype":"I8","shape":[32],"data_offsets":[0,32]}}',
    "deep lists": b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}",
    "deep tables": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "long number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**5 + b'],"data_offsets":[0,32]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,32]}}',
    "infinity": b'{"a":{"dtype":"U8","shape":[32],"data_offsets":[0,1e999]}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, tmp_path: Path) -> None:
    """What the format does not allow is refused by the file's name, in a sentence, at once."""
    path = write(tmp_path / "hostile.safetensors", HOSTILE[case])
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"^hostile\.safetensors: ") as error:
        read_header(path)
    assert time.process_time() - started < 1
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["x" * 10**6, "\x1b[2J\nerror: none"], ids=["long", "control characters"])
def test_hostile_name(name: str, tmp_path: Path) -> None:
    """A tensor's name neither fills the screen nor steers the terminal."""
    path = write(tmp_path / "hostile.safetensors", {name: entry(0, 31)})
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


@pytest.mark.parametrize("length", [33, 10**5, 10**8 + 1, 2**63, 2**64 - 1])
def test_header_length(length: int, tmp_path: Path) -> None:
    """A header longer than its file is refused before it is read."""
    path = write(tmp_path / "hostile.safetensors", b"{}", b" " * 30, length)
    with pytest.raises(CheckpointError, match=f"header of {length}"):
        read_header(path)


def test_header_limit(tmp_path: Path) -> None:
    """A header far beyond any model's is refused before it is read, though the file holds it."""
    path = tmp_path / "hostile.safetensors"
    with path.open("wb") as file:
        file.write((10**8 + 1).to_bytes(8, "little"))
        file.truncate(2 * 10**8)
    with pytest.raises(CheckpointError, match="header of 100000001"):
        read_header(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    """A file cut at any byte, or with bytes too many, is refused."""
    whole = write(tmp_path / "whole.safetensors", SOUND).read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(path)


dims = st.lists(st.integers(0, 5), max_size=4)
tensor_lists = st.lists(
    st.builds(StoredTensor, st.text(max_size=12), st.sampled_from(sorted(ITEMSIZE)), dims.map(tuple)),
    max_size=8, unique_by=lambda tensor: tensor.name,
).filter(lambda tensors: all(tensor.name != "__metadata__" for tensor in tensors))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(tensor_lists)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tensors: list[StoredTensor]) -> None:
    """A header that is built is read back, by us and by the safetensors library; its data begin on a page."""
    header, placed = build_header(tensors, {"format": "pt"})
    assert len(header) % PAGE == 0
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    path.write_bytes(header + bytes(sum(tensor.nbytes for tensor in tensors)))
    assert sorted(read_header(path), key=lambda p: p.tensor.name) == sorted(placed, key=lambda p: p.tensor.name)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in tensors}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["U8", 0, 32]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=3), json_values | entries, max_size=3))
def test_fuzz_json(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    """Whatever JSON stands in a header, it is read or refused, and never fails otherwise."""
    check(write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 150), st.binary(min_size=1, max_size=4))
def test_fuzz_bytes(tmp_path_factory: pytest.TempPathFactory, place: int, change: bytes) -> None:
    """A sound file with some bytes changed is read or refused, and never fails otherwise."""
    path = write(tmp_path_factory.getbasetemp() / "fuzz.safetensors", SOUND)
    whole = bytearray(path.read_bytes())
    whole[place : place + len(change)] = change
    path.write_bytes(whole)
    check(path)


def check(path: Path) -> None:
    """What is read fills the file without gaps."""
    try:
        placed = read_header(path)
    except CheckpointError:
        return
    assert sum(p.tensor.nbytes for p in placed if p.tensor.dtype in ITEMSIZE) <= path.stat().st_size
    assert all(p.offset <= path.stat().st_size for p in placed)


def test_json_errors() -> None:
    """An error in JSON names the file."""
    for raw in (b"", b"[1]", b"nul", b'{"a": 1, "a": 2}', b"[" * 10**6, b"\x00\x00"):
        with pytest.raises(CheckpointError, match=r"^config\.json: "):
            parse_json(raw, "config.json")
