"""MXFP4: 32 weights share a power of two."""

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossquant.codec import mxfp4
from ossquant.errors import CheckpointError

MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_blocks(*groups: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*groups, 16), dtype=np.uint8)


def bits(values: torch.Tensor) -> np.ndarray:
    return values.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def values(rows: np.ndarray) -> np.ndarray:
    """The exact values of bf16 bits."""
    return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def reference(rows: np.ndarray) -> np.ndarray:
    """Round to MXFP4 as the MX specification words it, weight by weight, in float64; gives the values."""
    exact = values(rows).reshape(-1, 32)
    rounded = np.empty_like(exact)
    for g, group in enumerate(exact):
        peak = np.abs(group).max()
        exponent = max(int(np.floor(np.log2(peak))) - 2, -127) if peak else 0
        for i, weight in enumerate(group):
            scaled = abs(weight) / 2.0**exponent
            distances = [abs(scaled - magnitude) for magnitude in MAGNITUDES]
            nearest = [code for code in range(8) if distances[code] == min(distances)]
            code = next(code for code in nearest if len(nearest) == 1 or code % 2 == 0)
            rounded[g, i] = np.copysign(MAGNITUDES[code] * 2.0**exponent, weight)
    return rounded.reshape(rows.shape)


def test_dequantize_every_code() -> None:
    """Every code of every scale that bf16 can hold is what transformers makes of it."""
    scales = np.repeat(np.arange(253, dtype=np.uint8), 16).reshape(1, 253, 16)
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 253, 1, 1))
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).mT
    assert np.array_equal(mxfp4.dequantize(blocks, scales), bits(expected))


def test_dequantize_stack() -> None:
    """A stack (expert, out, G, 16) expands to (expert, out, in); transformers gives it transposed."""
    blocks, scales = random_blocks(3, 64, 6), np.random.default_rng(1).integers(110, 130, (3, 64, 6), dtype=np.uint8)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert expected.shape == (3, 192, 64)
    assert np.array_equal(mxfp4.dequantize(blocks, scales), bits(expected.mT))


@pytest.mark.parametrize(("low", "high"), [(118, 124), (0, 3), (249, 252), (0, 252)])
def test_round_trip(low: int, high: int) -> None:
    """Weights that are MXFP4 values come back exactly, the sign of zero included, wherever their scale lies."""
    blocks = random_blocks(40, 9)
    blocks[::3] &= 0x99  # groups of small codes only
    blocks[::5] = 0
    scales = np.random.default_rng(2).integers(low, high + 1, (40, 9), dtype=np.uint8)
    rows = mxfp4.dequantize(blocks, scales)
    assert np.array_equal(mxfp4.dequantize(*mxfp4.quantize(rows)), rows)


def test_rounds_to_nearest_even() -> None:
    """Any bf16 weight goes to the nearest code, ties to the even one, as a slow independent reference has it."""
    rng = np.random.default_rng(3)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 7.5, -0.25, -0.75, -5.0, 0.0, -0.0, 6.0, 4.0]
    near_ties = [np.nextafter(np.float32(t), np.float32(8)) for t in ties]
    rows = np.concatenate([
        bits(torch.tensor(rng.permutation(ties * 2).reshape(1, 32))),
        bits(torch.tensor(np.array(ties + near_ties).reshape(1, 32) * 2.0**-100)),
        bits(torch.tensor(rng.standard_normal((50, 32)) * 0.02)),
        rng.integers(0, 0x7F80, (50, 32), dtype=np.uint16) | (rng.integers(0, 2, (50, 32), dtype=np.uint16) << 15),
        rng.integers(0, 0x0280, (50, 32), dtype=np.uint16),  # where bf16 runs out of exponents
        np.zeros((1, 32), np.uint16),
    ])  # fmt: skip
    found = values(mxfp4.dequantize(*mxfp4.quantize(rows)))
    expected = reference(rows)
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_scale_beyond_bf16(scale: int) -> None:
    """A scale that stands for NaN, or for weights beyond bf16, is refused by its tensor's name."""
    scales = np.full((2, 3), 120, np.uint8)
    scales[1, 2] = scale
    with pytest.raises(CheckpointError, match=f"down_proj.*{scale}"):
        mxfp4.dequantize(random_blocks(2, 3), scales, "down_proj")


@pytest.mark.parametrize("broken", [0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81], ids=hex)
def test_not_finite(broken: int) -> None:
    """NaN and infinity of either sign are refused by their tensor's name."""
    rows = np.full((3, 64), 0x3F80, np.uint16)
    rows[2, 63] = broken
    with pytest.raises(CheckpointError, match="down_proj: NaN or infinity"):
        mxfp4.quantize(rows, "down_proj")
