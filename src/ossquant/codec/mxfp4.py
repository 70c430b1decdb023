"""MXFP4: 32 weights of four bits share a power of two.

Source: OCP Microscaling Formats (MX) v1.0; nibble order as in the published gpt-oss checkpoints.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.errors import CheckpointError
from ossquant.scheme import MXFP4_BLOCK

Bytes = npt.NDArray[np.uint8]
Bf16Bits = npt.NDArray[np.uint16]

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by code; bit 3 is the sign
MAX_SCALE = 252  # 2**(252 - 127) * 6 is the last finite one in bf16; 255 stands for NaN
_BF16_INF = 0x7F80


def _decoded() -> Bf16Bits:
    """The bf16 bits of every (scale, code): uint16 (256, 16)."""
    with np.errstate(over="ignore"):
        signed = np.concatenate([MAGNITUDES, -MAGNITUDES]).astype(np.float64)
        values = (signed * 2.0 ** (np.arange(256)[:, None] - 127)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


DECODED = _decoded()


def _thresholds() -> Bf16Bits:
    """For every shared exponent the least magnitude, as bits of bf16, of each code but the first: uint16 (256, 7).

    Ties go to the even code, so every other bound is the bf16 above the midpoint.
    """
    midpoints = (MAGNITUDES[:-1] + MAGNITUDES[1:]).astype(np.float64) / 2
    bits = (np.arange(0x7F81, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    bounds = midpoints * 2.0 ** (np.arange(256)[:, None] - 127)
    from_above = np.searchsorted(bits, bounds, "right")
    return np.where(np.arange(7) % 2, np.searchsorted(bits, bounds, "left"), from_above).astype(np.uint16)


_THRESHOLDS = _thresholds()
_SEEN = np.array([1 << (byte & 7) | 1 << (byte >> 4 & 7) for byte in range(256)], np.uint8)  # magnitudes of a byte
_LARGEST = np.array([max(seen.bit_length() - 1, 0) for seen in range(256)], np.uint8)  # of those seen


def dequantize(blocks: Bytes, scales: Bytes, name: str = "tensor", out: Bf16Bits | None = None) -> Bf16Bits:
    """Expand MXFP4 to bf16, exactly.

    blocks (..., G, 16) uint8, two codes a byte, the low nibble first; scales (..., G) uint8, exponent + 127.
    Returns the bits of bf16 (..., G * 32), in out if it is given: contiguous, of that shape.
    Raises CheckpointError for a scale that bf16 cannot hold.
    """
    check_scales(scales, name)
    rows = np.empty((*scales.shape[:-1], scales.shape[-1] * MXFP4_BLOCK), np.uint16) if out is None else out
    _dequantize(blocks.reshape(-1), scales.reshape(-1), DECODED, rows.reshape(-1))
    return rows


def quantize(rows: Bf16Bits, name: str = "tensor") -> tuple[Bytes, Bytes]:
    """Round bf16 to MXFP4; exact for weights that are MXFP4 values already.

    rows (..., G * 32) bits of bf16. Returns blocks (..., G, 16) and scales (..., G), uint8. The shared
    exponent is floor(log2(largest)) - 2, codes round to nearest even, as the MX specification has it.
    Raises CheckpointError for NaN and infinity.
    """
    groups = (*rows.shape[:-1], rows.shape[-1] // MXFP4_BLOCK)
    blocks, scales = np.empty((*groups, MXFP4_BLOCK // 2), np.uint8), np.empty(groups, np.uint8)
    if _quantize(rows.reshape(-1, 32), _THRESHOLDS, blocks.reshape(-1, 16), scales.reshape(-1)) >= _BF16_INF:
        raise_not_finite(name)
    return blocks, scales


def squared_error(rows: Bf16Bits, blocks: Bytes, scales: Bytes) -> tuple[float, float]:
    """What rounding lost: the sum of squared differences, and of squared weights, as `quantize` has its arguments."""
    decoded = (DECODED.astype(np.uint32) << 16).view(np.float32)
    error, norm = _squared_error(rows.reshape(-1, 32), blocks.reshape(-1, 16), scales.reshape(-1), decoded)
    return float(error), float(norm)


def to_floats(bits: Bf16Bits) -> npt.NDArray[np.float32]:
    """Widen bf16, as its bits, to float32 of the same shape."""
    wide = np.ascontiguousarray(bits).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def check_scales(scales: Bytes, name: str) -> None:
    """Raise CheckpointError for a scale whose weights bf16 cannot hold."""
    if scales.size and int(scales.max()) > MAX_SCALE:
        raise CheckpointError(f"{name}: a block scale of {scales.max()} (NaN or beyond bf16)",
                              hint="the checkpoint is damaged; fetch it again")  # fmt: skip


def check_finite(bits: Bf16Bits, name: str) -> None:
    """Raise CheckpointError for NaN or infinity among bf16 weights."""
    if bits.size and int((bits & _BF16_INF).max()) == _BF16_INF:
        raise_not_finite(name)


def raise_not_finite(name: str) -> None:
    """Raise CheckpointError for NaN or infinity among the weights."""
    raise CheckpointError(f"{name}: NaN or infinity among its weights", hint="the model is broken; do not quantize it")


@nb.njit(nogil=True, cache=True)
def _dequantize(blocks: Any, scales: Any, decoded: Any, out: Any) -> None:
    for g in range(scales.shape[0]):
        row = decoded[scales[g]]
        for j in range(16):
            byte = blocks[g * 16 + j]
            out[g * 32 + 2 * j] = row[byte & 15]
            out[g * 32 + 2 * j + 1] = row[byte >> 4]


@nb.njit(nogil=True, inline="always")
def largest_code(block: Any) -> Any:
    """The largest of the 32 magnitudes' codes of a block of 16 bytes."""
    seen = np.uint8(0)
    for i in range(16):
        seen |= _SEEN[block[i]]
    return _LARGEST[seen]


@nb.njit(nogil=True, inline="always")
def peak_bits(row: Any) -> Any:
    """The bits of the largest magnitude of some bf16."""
    peak = np.uint16(0)
    for i in range(row.shape[0]):  # a constant here would be unrolled, and then not run as vectors
        peak = max(peak, np.uint16(row[i] & np.uint16(0x7FFF)))
    return peak


@nb.njit(nogil=True, cache=True)
def _quantize(rows: Any, thresholds: Any, blocks: Any, scales: Any) -> Any:
    """Fill blocks and scales; gives the largest magnitude's bits, by which the caller sees NaN and infinity."""
    codes = np.empty(32, np.uint16)
    pairs = codes.view(np.uint32)
    largest = np.uint16(0)
    for g in range(scales.shape[0]):
        peak = peak_bits(rows[g])
        largest = max(largest, peak)
        scale = max(np.int64(peak >> np.uint16(7)) - 2, 0)
        scales[g] = scale
        bounds = thresholds[scale]
        for i in range(32):
            magnitude = np.uint16(rows[g, i] & np.uint16(0x7FFF))
            code = np.uint16(0)
            for k in range(7):
                code += np.uint16(magnitude >= bounds[k])
            codes[i] = code | (rows[g, i] >> np.uint16(12)) & np.uint16(8)
        for j in range(16):
            blocks[g, j] = pairs[j] | (pairs[j] >> np.uint32(12))
    return largest


@nb.njit(nogil=True, cache=True)
def _squared_error(rows: Any, blocks: Any, scales: Any, decoded: Any) -> Any:
    # a sum for each place in a group: sums that may run beside each other
    errors, norms = np.zeros(32, np.float64), np.zeros(32, np.float64)
    weights, coded = np.empty(32, np.float32), np.empty(32, np.float32)
    for g in range(scales.shape[0]):
        row = decoded[scales[g]]
        for j in range(16):
            coded[2 * j] = row[blocks[g, j] & np.uint8(15)]
            coded[2 * j + 1] = row[blocks[g, j] >> np.uint8(4)]
        for i in range(32):
            weights[i] = np.uint32(np.uint32(rows[g, i]) << np.uint32(16)).view(np.float32)
        for i in range(32):
            weight = np.float64(weights[i])
            off = weight - np.float64(coded[i])
            errors[i] += off * off
            norms[i] += weight * weight
    return errors.sum(), norms.sum()
