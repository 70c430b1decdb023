"""INT4: 32 weights of four bits share a bf16 scale, as compressed-tensors packs them.

Given the scale, codes are what that library's own rounding makes of the weights on a CPU. The scale, which
the format leaves free, is the best of a few by the squared error of its group; the library's own is one.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.codec import mxfp4
from ossquant.codec.mxfp4 import Bf16Bits
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
    if not _quantize(np.ascontiguousarray(rows).reshape(-1), divisors, packed.reshape(-1), scales.reshape(-1)):
        mxfp4.raise_not_finite(name)
    return {"_weight_packed": packed.view("<i4"), "_weight_scale": scales}


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


@nb.njit(nogil=True, cache=True, error_model="numpy")
def _quantize(rows: Any, divisors: Any, packed: Any, scales: Any) -> bool:
    """Fill packed and scales; False if a weight is not finite."""
    weights = np.empty(32, np.float32)
    codes = np.empty(32, np.uint8)
    for g in range(scales.shape[0]):
        peak = np.uint16(0)
        for i in range(32):
            peak = max(peak, np.uint16(rows[g * 32 + i] & 0x7FFF))
        if peak >= _BF16_INF:
            return False
        for i in range(32):
            weights[i] = _to_float(rows[g * 32 + i])
        scales[g] = _scale(weights, _to_float(peak), divisors if peak >= _SEARCHED else divisors[:1])
        scale = _to_float(scales[g])
        for i in range(32):
            # compressed-tensors divides in bf16, so the quotient is rounded before it is rounded
            quotient = _to_float(_to_bf16(weights[i] / scale))
            codes[i] = np.uint8(np.int32(_to_integer(quotient)) + np.int32(8))
        for j in range(16):
            packed[g * 16 + j] = codes[2 * j] | (codes[2 * j + 1] << 4)
    return True


@nb.njit(nogil=True, inline="always", error_model="numpy")
def _scale(weights: Any, peak: Any, divisors: Any) -> Any:
    """The bits of the best scale for a group whose largest magnitude is peak."""
    best = min(np.uint16(_to_bf16(peak / divisors[0])), _LARGEST)
    if divisors.shape[0] == 1:
        return best if best else _EPS
    least = np.float32(np.inf)
    for divisor in divisors:
        bits = min(np.uint16(_to_bf16(peak / divisor)), _LARGEST)
        error = _error(weights, peak, _to_float(bits))
        if error < least:
            least, best = error, bits
    return best


@nb.njit(nogil=True, inline="always", error_model="numpy")
def _error(weights: Any, peak: Any, scale: Any) -> Any:
    """The squared error of a group over its squared peak, in a unit that all scales share."""
    inverse = np.float32(1) / scale
    total = np.int32(0)
    for i in range(32):
        quotient = np.float32(weights[i] * inverse)
        off = np.int32(np.float32((_to_integer(quotient) - quotient) * _FIXED))
        total += off * off
    relative = np.float32(scale / peak)
    return np.float32(np.float32(total) * np.float32(relative * relative))


@nb.njit(nogil=True, cache=True)
def _dequantize(packed: Any, scales: Any, values: Any) -> None:
    for g in range(scales.shape[0]):
        scale = _to_float(scales[g])
        for j in range(16):
            byte = packed[g * 16 + j]
            for k in range(2):
                code = np.float32(np.int32((byte >> np.uint8(4 * k)) & 15) - np.int32(8))
                values[g * 32 + 2 * j + k] = _to_float(_to_bf16(np.float32(code * scale)))
