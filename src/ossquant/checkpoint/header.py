"""The header of a safetensors file: untrusted when read, aligned when written."""

import gc
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn

from ossquant.errors import CheckpointError
from ossquant.scheme import ITEMSIZE, StoredTensor

MAX_TENSORS = 80_000  # of a checkpoint; the 120b in nf4 has 65,703
# What parsing JSON takes grows with these: the 120b in nf4, its tensors in one file, has 9 MB of header and 0.73
# million marks, and 14.5 MB of manifest.
MAX_JSON_BYTES = 24 * 2**20
_MAX_MARKS = 2**20
_MARKS = (b"{", b"[", b",", b":")
DATA_ALIGNMENT = 4096  # a page, so that a reader may map or O_DIRECT the data
# dtypes a file may hold; those outside ITEMSIZE are refused where a tensor is used, not where it is listed
_DTYPE_SIZES = ITEMSIZE | {"BOOL": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
                           "F16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8}  # fmt: skip
_KEYS = {"dtype", "shape", "data_offsets"}
_BEGIN_AND_END = itemgetter(0, 1)


@dataclass(frozen=True)
class Placed:
    """A stored tensor and where its bytes begin in its file."""

    tensor: StoredTensor
    offset: int


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the garbage collector, which takes half the time of reading headers and finds no cycle in them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_header(path: Path) -> list[Placed]:
    """Read and check the header of a safetensors file: its tensors must fill the file exactly.

    Raises CheckpointError for anything that the format does not allow.
    Source: the safetensors format description, 0.5.
    """
    with path.open("rb") as file:
        return parse_header(lambda begin, count: os.pread(file.fileno(), count, begin), path.stat().st_size, path.name)


@uncollected()
def parse_header(read: Callable[[int, int], bytes], file_size: int, where: str) -> list[Placed]:
    """Check the header of a file of file_size bytes; read(begin, count) fetches bytes of it."""
    length = int.from_bytes(read(0, 8), "little")
    if file_size < 8 or length > min(file_size - 8, MAX_JSON_BYTES):
        _refuse(where, f"header of {length} bytes in a file of {file_size}")
    entries = parse_json(read(8, length), where)
    entries.pop("__metadata__", None)
    check_count(len(entries), where)
    begin = end = 8 + length
    ranges = [_entry(name, value, where, begin) for name, value in entries.items()]
    ranges.sort(key=_BEGIN_AND_END)  # an empty tensor may begin where the next one does
    for first, last, placed in ranges:
        if first != end:
            _refuse(where, f"tensor '{_short(placed.tensor.name)}' overlaps another or leaves a gap")
        end = last
    if end != file_size:
        state = "truncated" if end > file_size else "longer than its header says"
        raise CheckpointError(f"{where}: {file_size} of {end} bytes, {state}", hint="fetch this file again")
    return [placed for _, _, placed in ranges]


def check_count(tensors: int, where: str) -> None:
    """Refuse more tensors than a checkpoint may have, be they in one file or in all. Raises CheckpointError."""
    if tensors > MAX_TENSORS:
        raise CheckpointError(f"{where}: more tensors than any model has", hint="do not trust this checkpoint")


def _entry(name: str, value: object, where: str, begin: int) -> tuple[int, int, Placed]:
    """Check one tensor's description; gives where its bytes begin and end in the file."""
    if not isinstance(value, dict) or value.keys() != _KEYS:
        _refuse(where, f"tensor '{_short(name)}' is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_SIZES:
        _refuse(where, f"tensor '{_short(name)}' has unknown dtype {_short(dtype)!r}")
    if not _naturals(shape) or len(shape) > 8 or prod(shape) > 2**48:
        _refuse(where, f"tensor '{_short(name)}' has an impossible shape")
    if not _naturals(offsets) or len(offsets) != 2:
        _refuse(where, f"tensor '{_short(name)}' has impossible data_offsets")
    first, last = offsets
    nbytes = prod(shape) * _DTYPE_SIZES[dtype]
    if last - first != nbytes:
        _refuse(where, f"tensor '{_short(name)}' has {last - first} bytes, its shape {nbytes}")
    return begin + first, begin + last, Placed(StoredTensor(name, dtype, tuple(shape)), begin + first)


def _naturals(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110  all() takes twice the time, and headers hold many short lists
        if type(value) is not int or not 0 <= value < 2**63:
            return False
    return True


def _short(text: object) -> str:
    return str(text)[:120]


def _refuse(where: str, what: str) -> NoReturn:
    raise CheckpointError(f"{where}: {what}", hint="this is not a sound safetensors file; fetch it again")


@uncollected()
def parse_json(raw: bytes, where: str, max_bytes: int = MAX_JSON_BYTES, max_marks: int = _MAX_MARKS) -> dict[str, Any]:
    """Parse a JSON object from an untrusted file: no duplicate keys, no deep nesting, no more of it than models have.

    Its marks are counted before it is parsed, which keeps it within a second and some 200 MB. Raises CheckpointError.
    """
    if len(raw) > max_bytes or sum(map(raw.count, _MARKS)) > max_marks:
        raise CheckpointError(f"{where}: more JSON than any model has", hint="do not trust this checkpoint")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise CheckpointError(f"{where}: a key stands there twice", hint="fetch this file again")
        return table

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where}: not JSON: {reason}", hint="fetch this file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: not a JSON object", hint="fetch this file again")
    return value


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, max_marks: int = _MAX_MARKS) -> dict[str, Any]:
    """Read a JSON object from an untrusted file of a sensible size. Raises CheckpointError."""
    if path.stat().st_size > max_bytes:
        raise CheckpointError(f"{path.name}: larger than any such file is", hint="fetch this file again")
    return parse_json(path.read_bytes(), path.name, max_bytes, max_marks)


def build_header(tensors: Sequence[StoredTensor], metadata: dict[str, str]) -> tuple[bytes, list[Placed]]:
    """Lay tensors out one behind the other; gives the bytes before the data, and each tensor's place.

    The caller orders them by falling itemsize, so that every tensor is aligned to its own.
    """
    begin, relative = 0, []
    table: dict[str, object] = {"__metadata__": metadata}
    for tensor in tensors:
        end = begin + tensor.nbytes
        table[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        relative.append((tensor, begin))
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    return header, [Placed(tensor, len(header) + offset) for tensor, offset in relative]
