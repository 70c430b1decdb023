"""Double quantization: absmax values, less their mean, in 8 bits.

Follows bitsandbytes 0.50 on a CPU bit for bit, its rounding by table and torch's order of summation included.
"""

from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from ossquant.scheme import NESTED_BLOCK

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

_TABLE_SIZE = 65536


def quantize(absmax: Floats) -> tuple[Bytes, Floats, float]:
    """Quantize absmax (n,) float32: gives codes (n,) uint8, nested absmax (ceil(n / 256),) and the offset.

    absmax[i] is about DYNAMIC_MAP[codes[i]] * nested[i // 256] + offset.
    """
    offset = np.float32(pairwise_sum(absmax) / np.float32(absmax.size))
    codes = np.empty(absmax.size, np.uint8)
    nested = np.empty(-(-absmax.size // NESTED_BLOCK), np.float32)
    _quantize(absmax - offset, _nearest_table(), codes, nested)
    return codes, nested, float(offset)


def dequantize(codes: Bytes, nested: Floats, offset: float) -> Floats:
    """Undo `quantize`, as far as 8 bits allow."""
    scale = np.repeat(nested, NESTED_BLOCK)[: codes.size]
    restored: Floats = dynamic_map()[codes] * scale + np.float32(offset)
    return restored


@cache
def dynamic_map() -> Floats:
    """bitsandbytes' signed dynamic 8-bit type: 256 ascending float32 in [-1, 1].

    Source: 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561.
    """
    values = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        bounds = _linspace(0.1, 1.0, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - 6)) * means
        values += [*scaled, *-scaled]
    return np.sort(np.array(values, np.float32))


def _linspace(start: float, stop: float, steps: int) -> Floats:
    # torch.linspace steps from both ends, each step one fused multiply-add; float64 rounds once, too
    step = np.float64((np.float32(stop) - np.float32(start)) / np.float32(steps - 1))
    i = np.arange(steps)
    rising = np.float64(np.float32(start)) + step * i
    falling = np.float64(np.float32(stop)) - step * (steps - 1 - i)
    return np.where(i < steps // 2, rising, falling).astype(np.float32)


@cache
def _nearest_table() -> Bytes:
    """For each of 65536 points of [-1, 1], the code of the nearest value."""
    code = dynamic_map()
    midpoints = np.float32(0.5) * (code[:-1] + code[1:])
    points = np.float32(-1) + np.float32(2) * np.arange(_TABLE_SIZE, dtype=np.float32) / np.float32(_TABLE_SIZE - 1)
    return np.searchsorted(midpoints, points, side="left").astype(np.uint8)


@nb.njit(nogil=True, cache=True)
def _quantize(values: Any, table: Any, codes: Any, nested: Any) -> None:
    for b in range(nested.shape[0]):
        begin, end = b * 256, min((b + 1) * 256, values.shape[0])
        peak = np.float32(0)
        for i in range(begin, end):
            peak = max(peak, abs(values[i]))
        nested[b] = peak
        inverse = np.float32(1) / peak if peak > 0 else np.float32(0)
        for i in range(begin, end):
            if peak == 0:
                codes[i] = 0
                continue
            value = min(max(values[i] * inverse, np.float32(-1)), np.float32(1))
            half = np.float32(value + np.float32(1)) * np.float32(0.5)
            # one rounding: the original is compiled to a fused multiply-add
            point = np.float32(np.float64(half) * 65535.0 + 0.5)
            codes[i] = table[np.uint16(point)]


def pairwise_sum(values: Floats) -> np.float32:
    """Add float32 in the order in which torch's CPU sum does on one thread.

    Source: the cascade summation of ATen's SumKernel, eight lanes of four rows.
    """
    lanes = 8 if values.size >= 8 else 1
    return np.float32(_cascade_sum(np.ascontiguousarray(values), lanes))


@nb.njit(nogil=True, cache=True)
def _cascade_sum(values: Any, lanes: Any) -> Any:
    width = 4 * lanes
    vectors = values.shape[0] // lanes
    rows = vectors // 4
    level_power = 4
    while (1 << (4 * (level_power + 1))) <= rows:
        level_power += 1
    step = 1 << level_power
    level = np.zeros((4, width), np.float32)
    i = 0
    while i + step <= rows:
        for _ in range(step):
            for k in range(width):
                level[0, k] += values[i * width + k]
            i += 1
        for j in range(1, 4):
            for k in range(width):
                level[j, k] += level[j - 1, k]
                level[j - 1, k] = 0
            if i & ((step - 1) << (j * level_power)):
                break
    while i < rows:
        for k in range(width):
            level[0, k] += values[i * width + k]
        i += 1
    for j in range(1, 4):
        for k in range(width):
            level[0, k] += level[j, k]
    total = level[0, :lanes].copy()
    for v in range(rows * 4, vectors):
        for k in range(lanes):
            total[k] += values[v * lanes + k]
    for row in range(1, 4):
        for k in range(lanes):
            total[k] += level[0, row * lanes + k]
    result = np.float32(0)
    for k in range(vectors * lanes, values.shape[0]):
        result += values[k]
    for k in range(lanes):
        result += total[k]
    return result
