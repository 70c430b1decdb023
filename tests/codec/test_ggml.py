"""GGUF's blocks, beside gguf's own code."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from ossquant.codec import ggml, mxfp4
from ossquant.codec.bnb4 import Floats
from ossquant.errors import CheckpointError

FORMATS = ("q8_0", "q5_0", "q4_0", "bf16", "f32")


def theirs(rows: Floats, format_: str) -> np.ndarray:
    return quantize(rows, GGMLQuantizationType[format_.upper()]).view(np.uint8).reshape(len(rows), -1)


def awkward(scale: float) -> Floats:
    """Normal weights, and blocks of zeros, of one value, of ties and of one weight among zeros."""
    rows = (np.random.default_rng(0).standard_normal((64, 2880)) * scale).astype(np.float32)
    rows[0, :32], rows[1, :32], rows[2, :32] = 0.0, -0.0, scale
    rows[3, :32] = (np.arange(32) - 16) * np.float32(scale)
    rows[4, :32] = np.eye(1, 32, 7, dtype=np.float32) * -scale
    rows[5, :32] = np.tile(np.float32([scale, -scale]), 16)
    return rows


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-3, 300.0, 1e-30])
def test_same_bits(format_: str, scale: float) -> None:
    """Every format has the bits that gguf's own quants give, in float32 and for bf16 values."""
    rows = awkward(scale)
    for each in (rows, (rows.view(np.uint32) & 0xFFFF0000).view(np.float32)):
        assert np.array_equal(ggml.encode(each, format_), theirs(each, format_))


# below 1e-30 a block's scale has no inverse in f32, and gguf's own code gives garbage
finite = st.floats(-60000, 60000, width=32).filter(lambda weight: not 0 < abs(weight) < 1e-30)


@pytest.mark.parametrize("format_", FORMATS)
@settings(max_examples=60, deadline=None)
@given(block=st.lists(finite, min_size=32, max_size=32))
def test_same_bits_of_any_block(format_: str, block: list[float]) -> None:
    """Of any 32 finite weights, too."""
    rows = np.array([block], np.float32)
    assert np.array_equal(ggml.encode(rows, format_), theirs(rows, format_))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(format_: str, value: float) -> None:
    """NaN and infinity are refused, wherever they stand."""
    for place in ((0, 0), (3, 2879)):
        rows = awkward(0.02)
        rows[place] = value
        with pytest.raises(CheckpointError, match="w: NaN or infinity"):
            ggml.encode(rows, format_, "w")


def test_too_large_for_a_half() -> None:
    """A block whose scale a half cannot hold is refused, not stored as infinity; bf16 and f32 hold it."""
    rows = np.full((1, 32), 1e9, np.float32)
    for format_ in ("q8_0", "q5_0", "q4_0"):
        with pytest.raises(CheckpointError, match=rf"w: weights up to 1e\+09 are too large for {format_}"):
            ggml.encode(rows, format_, "w")
    for format_ in ("bf16", "f32"):
        assert np.array_equal(ggml.encode(rows, format_), theirs(rows, format_))
    with pytest.raises(CheckpointError, match="NaN or infinity"):  # the largest f32 would round to infinity
        ggml.encode(np.full((1, 32), np.finfo(np.float32).max, np.float32), "bf16")


def test_mxfp4_keeps_every_weight() -> None:
    """Packed MXFP4 has the published codes and scales: gguf decodes the weights that we do, whatever they are."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (253, 8, 16), np.uint8)
    scales = np.repeat(np.arange(253, dtype=np.uint8)[:, None], 8, axis=1)
    packed = ggml.pack_mxfp4(blocks, scales)
    with np.errstate(over="ignore"):
        decoded = dequantize(packed, GGMLQuantizationType.MXFP4)
    expected = mxfp4.to_floats(mxfp4.dequantize(blocks, scales))
    normal = np.abs(expected) >= np.finfo(np.float32).smallest_normal  # our bf16 has fewer bits below
    assert np.array_equal(decoded[normal], expected[normal])
    assert np.abs(decoded - expected).max() <= np.finfo(np.float32).smallest_normal
    assert np.array_equal(packed.reshape(253, 8, 17)[..., 0], scales)


def test_mxfp4_of_every_second_row() -> None:
    """Gate and up, rows that take turns, are packed as if they stood alone."""
    rng = np.random.default_rng(2)
    blocks, scales = rng.integers(0, 256, (6, 4, 16), np.uint8), rng.integers(100, 130, (6, 4), np.uint8)
    whole = ggml.pack_mxfp4(blocks, scales)
    assert np.array_equal(whole[1::2], ggml.pack_mxfp4(blocks[1::2], scales[1::2]))


def test_mxfp4_scale_beyond_bf16() -> None:
    """A scale that stands for NaN or is beyond bf16 is refused."""
    with pytest.raises(CheckpointError, match="w: a block scale of 255"):
        ggml.pack_mxfp4(np.zeros((1, 1, 16), np.uint8), np.full((1, 1), 255, np.uint8), "w")
