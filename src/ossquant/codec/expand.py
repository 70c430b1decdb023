"""The weights of a checkpoint as float32, whatever their scheme, some rows at a time; and how far two lie apart."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.checkpoint.header import parse_json
from ossquant.checkpoint.reader import Checkpoint
from ossquant.codec import bnb4, int4, mxfp4, nested
from ossquant.codec.bnb4 import Floats
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role, TensorInfo
from ossquant.plan import TensorPlan
from ossquant.scheme import INT4_GROUP, MXFP4_BLOCK, NESTED_BLOCK, Scheme, expert_name

PIECE_WEIGHTS = 2**24
STEP_WEIGHTS = 2**18  # expanded at a time: a megabyte, which stays in a core's cache
_AGAIN = "fetch or make the checkpoint again"

Expand = Callable[[int, int], Floats]  # the rows begin to end as float32 (end - begin, in)


@dataclass(frozen=True)
class Piece:
    """A unit of work: one expert of a stack, or rows begin to end of a matrix; the same for every scheme."""

    label: str
    expert: int | None
    begin: int
    end: int


def pieces(tensor: TensorInfo) -> list[Piece]:
    """Split a tensor into experts, or into rows of about 16 M weights."""
    rows, columns = _matrix_shape(tensor)
    if tensor.role is Role.EXPERTS:
        return [Piece(f"{tensor.name}[{e}]", e, 0, rows) for e in range(tensor.shape[0])]
    step = max(1, PIECE_WEIGHTS // columns)
    if rows <= step:
        return [Piece(tensor.name, None, 0, rows)]
    ranges = ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
    return [Piece(f"{tensor.name}[{begin}:{end}]", None, begin, end) for begin, end in ranges]


def expand(checkpoint: Checkpoint, entry: TensorPlan, piece: Piece) -> Iterator[Floats]:
    """Expand a piece: consecutive rows, float32 (rows, in), a megabyte at a time; vectors are one row.

    Two checkpoints of one model step through a piece alike, whatever their schemes. NF4 and FP4 are not rounded to
    bf16, as a float32 model would have them. Raises CheckpointError, UnsupportedError.
    """
    _, columns = _matrix_shape(entry.tensor)
    rows = _OPEN[entry.scheme.format](checkpoint, entry, piece.expert) if entry.scheme.format in _OPEN else None
    if rows is None:
        raise UnsupportedError(f"'{entry.tensor.name}': {entry.scheme.format} weights cannot be expanded")
    step = max(1, STEP_WEIGHTS // columns)
    for begin in range(piece.begin, piece.end, step):
        yield rows(begin, min(begin + step, piece.end))


@dataclass(frozen=True)
class Distance:
    """How far weights a lie from b: the sums of (a - b)**2 and of b**2, and the largest |a - b|."""

    squares: float = 0.0
    norm: float = 0.0
    largest: float = 0.0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(self.squares + other.squares, self.norm + other.norm, max(self.largest, other.largest))

    @property
    def relative(self) -> float:
        """The relative Frobenius error ||a - b|| / ||b||; infinite where b is all zero and a is not."""
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.norm) if self.norm else math.inf


def distance(a: Checkpoint, entry_a: TensorPlan, b: Checkpoint, entry_b: TensorPlan, piece: Piece) -> Distance:
    """Measure how far a piece of a lies from that of b, in float64. Raises CheckpointError for NaN and infinity."""
    total = Distance()
    for rows_a, rows_b in zip(expand(a, entry_a, piece), expand(b, entry_b, piece), strict=True):
        squares, norm, bits = _distance(rows_a.reshape(-1), rows_b.reshape(-1))
        total += Distance(squares, norm, float(np.int32(bits).view(np.float32)))
    if not math.isfinite(total.squares + total.norm):
        mxfp4.raise_not_finite(piece.label)
    return total


@nb.njit(nogil=True, cache=True, fastmath={"reassoc"})
def _distance(a: Any, b: Any) -> Any:
    """The sums of (a - b)**2 and b**2, and the bits of the largest |a - b| in float32."""
    squares, norm = 0.0, 0.0
    largest: Any = np.int32(0)  # a float's bits grow with it, and integers are compared many at a time
    for i in range(a.shape[0]):
        difference = np.float64(a[i]) - np.float64(b[i])
        squares += difference * difference
        norm += np.float64(b[i]) * np.float64(b[i])
        largest = max(largest, np.float32(abs(difference)).view(np.int32))
    return squares, norm, largest


def _matrix_shape(tensor: TensorInfo) -> tuple[int, int]:
    """Rows and columns of a matrix, of one expert's, or of a vector, which is one row."""
    return (1, tensor.shape[0]) if len(tensor.shape) == 1 else (tensor.shape[-2], tensor.shape[-1])


def _open_bf16(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Expand:
    rows, columns = _matrix_shape(entry.tensor)
    name = entry.stored[0].name
    if len(entry.stored) > 1:  # biases that lie beside their experts, one by one
        biases = np.concatenate([_read(checkpoint, part.name, np.uint16, 0, columns) for part in entry.stored])
        return lambda begin, end: mxfp4.to_floats(biases.reshape(rows, columns)[begin:end])
    if expert is None:
        return lambda begin, end: mxfp4.to_floats(
            _read(checkpoint, name, np.uint16, begin * columns, (end - begin) * columns).reshape(-1, columns)
        )
    # an expert lies there as (in, out), so its rows are spread over all of it
    stored = _read(checkpoint, name, np.uint16, expert * rows * columns, rows * columns).reshape(columns, rows)
    return lambda begin, end: mxfp4.to_floats(stored[:, begin:end].T)


def _open_f32(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Expand:
    _, columns = _matrix_shape(entry.tensor)
    name = entry.tensor.name
    return lambda begin, end: _read(checkpoint, name, np.float32, begin * columns, (end - begin) * columns).reshape(
        -1, columns
    )


def _open_mxfp4(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Expand:
    rows, columns = _matrix_shape(entry.tensor)
    name, groups, first = entry.tensor.name, columns // MXFP4_BLOCK, (expert or 0) * rows

    def read(begin: int, end: int) -> Floats:
        at, count = (first + begin) * groups, (end - begin) * groups
        blocks = _read(checkpoint, f"{name}_blocks", np.uint8, at * 16, count * 16)
        scales = _read(checkpoint, f"{name}_scales", np.uint8, at, count)
        return mxfp4.to_floats(mxfp4.dequantize(blocks.reshape(-1, groups, 16), scales.reshape(-1, groups), name))

    return read


def _open_bnb4(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Expand:
    scheme, (rows, columns) = entry.scheme, _matrix_shape(entry.tensor)
    name = entry.tensor.name if expert is None else expert_name(entry.tensor.name, expert)
    offset = _check_state(checkpoint, name, scheme, (rows, columns))
    blocks = columns // scheme.block_size  # of a row

    def absmax(begin: int, end: int) -> Floats:
        if not scheme.double_quant:
            return _read(checkpoint, f"{name}.absmax", np.float32, begin, end - begin)
        first, last = begin // NESTED_BLOCK, -(-end // NESTED_BLOCK)
        codes = _read(checkpoint, f"{name}.absmax", np.uint8, first * NESTED_BLOCK, end - first * NESTED_BLOCK)
        scales = _read(checkpoint, f"{name}.nested_absmax", np.float32, first, last - first)
        return nested.dequantize(codes, scales, offset)[begin - first * NESTED_BLOCK :]

    def read(begin: int, end: int) -> Floats:
        codes = _read(checkpoint, name, np.uint8, begin * columns // 2, (end - begin) * columns // 2)
        return bnb4.dequantize(codes, absmax(begin * blocks, end * blocks), scheme).reshape(-1, columns)

    return read


def _check_state(checkpoint: Checkpoint, name: str, scheme: Scheme, shape: tuple[int, int]) -> float:
    """Check that a bitsandbytes matrix says of itself what we take it for; gives its nested_offset."""
    part = checkpoint.stored[f"{name}.{scheme.state_name}"]
    state = parse_json(_read(checkpoint, part.name, np.uint8, 0, part.nbytes).tobytes(), name)
    expected = json.loads(scheme.quant_state(shape))
    offset = state.get("nested_offset", 0.0)
    differs = any(state.get(key) != expected[key] for key in expected.keys() - {"dtype", "nested_offset"})
    if differs or not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(f"'{part.name}' is not what the tensors beside it are", hint=_AGAIN)
    maps = {"quant_map": bnb4.CODEBOOK[scheme.format]}
    if scheme.double_quant:
        maps["nested_quant_map"] = nested.dynamic_map()
    for suffix, expected_map in maps.items():
        found = _read(checkpoint, f"{name}.{suffix}", np.float32, 0, expected_map.size)
        if not np.allclose(found, expected_map, rtol=0, atol=1e-6):  # NaN is close to nothing
            raise CheckpointError(f"'{name}.{suffix}' is not bitsandbytes' own", hint=_AGAIN)
    return float(offset)


def _open_int4(checkpoint: Checkpoint, entry: TensorPlan, expert: int | None) -> Expand:
    _, columns = _matrix_shape(entry.tensor)
    parts = entry.stored
    if expert is not None:
        of_one = len(parts) // entry.tensor.shape[0]
        parts = parts[expert * of_one : (expert + 1) * of_one]
    packed = next(part.name for part in parts if part.dtype == "I32" and len(part.shape) == 2)
    scale = next(part.name for part in parts if part.dtype == "BF16")

    def read(begin: int, end: int) -> Floats:
        words, groups = columns // 8, columns // INT4_GROUP
        codes = _read(checkpoint, packed, np.int32, begin * words, (end - begin) * words)
        scales = _read(checkpoint, scale, np.uint16, begin * groups, (end - begin) * groups)
        return int4.dequantize(codes.reshape(-1, words), scales.reshape(-1, groups))

    return read


_OPEN = {
    "bf16": _open_bf16,
    "f32": _open_f32,
    "mxfp4": _open_mxfp4,
    "nf4": _open_bnb4,
    "fp4": _open_bnb4,
    "int4": _open_int4,
}


def _read(checkpoint: Checkpoint, name: str, dtype: type, begin: int, count: int) -> npt.NDArray[Any]:
    """Read count elements of a stored tensor, from element begin on."""
    array: npt.NDArray[Any] = np.empty(count, dtype)
    checkpoint.read_into(name, array.view(np.uint8).data, begin * array.itemsize)
    return array
