"""GGUF's blocks: 32 weights of a row share a scale.

Source: ggml-common.h and ggml-quants.c of llama.cpp, 2026-11-22; the same bits as gguf's own quants.
"""

from typing import Any

import numba as nb
import numpy as np

from ossquant.codec import mxfp4
from ossquant.codec.bnb4 import Floats
from ossquant.codec.mxfp4 import Bytes
from ossquant.errors import CheckpointError
from ossquant.scheme import GGML_BLOCKS

BLOCK = 32
_INFINITY = 0x7F800000  # its bits in f32


def encode(rows: Floats, format_: str, name: str = "tensor") -> Bytes:
    """Code float32 weights (rows, columns) as f32, bf16, q8_0, q5_0 or q4_0: uint8 (rows, bytes of a row).

    Raises CheckpointError for NaN, infinity, and blocks whose scale a half cannot hold.
    """
    if format_ == "f32":
        _check_finite(rows, name)
        return rows.view(np.uint8)
    if format_ == "bf16":
        bits = np.empty(rows.shape, np.uint16)
        if _bf16(rows.reshape(-1), bits.reshape(-1)) >= _INFINITY:
            mxfp4.raise_not_finite(name)
        mxfp4.check_finite(bits, name)  # the largest of f32 round to infinity
        return bits.view(np.uint8)
    nbytes = GGML_BLOCKS[format_.upper()][1]
    blocks = np.empty((rows.size // BLOCK, nbytes), np.uint8)
    scales = np.empty(len(blocks), np.float32)
    if _KERNELS[format_](rows.reshape(-1, BLOCK), scales, blocks) >= _INFINITY:
        mxfp4.raise_not_finite(name)
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.isfinite(halves).all():
        raise CheckpointError(f"{name}: weights up to {np.abs(rows).max():.3g} are too large for {format_}",
                              hint="export it in bf16")  # fmt: skip
    blocks[:, :2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(rows), -1)


def pack_mxfp4(blocks: Bytes, scales: Bytes, name: str = "tensor") -> Bytes:
    """Put MXFP4 as published, blocks (rows, G, 16) and scales (rows, G), in ggml's order: uint8 (rows, G * 17).

    The codes and scales stay; a published byte holds neighbours, ggml's holds weights j and j + 16 of its block.
    Raises CheckpointError for a scale that bf16 cannot hold.
    """
    mxfp4.check_scales(scales, name)
    packed = np.empty((*scales.shape, GGML_BLOCKS["MXFP4"][1]), np.uint8)
    _pack_mxfp4(np.ascontiguousarray(blocks), np.ascontiguousarray(scales), packed)
    return packed.reshape(len(scales), -1)


def _check_finite(rows: Floats, name: str) -> None:
    if not np.isfinite(rows).all():
        mxfp4.raise_not_finite(name)


@nb.njit(nogil=True, cache=True)
def _pack_mxfp4(blocks: Any, scales: Any, packed: Any) -> None:
    for r in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            packed[r, g, 0] = scales[r, g]
            for k in range(8):
                low, high = blocks[r, g, k], blocks[r, g, k + 8]
                packed[r, g, 2 * k + 1] = low & np.uint8(15) | high << np.uint8(4)
                packed[r, g, 2 * k + 2] = low >> np.uint8(4) | high & np.uint8(240)


@nb.njit(nogil=True, inline="always")
def _bits(weight: Any) -> Any:
    """The bits of a magnitude: they grow with it, and are compared faster."""
    return np.float32(weight).view(np.int32) & np.int32(0x7FFFFFFF)


@nb.njit(nogil=True, inline="always")
def _inverse(scale: Any) -> Any:
    if abs(scale) < np.float32(2.0**-126):  # of zero and of what has no inverse in f32
        return np.float32(0)
    return np.float32(1) / scale


@nb.njit(nogil=True, cache=True)
def _bf16(weights: Any, out: Any) -> Any:
    """Round to nearest, ties to even; gives the largest magnitude's bits."""
    largest = np.int32(0)
    for i in range(weights.shape[0]):
        largest = max(largest, _bits(weights[i]))
        bits = np.float32(weights[i]).view(np.uint32)
        out[i] = np.uint16((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))
    return largest


@nb.njit(nogil=True, cache=True)
def _q8_0(rows: Any, scales: Any, blocks: Any) -> Any:
    """Fill blocks but for their scales; gives the largest magnitude's bits."""
    largest = np.int32(0)
    for b in range(rows.shape[0]):
        peak = np.int32(0)
        for i in range(rows.shape[1]):
            peak = max(peak, _bits(rows[b, i]))
        largest = max(largest, peak)
        scale = np.int32(peak).view(np.float32) / np.float32(127)
        scales[b] = scale
        inverse = _inverse(scale)
        for i in range(rows.shape[1]):
            scaled = rows[b, i] * inverse
            magnitude = abs(scaled)
            whole = np.floor(magnitude)
            rounded = np.int32(whole + np.floor(np.float32(2) * (magnitude - whole)))  # halves away from zero
            blocks[b, 2 + i] = np.uint8(rounded if scaled >= 0 else -rounded)
    return largest


@nb.njit(nogil=True, inline="always")
def _signed_peak(row: Any) -> Any:
    """The weight of the largest magnitude, the first of several."""
    peak, found = np.int32(-1), np.float32(0)
    for i in range(row.shape[0]):
        bits = _bits(row[i])
        if bits > peak:
            peak, found = bits, row[i]
    return found


@nb.njit(nogil=True, inline="always")
def _scale(row: Any, middle: Any) -> Any:
    """The scale that makes code 0 of the largest weight, its inverse, and that weight's bits."""
    peak = _signed_peak(row)
    scale = peak / np.float32(-middle)
    return scale, _inverse(scale), _bits(peak)


@nb.njit(nogil=True, inline="always")
def _code(weight: Any, inverse: Any, middle: Any) -> Any:
    """Round to 0 … 2 * middle - 1, middle standing for zero."""
    scaled = weight * inverse + (np.float32(middle) + np.float32(0.5))
    return np.uint8(min(np.int32(scaled), 2 * middle - 1))


@nb.njit(nogil=True, cache=True)
def _q4_0(rows: Any, scales: Any, blocks: Any) -> Any:
    """Fill blocks but for their scales; gives the largest magnitude's bits."""
    largest = np.int32(0)
    for b in range(rows.shape[0]):
        scales[b], inverse, peak = _scale(rows[b], 8)
        largest = max(largest, peak)
        for j in range(16):
            low, high = _code(rows[b, j], inverse, 8), _code(rows[b, j + 16], inverse, 8)
            blocks[b, 2 + j] = low | high << np.uint8(4)
    return largest


@nb.njit(nogil=True, cache=True)
def _q5_0(rows: Any, scales: Any, blocks: Any) -> Any:
    """Fill blocks but for their scales; gives the largest magnitude's bits."""
    largest = np.int32(0)
    for b in range(rows.shape[0]):
        scales[b], inverse, peak = _scale(rows[b], 16)
        largest = max(largest, peak)
        fifth = np.uint32(0)  # the highest bit of every code
        for j in range(16):
            low, high = _code(rows[b, j], inverse, 16), _code(rows[b, j + 16], inverse, 16)
            blocks[b, 6 + j] = low & np.uint8(15) | high << np.uint8(4)
            fifth |= np.uint32(low >> np.uint8(4)) << np.uint32(j) | np.uint32(high >> np.uint8(4)) << np.uint32(j + 16)
        for k in range(4):
            blocks[b, 2 + k] = np.uint8(fifth >> np.uint32(8 * k) & np.uint32(255))
    return largest


_KERNELS = {"q8_0": _q8_0, "q5_0": _q5_0, "q4_0": _q4_0}
