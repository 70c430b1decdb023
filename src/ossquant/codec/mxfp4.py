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
    if _quantize(rows.reshape(-1), blocks.reshape(-1), scales.reshape(-1)) >= _BF16_INF:
        raise_not_finite(name)
    return blocks, scales


def squared_error(rows: Bf16Bits, blocks: Bytes, scales: Bytes) -> tuple[float, float]:
    """What rounding lost: the sum of squared differences, and of squared weights, as `quantize` has its arguments."""
    error, norm = _squared_error(rows.reshape(-1), blocks.reshape(-1), scales.reshape(-1), DECODED)
    return float(error), float(norm)


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


@nb.njit(nogil=True, cache=True)
def _quantize(rows: Any, blocks: Any, scales: Any) -> Any:
    """Fill blocks and scales; gives the largest magnitude's bits, by which the caller sees NaN and infinity."""
    codes: Any = np.empty(32, np.uint8)
    largest: Any = np.uint16(0)
    for g in range(scales.shape[0]):
        peak: Any = np.uint16(0)
        for i in range(32):
            peak = max(peak, np.uint16(rows[g * 32 + i] & 0x7FFF))
        largest = max(largest, peak)
        scale: Any = max(np.int32(peak >> 7) - 2, 0)
        inverse = np.float32(2.0) ** np.float32(127 - scale)
        for i in range(32):
            bits = rows[g * 32 + i]
            a = np.uint32(np.uint32(bits & 0x7FFF) << np.uint32(16)).view(np.float32) * inverse
            # ties go to the even code
            code = (np.uint8(a > 0.25) + np.uint8(a >= 0.75) + np.uint8(a > 1.25) + np.uint8(a >= 1.75)
                    + np.uint8(a > 2.5) + np.uint8(a >= 3.5) + np.uint8(a > 5.0))  # fmt: skip
            codes[i] = code | np.uint8(bits >> 12) & np.uint8(8)
        scales[g] = scale
        for j in range(16):
            blocks[g * 16 + j] = codes[2 * j] | (codes[2 * j + 1] << 4)
    return largest


@nb.njit(nogil=True, cache=True)
def _squared_error(rows: Any, blocks: Any, scales: Any, decoded: Any) -> Any:
    error, norm = np.float64(0), np.float64(0)
    for g in range(scales.shape[0]):
        row = decoded[scales[g]]
        for j in range(16):
            byte = blocks[g * 16 + j]
            for half in range(2):
                bits = rows[g * 32 + 2 * j + half]
                code = (byte >> (4 * half)) & 15
                weight = np.float64(np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32))
                coded = np.float64(np.uint32(np.uint32(row[code]) << np.uint32(16)).view(np.float32))
                error += (weight - coded) ** 2
                norm += weight**2
    return error, norm
