"""NF4 and FP4: bitsandbytes' 4-bit types, one absmax for each block of 32 or 64 weights.

Output is bit-identical to bitsandbytes' quantize_4bit on a CPU, many times faster. From MXFP4 no weight is
ever expanded: a code depends only on the block's largest code, the distance of the two scales and the source
byte, so a table maps each source byte to a target byte.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.codec import mxfp4, nested
from ossquant.codec.mxfp4 import Bf16Bits, Bytes
from ossquant.errors import CheckpointError
from ossquant.scheme import Scheme

Floats = npt.NDArray[np.float32]

# The value of each code, as bitsandbytes has them. Sources: QLoRA, arXiv:2305.14314 (nf4); the float with two
# exponent bits and one mantissa bit, over its largest (fp4).
CODEBOOK: Mapping[str, Floats] = {
    "nf4": np.array([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                     0.7229568362236023, 1.0], np.float32),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)
    / np.float32(12),
}  # fmt: skip

_TINY = np.float32(1e-38)  # bitsandbytes' floor under an absmax that it divides by
_GAP_MIN, _GAP_MAX = -5, 40  # scale distances the table knows; beyond the last every weight is next to zero
_SAFE_SCALES = (40, 240)  # between them no product of the table's arithmetic leaves the normal floats
_PEAKS = (mxfp4.DECODED[:, :8].astype(np.uint32) << 16).view(np.float32)  # by scale and largest code


def quantize(rows: Bf16Bits, scheme: Scheme, name: str = "tensor") -> dict[str, npt.NDArray[Any]]:
    """Quantize a matrix. rows (out, in) bits of bf16.

    Returns the parts by suffix, as in Scheme.stored. Raises CheckpointError for NaN and infinity.
    """
    codes, absmax = encode(rows, scheme, name)
    return {"": codes, **statistics(absmax, scheme, (rows.shape[0], rows.shape[1]), name)}


def encode(rows: Bf16Bits, scheme: Scheme, name: str = "tensor") -> tuple[Bytes, Floats]:
    """Code a matrix, or some rows of one: codes (n / 2, 1) uint8 and absmax (n / block,) float32.

    Raises CheckpointError for NaN and infinity.
    """
    flat = np.ascontiguousarray(rows).reshape(-1)
    codes, absmax = np.empty(flat.size // 2, np.uint8), np.empty(flat.size // scheme.block_size, np.float32)
    runs = scheme.block_size // 32
    _quantize(flat.reshape(-1, 32), runs, _thresholds(scheme.format), *_steps(scheme.format),
              codes.reshape(-1, 16), absmax)  # fmt: skip
    if not np.isfinite(absmax).all():
        mxfp4.raise_not_finite(name)
    return codes.reshape(-1, 1), absmax


def transcode(blocks: Bytes, scales: Bytes, scheme: Scheme, name: str = "tensor") -> dict[str, npt.NDArray[Any]]:
    """Quantize an MXFP4 matrix: blocks (out, G, 16) and scales (out, G), uint8. Returns what `quantize` does."""
    mxfp4.check_scales(scales, name)
    low, high = (int(scales.min()), int(scales.max())) if scales.size else (127, 127)
    if low < _SAFE_SCALES[0] or high > _SAFE_SCALES[1] or high - low > 100:
        return quantize(mxfp4.dequantize(blocks, scales, name), scheme, name)
    rows, groups = scales.shape
    codes = np.empty(blocks.size, np.uint8)
    absmax = np.empty(scales.size * 32 // scheme.block_size, np.float32)
    runs = scheme.block_size // 32
    _transcode(blocks.reshape(-1, 16), scales.reshape(-1), runs, _byte_table(scheme.format), _PEAKS,
               codes.reshape(-1, 16), absmax)  # fmt: skip
    return {"": codes.reshape(-1, 1), **statistics(absmax, scheme, (rows, groups * 32), name)}


def dequantize(codes: Bytes, absmax: Floats, scheme: Scheme) -> Floats:
    """Expand codes (n / 2, ...) and absmax (n / block,) to float32 (n,)."""
    values = _pairs(scheme.format).take(codes.reshape(-1), axis=0).reshape(-1, scheme.block_size)
    values *= absmax[:, None]
    return values.reshape(-1)


def statistics(absmax: Floats, scheme: Scheme, shape: tuple[int, int], name: str) -> dict[str, npt.NDArray[Any]]:
    """What stands beside the codes of a matrix (out, in), by suffix. Raises CheckpointError for too large weights."""
    parts: dict[str, npt.NDArray[Any]] = {".quant_map": CODEBOOK[scheme.format]}
    offset = 0.0
    if scheme.double_quant:
        parts[".absmax"], parts[".nested_absmax"], offset = nested.quantize(absmax)
        if not np.isfinite(offset):
            raise CheckpointError(
                f"{name}: its weights are too large for double quantization", hint="--no-double-quant"
            )
        parts[".nested_quant_map"] = nested.dynamic_map()
    else:
        parts[".absmax"] = absmax
    parts[f".{scheme.state_name}"] = np.frombuffer(scheme.quant_state(shape, offset), np.uint8)
    return parts


@cache
def _pairs(quant_type: str) -> Floats:
    """float32 (256, 2): the two values of a byte, the high nibble's first."""
    book, byte = CODEBOOK[quant_type], np.arange(256)
    return np.stack([book[byte >> 4], book[byte & 15]], axis=-1)


@cache
def _bounds(quant_type: str) -> tuple[Floats, Bytes]:
    """The 15 midpoints between neighbouring values, and the code of each value in ascending order."""
    book = CODEBOOK[quant_type]
    order = np.argsort(book, kind="stable")
    return (book[order[:-1]] + book[order[1:]]) / np.float32(2), order.astype(np.uint8)


@cache
def _steps(quant_type: str) -> tuple[npt.NDArray[np.uint16], np.uint16]:
    """From each code to the next by value, modulo 2**16, and the code of the least value."""
    codes = _bounds(quant_type)[1].astype(np.uint16)
    return np.diff(codes), codes[0]


@cache
def _thresholds(quant_type: str) -> npt.NDArray[np.int16]:
    """int16 (32768, 15): for an absmax's bits of bf16, the least weight beyond each midpoint.

    A weight is its bits' magnitude under its sign, an order that compares as the floats do. bitsandbytes
    compares weight * (1 / absmax) in float32, which rises with the weight: the bound is found by halving.
    """
    midpoints, _ = _bounds(quant_type)
    absmax = (np.arange(2**15, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # NaN, which is refused
        inverse = np.float32(1) / np.maximum(absmax, _TINY)[:, None]
        low, high = np.full((2**15, 15), -(2**15)), np.full((2**15, 15), 2**15 - 1)
        while (low < high).any():
            middle = (low + high) >> 1
            bits = np.abs(middle).astype(np.uint32) << 16 | (middle < 0).astype(np.uint32) << 31
            beyond = bits.view(np.float32) * inverse > midpoints
            low, high = np.where(beyond, low, middle + 1), np.where(beyond, middle, high)
    return high.astype(np.int16)


@cache
def _byte_table(quant_type: str) -> Bytes:
    """uint8 (8, gaps, 256): the target byte for a block's largest code, its scale's lead, and a source byte.

    MXFP4 has the low nibble first, bitsandbytes the high one.
    """
    midpoints, order = _bounds(quant_type)
    signed = np.concatenate([mxfp4.MAGNITUDES, -mxfp4.MAGNITUDES])
    source = np.arange(256)
    table = np.empty((8, _GAP_MAX - _GAP_MIN + 1, 256), np.uint8)
    for largest in range(8):
        inverse = np.float32(1) / mxfp4.MAGNITUDES[largest] if largest else np.float32(0)
        for gap in range(_GAP_MIN, _GAP_MAX + 1):
            scaled = signed * np.float32(2.0**-gap) * inverse
            code = order[(scaled[:, None] > midpoints).sum(axis=1)]
            table[largest, gap - _GAP_MIN] = (code[source & 15] << 4) | code[source >> 4]
    return table


@nb.njit(nogil=True, cache=True)
def _quantize(rows: Any, runs: Any, thresholds: Any, steps: Any, first: Any, codes: Any, absmax: Any) -> None:
    """rows (n / 32, 32) bits of bf16, of which runs (one or two) make a block."""
    ranks = np.empty(32, np.uint16)
    pairs = ranks.view(np.uint32)
    for b in range(absmax.shape[0]):
        peak = np.uint16(0)
        for r in range(b * runs, (b + 1) * runs):
            peak = max(peak, mxfp4.peak_bits(rows[r]))
        absmax[b] = np.uint32(np.uint32(peak) << np.uint32(16)).view(np.float32)
        bounds = thresholds[peak]
        for r in range(b * runs, (b + 1) * runs):
            for i in range(32):
                bits = np.int16(rows[r, i])
                sign = np.int16(bits >> np.int16(15))
                weight = np.int16(np.int16(np.int16(bits & np.int16(0x7FFF)) ^ sign) - sign)
                rank = first
                for k in range(15):
                    rank += np.uint16(np.uint16(weight >= bounds[k]) * steps[k])
                ranks[i] = rank
            for i in range(16):
                codes[r, i] = (pairs[i] << np.uint32(4)) | (pairs[i] >> np.uint32(16))


@nb.njit(nogil=True, cache=True)
def _transcode(blocks: Any, scales: Any, runs: Any, table: Any, peaks: Any, codes: Any, absmax: Any) -> None:
    """blocks (G, 16) of MXFP4, of which runs (one or two) make a block of ours."""
    for b in range(absmax.shape[0]):
        lead_scale: Any = 0
        lead_code, lead = np.int64(0), np.float32(-1)
        for r in range(b * runs, (b + 1) * runs):
            largest = mxfp4.largest_code(blocks[r])
            peak = peaks[scales[r], largest]
            if peak > lead:
                lead_scale, lead_code, lead = np.int64(scales[r]), np.int64(largest), peak
        absmax[b] = lead
        for r in range(b * runs, (b + 1) * runs):
            gap = min(max(lead_scale - np.int64(scales[r]), _GAP_MIN), _GAP_MAX) - _GAP_MIN
            target = table[lead_code, gap]
            for i in range(16):
                codes[r, i] = target[blocks[r, i]]
