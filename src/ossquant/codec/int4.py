"""INT4: 32 weights of four bits share a bf16 scale, as compressed-tensors packs them.

Given the scale, codes are what that library's own rounding makes of the weights on a CPU. The scale, which
the format leaves free, is the best of a few by the squared error of its group; the library's own is one.
"""

from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.codec import mxfp4
from ossquant.codec.mxfp4 import Bf16Bits, Bytes
from ossquant.scheme import INT4_GROUP

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]

MINMAX = np.array([7.5], np.float32)  # compressed-tensors' choice: the largest magnitude over half the range
# 8 spends the whole range, and clips a positive peak; 6 lands on most values of an MXFP4 group, whose peak is 6
DIVISORS = np.array([7.5, 6, 8], np.float32)

_EPS = np.uint16(0x3C00)  # 2**-7, bf16's epsilon: compressed-tensors' scale for a group of zeros
_LARGEST = np.uint16(0x7DFF)  # the last scale whose -8 is finite in bf16
_SEARCHED = np.uint16(0x1000)  # 2**-95: below it the search's inverse might overflow
_BF16_INF = np.uint16(0x7F80)
_SAFE_SCALES = (40, 240)  # between them an MXFP4 group and its INT4 scale keep clear of the limits above
_ROUND = np.float32(1.5 * 2**23)  # added and taken off again, it leaves the nearest integer, ties to even
_FIXED = np.float32(2**10)  # errors are summed as integers, so that every machine chooses the same scale


def quantize(rows: Bf16Bits, name: str = "tensor", divisors: Floats = DIVISORS) -> dict[str, npt.NDArray[Any]]:
    """Quantize a matrix. rows (out, in) bits of bf16, in a multiple of 32.

    Returns the parts by suffix, as in Scheme.stored: int32 (out, in / 8), eight codes + 8 a word, the first in
    the lowest bits; bits of bf16 (out, in / 32). Of the scales `largest magnitude / divisor` each group takes
    the one with the least squared error, the first if it makes no difference; no divisor is beyond 12.
    Raises CheckpointError for NaN and infinity.
    """
    out, columns = rows.shape
    packed = np.empty((out, columns // 2), np.uint8)
    scales = np.empty((out, columns // INT4_GROUP), np.uint16)
    if not _quantize(np.ascontiguousarray(rows).reshape(-1, 32), divisors, packed.reshape(-1, 16), scales.reshape(-1)):
        mxfp4.raise_not_finite(name)
    return {"_weight_packed": packed.view("<i4"), "_weight_scale": scales}


def transcode(blocks: Bytes, scales: Bytes, name: str = "tensor") -> dict[str, npt.NDArray[Any]]:
    """Quantize an MXFP4 matrix: blocks (out, G, 16) and scales (out, G), uint8. Returns what `quantize` does.

    Both have groups of 32, and the scale of one does not change the other's codes: a table for each largest
    magnitude and divisor has every byte's error and its new codes.
    """
    mxfp4.check_scales(scales, name)
    if scales.size and not _SAFE_SCALES[0] <= scales.min() <= scales.max() <= _SAFE_SCALES[1]:
        return quantize(mxfp4.dequantize(blocks, scales, name), name)
    packed, result = np.empty(blocks.size, np.uint8), np.empty(scales.shape, np.uint16)
    _transcode(blocks.reshape(-1, 16), scales.reshape(-1), *_byte_tables(), packed.reshape(-1, 16), result.reshape(-1))
    return {"_weight_packed": packed.reshape(scales.shape[0], -1).view("<i4"), "_weight_scale": result}


def dequantize(packed: Words, scales: Bf16Bits) -> Floats:
    """Expand to float32 (out, in), every value rounded to bf16 as compressed-tensors has it.

    packed int32 (out, in / 8), scales (out, in / 32) bits of bf16.
    """
    values = np.empty((scales.shape[0], scales.shape[1] * INT4_GROUP), np.float32)
    codes = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    _dequantize(codes.reshape(-1), np.ascontiguousarray(scales).reshape(-1), values.reshape(-1))
    return values


@nb.njit(nogil=True, inline="always")
def _to_float(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@nb.njit(nogil=True, inline="always")
def _to_bf16(value: Any) -> Any:
    """The bits of the nearest bf16, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@nb.njit(nogil=True, inline="always")
def _to_integer(quotient: Any) -> Any:
    clamped = min(max(quotient, np.float32(-8)), np.float32(7))
    return np.float32(np.float32(clamped + _ROUND) - _ROUND)


@nb.njit(nogil=True, inline="always", error_model="numpy")
def _code(weight: Any, scale: Any) -> Any:
    # compressed-tensors divides in bf16, so the quotient is rounded before it is rounded
    return np.uint8(np.int32(_to_integer(_to_float(_to_bf16(weight / scale)))) + np.int32(8))


@nb.njit(nogil=True, inline="always", error_model="numpy")
def _scale_bits(peak: Any, divisor: Any) -> Any:
    return min(np.uint16(_to_bf16(peak / divisor)), _LARGEST)


@nb.njit(nogil=True, inline="always")
def _squared_error(weight: Any, inverse: Any) -> Any:
    """The squared rounding error of a weight over its scale, in fixed point."""
    quotient = np.float32(weight * inverse)
    off = np.int32(np.float32((_to_integer(quotient) - quotient) * _FIXED))
    return np.int32(off * off)


@nb.njit(nogil=True, inline="always")
def _in_shared_unit(error: Any, scale: Any, peak: Any) -> Any:
    relative = np.float32(scale / peak)
    return np.float32(np.float32(error) * np.float32(relative * relative))


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _quantize(rows: Any, divisors: Any, packed: Any, scales: Any) -> bool:
    """Fill packed and scales; False if a weight is not finite."""
    weights = np.empty(32, np.float32)
    codes = np.empty(32, np.uint8)
    pairs = codes.view(np.uint16)
    for g in range(scales.shape[0]):
        peak = mxfp4.peak_bits(rows[g])
        if peak >= _BF16_INF:
            return False
        for i in range(32):
            weights[i] = _to_float(rows[g, i])
        scales[g] = _scale(weights, _to_float(peak), divisors if peak >= _SEARCHED else divisors[:1])
        scale = _to_float(scales[g])
        for i in range(32):
            codes[i] = _code(weights[i], scale)
        for j in range(16):
            packed[g, j] = pairs[j] | (pairs[j] >> np.uint16(4))
    return True


@nb.njit(nogil=True, inline="always", error_model="numpy")
def _scale(weights: Any, peak: Any, divisors: Any) -> Any:
    """The bits of the best scale for a group whose largest magnitude is peak."""
    best = _scale_bits(peak, divisors[0])
    if divisors.shape[0] == 1:
        return best if best else _EPS
    least = np.float32(np.inf)
    for divisor in divisors:
        bits = _scale_bits(peak, divisor)
        scale = _to_float(bits)
        inverse = np.float32(1) / scale
        error = np.int32(0)
        for i in range(weights.shape[0]):
            error += _squared_error(weights[i], inverse)
        relative = _in_shared_unit(error, scale, peak)
        if relative < least:
            least, best = relative, bits
    return best


@cache
def _byte_tables() -> tuple[npt.NDArray[np.int32], Floats, Bytes, Bf16Bits]:
    """By the largest magnitude's code (8) and divisor (3), of an MXFP4 group at the shared exponent 0.

    Gives for every byte its two weights' squared error (8, 3, 256), what brings such errors to a shared unit
    (8, 3), every byte's new codes (8, 3, 256), and the bits of the scale (8, 3).
    """
    values = np.concatenate([mxfp4.MAGNITUDES, -mxfp4.MAGNITUDES])
    errors, codes = np.zeros((8, 3, 256), np.int32), np.full((8, 3, 256), 0x88, np.uint8)
    units, scales = np.zeros((8, 3), np.float32), np.zeros((8, 3), np.uint16)
    _fill_tables(values, DIVISORS, errors, units, codes, scales)
    return errors, units, codes, scales


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _fill_tables(values: Any, divisors: Any, errors: Any, units: Any, codes: Any, scales: Any) -> None:
    for largest in range(1, 8):
        peak = values[largest]
        for d in range(3):
            scales[largest, d] = _scale_bits(peak, divisors[d])
            scale = _to_float(scales[largest, d])
            inverse = np.float32(1) / scale
            units[largest, d] = _in_shared_unit(np.int32(1), scale, peak)
            for byte in range(256):
                low, high = values[byte & 15], values[byte >> 4]
                errors[largest, d, byte] = _squared_error(low, inverse) + _squared_error(high, inverse)
                codes[largest, d, byte] = _code(low, scale) | (_code(high, scale) << 4)


@nb.njit(nogil=True, cache=True)
def _transcode(
    blocks: Any, exponents: Any, errors: Any, units: Any, codes: Any, scales: Any, packed: Any, result: Any
) -> None:
    for g in range(result.shape[0]):
        largest = mxfp4.largest_code(blocks[g])
        best, least = 0, np.float32(np.inf)
        for d in range(3):
            error = np.int32(0)
            for i in range(16):
                error += errors[largest, d, blocks[g, i]]
            relative = np.float32(np.float32(error) * units[largest, d])
            if relative < least:
                best, least = d, relative
        shift = (np.int64(exponents[g]) - 127) * 128
        result[g] = np.int64(scales[largest, best]) + shift if largest else np.int64(_EPS)
        target = codes[largest, best]
        for i in range(16):
            packed[g, i] = target[blocks[g, i]]


@nb.njit(nogil=True, cache=True)
def _dequantize(packed: Any, scales: Any, values: Any) -> None:
    for g in range(scales.shape[0]):
        scale = _to_float(scales[g])
        for j in range(16):
            byte = packed[g * 16 + j]
            for k in range(2):
                code = np.float32(np.int32((byte >> np.uint8(4 * k)) & 15) - np.int32(8))
                values[g * 32 + 2 * j + k] = _to_float(_to_bf16(np.float32(code * scale)))
