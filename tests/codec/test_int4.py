"""INT4, held against compressed-tensors itself: its codes for our scales, its values for our codes."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ossquant.codec import int4, mxfp4
from ossquant.errors import CheckpointError
from ossquant.scheme import ITEMSIZE, Scheme

ARGS = QuantizationArgs(
    num_bits=4, type=QuantizationType.INT, strategy=QuantizationStrategy.GROUP, group_size=32, symmetric=True
)
LARGEST = 0x7F7F  # of bf16
DTYPES = {"I32": np.int32, "BF16": np.uint16}


def bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def to_bf16(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


def exact(rows: np.ndarray) -> np.ndarray:
    """The values of bf16 bits, in float64."""
    return (rows.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def normal(out: int, columns: int, std: float = 0.02, seed: int = 0) -> np.ndarray:
    return bits(np.random.default_rng(seed).normal(0, std, (out, columns)).astype(np.float32))


def as_mxfp4(rows: np.ndarray) -> np.ndarray:
    return mxfp4.dequantize(*mxfp4.quantize(rows))


def parts(rows: np.ndarray, divisors: np.ndarray = int4.DIVISORS) -> tuple[np.ndarray, np.ndarray]:
    found = int4.quantize(rows, "tensor", divisors)
    return found["_weight_packed"], found["_weight_scale"]


def error(rows: np.ndarray, divisors: np.ndarray = int4.DIVISORS) -> float:
    """Relative Frobenius error."""
    values = exact(rows)
    return float(np.linalg.norm(int4.dequantize(*parts(rows, divisors)) - values) / np.linalg.norm(values))


def packed_by_library(rows: np.ndarray, scales: torch.Tensor) -> np.ndarray:
    codes = quantize(to_bf16(rows), scales, torch.zeros_like(scales), ARGS, dtype=torch.int8)
    return pack_to_int32(codes, 4).numpy()


def scales_by_library(rows: np.ndarray) -> torch.Tensor:
    groups = to_bf16(rows).unflatten(-1, (-1, 32))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)[0]


def values_by_library(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    shape = torch.Size((scales.shape[0], scales.shape[1] * 32))
    codes = unpack_from_int32(torch.from_numpy(packed), 4, shape)
    return dequantize(codes, to_bf16(scales), args=ARGS).float().numpy()


def with_zeros() -> np.ndarray:
    rows = normal(48, 256)
    rows.reshape(-1, 32)[::3] &= 0x8000  # groups of both zeros
    rows[:, ::2] = 0
    return rows


def with_ties() -> np.ndarray:
    """Groups whose scale is 1 by some divisor, of weights half-way between codes and one bit off that."""
    rows = np.empty((9, 32), np.uint16)
    for row, peak in enumerate((6, 7.5, 8)):
        halves = np.clip(np.arange(-16, 16, dtype=np.float32) / 2, -peak, peak)
        halves[halves == 0] = 0.5
        for step in range(3):
            rows[3 * row + step] = bits(halves).astype(int) + step - 1
            rows[3 * row + step, 0] = bits(np.array([peak], np.float32))[0]
    return rows


CASES = {
    "normal": normal(96, 256),
    "MXFP4 values": as_mxfp4(normal(96, 256)),
    "zeros": with_zeros(),
    "all zero": np.zeros((4, 64), np.uint16),
    "ties": with_ties(),
    "every bit pattern": np.random.default_rng(3).permutation(
        np.array([b for b in range(1 << 16) if b & 0x7FFF < 0x7E00], np.uint16)[: 32 * 2000]
    ).reshape(250, 256),
    "denormals": np.random.default_rng(4).integers(0, 0x100, (64, 64), dtype=np.uint16),
    "denormals, a few steps": np.random.default_rng(5).integers(0, 5, (64, 64), dtype=np.uint16),
    "near the end of the search": np.random.default_rng(6).integers(0x0E00, 0x1100, (64, 64), dtype=np.uint16),
    "huge": np.random.default_rng(7).integers(0x7C00, 0x7E00, (64, 64), dtype=np.uint16),
    "one group": normal(1, 32),
    "odd shapes": normal(37, 32 * 13),
    "a few large": bits(np.random.default_rng(8).standard_t(2, (64, 320)).astype(np.float32)),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_codes_are_the_librarys(case: str) -> None:
    """Given our scales, compressed-tensors rounds and packs the same words."""
    packed, scales = parts(CASES[case])
    assert packed.tobytes() == packed_by_library(CASES[case], to_bf16(scales)).tobytes()


@every_case
def test_values_are_the_librarys(case: str) -> None:
    """compressed-tensors decodes our words to what dequantize gives."""
    packed, scales = parts(CASES[case])
    assert int4.dequantize(packed, scales).tobytes() == values_by_library(packed, scales).tobytes()


@every_case
def test_minmax_is_the_librarys(case: str) -> None:
    """With its one divisor, scales and words are what compressed-tensors makes of the weights, bit for bit."""
    packed, scales = parts(CASES[case], int4.MINMAX)
    expected = scales_by_library(CASES[case])
    assert scales.tobytes() == expected.view(torch.int16).numpy().tobytes()
    assert packed.tobytes() == packed_by_library(CASES[case], expected).tobytes()


@every_case
def test_no_group_is_worse_than_the_librarys(case: str) -> None:
    """The chosen scale serves each group as well as compressed-tensors', but for bf16's rounding of its values."""
    groups = exact(CASES[case]).reshape(-1, 32)

    def errors(divisors: np.ndarray) -> np.ndarray:
        values = int4.dequantize(*parts(CASES[case], divisors)).reshape(-1, 32)
        return np.linalg.norm(values - groups, axis=1)

    rounding = np.abs(groups).max(axis=1) / 64
    assert (errors(int4.DIVISORS) <= errors(int4.MINMAX) + rounding).all()


def test_every_code_at_every_scale() -> None:
    """Sixteen codes times every finite scale are what compressed-tensors makes of them, overflow and all."""
    scales = np.arange(0x7F80, dtype=np.uint16).reshape(-1, 1)
    packed = np.tile(np.array([0x76543210, 0xFEDCBA98] * 2, np.uint32).view(np.int32), (len(scales), 1))
    assert int4.dequantize(packed, scales).tobytes() == values_by_library(packed, scales).tobytes()


def test_parts_are_as_stored() -> None:
    """Suffixes, dtypes and shapes are those of Scheme.stored."""
    found = int4.quantize(normal(64, 96))
    stored = Scheme("int4").stored("model.layers.0.mlp.experts.gate_up_proj", (1, 64, 96))
    assert [part.name.rpartition("w13")[2] for part in stored] == list(found)
    for part, array in zip(stored, found.values(), strict=True):
        assert array.shape == part.shape
        assert array.dtype == DTYPES[part.dtype]
        assert array.itemsize == ITEMSIZE[part.dtype]
        assert array.flags.c_contiguous


def test_transposed_view() -> None:
    """A view that is not contiguous is coded by its values."""
    rows = normal(64, 96)
    assert parts(np.ascontiguousarray(rows.T).T)[0].tobytes() == parts(rows)[0].tobytes()


def test_largest_weights_stay_finite() -> None:
    """Weights at the end of bf16 decode to finite ones, where compressed-tensors' scale makes them infinite."""
    rows = np.full((2, 64), LARGEST, np.uint16)
    rows[1] |= 0x8000
    packed, scales = parts(rows)
    assert packed.tobytes() == packed_by_library(rows, to_bf16(scales)).tobytes()
    assert np.isfinite(int4.dequantize(packed, scales)).all()
    assert np.isfinite(int4.dequantize(*parts(rows, int4.MINMAX))).all()
    assert np.abs(int4.dequantize(packed, scales) / exact(rows) - 1).max() < 0.126  # a positive peak is clipped to 7/8
    theirs = scales_by_library(rows).view(torch.int16).numpy().view(np.uint16)
    assert np.isinf(values_by_library(packed_by_library(rows, to_bf16(theirs)), theirs)).any()


@pytest.mark.parametrize("weight", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
@pytest.mark.parametrize("place", [0, 31, 95])
def test_not_finite(weight: int, place: int) -> None:
    """Infinity and NaN are refused, wherever they stand."""
    rows = normal(3, 96)
    rows[1, place] = weight
    with pytest.raises(CheckpointError, match=r"down_proj: NaN or infinity"):
        int4.quantize(rows, "down_proj")


@pytest.mark.parametrize("std", [1e-20, 0.02, 1e20])
def test_error(std: float) -> None:
    """The search takes 5 % off the error of normal weights and 13 % off that of MXFP4 values, at any size."""
    rows = normal(512, 1024, std)
    assert error(rows) < 0.0905
    assert error(rows) < 0.95 * error(rows, int4.MINMAX)
    assert error(as_mxfp4(rows)) < 0.081
    assert error(as_mxfp4(rows)) < 0.87 * error(as_mxfp4(rows), int4.MINMAX)


@pytest.mark.parametrize(("low", "high"), [(112, 124), (40, 240), (0, 252)])
def test_from_mxfp4_is_from_its_bf16(low: int, high: int) -> None:
    """The table gives what the arithmetic gives: small and zero groups, both zeros, scales near the limits."""
    generator = np.random.default_rng(low)
    blocks = generator.integers(0, 256, (640, 90, 16), dtype=np.uint8)
    scales = generator.integers(low, high + 1, (640, 90), dtype=np.uint8)
    blocks[::7] &= 0x99  # no magnitude but 0 and 0.5
    blocks[::11] &= 0x88  # only zeros
    blocks[::13] &= 0xBB
    found, expected = int4.transcode(blocks, scales), int4.quantize(mxfp4.dequantize(blocks, scales))
    assert found.keys() == expected.keys()
    for suffix, part in expected.items():
        assert found[suffix].dtype == part.dtype
        np.testing.assert_array_equal(found[suffix], part)


@pytest.mark.parametrize("scale", [253, 255])
def test_scale_beyond_bf16(scale: int) -> None:
    """A shared exponent that bf16 cannot hold is refused, and named."""
    with pytest.raises(CheckpointError, match="experts: a block scale of"):
        int4.transcode(np.zeros((1, 1, 16), np.uint8), np.full((1, 1), scale, np.uint8), "experts")


def test_exact_where_it_can_be() -> None:
    """Groups of whole multiples of a power of two, up to 6, lose nothing; a scale of 1 / 7.5 would."""
    codes = np.random.default_rng(9).choice(np.array([0, 1, 2, 3, 4, 6, -1, -2, -3, -4, -6], np.float32), (64, 64))
    codes[:, ::32] = 6
    rows = bits(codes * np.float32(2**-7))
    assert np.array_equal(int4.dequantize(*parts(rows)), exact(rows))
    assert error(rows, int4.MINMAX) > 0.05


def test_full_size() -> None:
    """An expert's gate_up_proj of the published size, 5760 x 2880, of MXFP4 values."""
    rows = as_mxfp4(normal(5760, 2880))
    packed, scales = parts(rows)
    assert packed.shape == (5760, 360)
    assert scales.shape == (5760, 90)
    assert packed.tobytes() == packed_by_library(rows, to_bf16(scales)).tobytes()
    assert int4.dequantize(packed, scales).tobytes() == values_by_library(packed, scales).tobytes()


@settings(max_examples=200, deadline=None)
@given(arrays(np.uint16, (2, 64), elements=st.integers(0, 0xFFFF).filter(lambda b: b & 0x7FFF < 0x7F80)))
def test_any_finite_weights(rows: np.ndarray) -> None:
    """Of any finite weights codes and values are the library's, values finite and no farther off than a step."""
    packed, scales = parts(rows)
    values = int4.dequantize(packed, scales)
    assert packed.tobytes() == packed_by_library(rows, to_bf16(scales)).tobytes()
    assert values.tobytes() == values_by_library(packed, scales).tobytes()
    assert np.isfinite(values).all()
    peak = np.abs(exact(rows)).reshape(-1, 32).max(axis=1)
    off = np.abs(values - exact(rows)).reshape(-1, 32).max(axis=1)
    assert (off <= peak / 5 + 2.0**-130).all()
