"""NF4 and FP4, held against bitsandbytes itself: every part of every matrix, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ossquant.codec import bnb4, mxfp4
from ossquant.errors import CheckpointError
from ossquant.scheme import BNB_FORMATS, Scheme

Parts = dict[str, np.ndarray]
Blocks = tuple[np.ndarray, np.ndarray]  # of MXFP4: blocks (out, G, 16) and scales (out, G)

SCHEMES = [Scheme(kind, block, double) for kind in BNB_FORMATS for block in (32, 64) for double in (True, False)]
SINGLE = [scheme for scheme in SCHEMES if not scheme.double_quant]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
every_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.block_size}-{'double' if s.double_quant else 'single'}"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's mean, the offset of the absmax, differs in the last bit with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(trained: Path) -> dict[str, torch.Tensor]:
    """The tensors of the trained model, as the safetensors library reads them."""
    return {name: tensor for path in trained.glob("*.safetensors") for name, tensor in load_file(path).items()}


def to_bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def to_bf16(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows).view(np.int16)).view(torch.bfloat16)


def assert_like_bitsandbytes(found: Parts, rows: np.ndarray, scheme: Scheme) -> None:
    """Compare names, dtypes, shapes and bits; of the quant state, which is JSON, the values."""
    codes, state = bnb.quantize_4bit(
        to_bf16(rows), blocksize=scheme.block_size, compress_statistics=scheme.double_quant, quant_type=scheme.format
    )
    expected = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    assert found.keys() == expected.keys()
    for name, part in expected.items():
        if "quant_state" in name:
            assert json.loads(found[name].tobytes()) == json.loads(part.numpy().tobytes())
        else:
            assert found[name].dtype == part.numpy().dtype, name
            assert found[name].shape == part.shape, name
            assert found[name].tobytes() == part.numpy().tobytes(), name


def random_mxfp4(rows: int, groups: int, low: int = 118, high: int = 124, seed: int = 0) -> Blocks:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8),
        rng.integers(low, high + 1, (rows, groups), dtype=np.uint8),
    )


@every_scheme
def test_trained_attention(weights: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Each q, k, v and o projection of the trained model, from bf16, is what bitsandbytes makes of it."""
    names = [name for name in weights if name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))]
    assert len(names) == 4 * 4
    for name in names:
        rows = to_bits(weights[name])
        assert_like_bitsandbytes(bnb4.quantize(rows, scheme), rows, scheme)


@every_scheme
def test_trained_experts(weights: dict[str, torch.Tensor], scheme: Scheme) -> None:
    """Each expert's two matrices, from MXFP4 and from bf16, are what bitsandbytes makes of them."""
    names = [name.removesuffix("_blocks") for name in weights if name.endswith("_blocks")]
    assert len(names) == 2 * 4
    for name in names:
        for blocks, scales in zip(weights[f"{name}_blocks"].numpy(), weights[f"{name}_scales"].numpy(), strict=True):
            rows = mxfp4.dequantize(blocks, scales)
            assert_like_bitsandbytes(bnb4.transcode(blocks, scales, scheme), rows, scheme)
            assert_like_bitsandbytes(bnb4.quantize(rows, scheme), rows, scheme)


@pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("fp4", 32)], ids=str)
def test_real_size(scheme: Scheme) -> None:
    """So is a gate_up_proj of the published size, 5760 x 2880."""
    blocks, scales = random_mxfp4(5760, 90)
    rows = mxfp4.dequantize(blocks, scales)
    found = bnb4.transcode(blocks, scales, scheme)
    assert_like_bitsandbytes(found, rows, scheme)
    again = bnb4.quantize(rows, scheme)
    assert all(again[name].tobytes() == part.tobytes() for name, part in found.items())


def with_zero_blocks() -> Blocks:
    blocks, scales = random_mxfp4(48, 8)
    empty = np.random.default_rng(1).random((48, 8)) < 0.4
    blocks[empty] &= 0x88  # zeros of both signs
    return blocks, scales


def with_small_codes(low: int, high: int) -> Blocks:
    """Every other group of 32 is of magnitudes 0 and 0.5, so that the larger scale need not lead its block."""
    blocks, scales = random_mxfp4(96, 8, low, high)
    blocks[:, ::2] &= 0x99
    blocks[::3] &= 0x99
    return blocks, scales


MXFP4_CASES = {
    "zero blocks": with_zero_blocks(),
    "all zero": (np.zeros((4, 6, 16), np.uint8), np.full((4, 6), 120, np.uint8)),
    "small codes": with_small_codes(118, 124),
    "small codes near zero": with_small_codes(0, 3),
    "scales far apart": random_mxfp4(64, 6, 90, 150),
    "as far as a table goes": random_mxfp4(64, 6, 40, 140),
    "farther than it goes": random_mxfp4(64, 6, 40, 200),
    "near zero": random_mxfp4(16, 4, 0, 3),
    "at the table's lower end": random_mxfp4(16, 4, 38, 42),
    "at the table's upper end": random_mxfp4(16, 4, 230, 240),
    "odd number of blocks": random_mxfp4(37, 14),
    "one block more than nested": random_mxfp4(257, 2),
    "one block": random_mxfp4(1, 2),
    "three blocks": random_mxfp4(3, 2),
    "seven blocks": random_mxfp4(7, 2),
    "nine blocks": random_mxfp4(9, 2),
}


@every_scheme
@pytest.mark.parametrize("case", MXFP4_CASES)
def test_edges_from_mxfp4(case: str, scheme: Scheme) -> None:
    """Zeros, scales at any distance and tails of any length give bitsandbytes' bits, by table or not."""
    blocks, scales = MXFP4_CASES[case]
    rows = mxfp4.dequantize(blocks, scales)
    assert_like_bitsandbytes(bnb4.transcode(blocks, scales, scheme), rows, scheme)


@pytest.mark.parametrize("scheme", SINGLE, ids=str)
@pytest.mark.parametrize(("low", "high"), [(249, 252), (0, 252)])
def test_largest_scales(low: int, high: int, scheme: Scheme) -> None:
    """Up to the largest finite scale codes and absmax are bitsandbytes'."""
    blocks, scales = random_mxfp4(64, 6, low, high)
    assert_like_bitsandbytes(bnb4.transcode(blocks, scales, scheme), mxfp4.dequantize(blocks, scales), scheme)


def random_bits(rows: int, columns: int, end: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.integers(0, end, (rows, columns), dtype=np.uint16) | (
        rng.integers(0, 2, (rows, columns), dtype=np.uint16) << 15
    )


def fp4_ties() -> np.ndarray:
    """Blocks whose largest weight is 12 times a power of two, and all others midway between FP4's values."""
    midway = torch.tensor([1.03125, 2.5, 3.5, 5, 7, 10, 0.03125, 12] * 8).bfloat16() * torch.tensor([1, -1] * 32)
    return to_bits(torch.stack([midway.bfloat16() * 2.0**-exponent for exponent in range(40)]))


BF16_CASES = {
    "normal": to_bits((torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) * 0.03).bfloat16()),
    "any magnitude below two": random_bits(64, 192, 0x4000),
    "denormal": random_bits(16, 64, 0x0100),
    "zero": np.full((8, 64), 0x8000, np.uint16),
    "all the same": np.full((8, 64), 0x3DCD, np.uint16),
    "ties": fp4_ties(),
}


@every_scheme
@pytest.mark.parametrize("case", BF16_CASES)
def test_edges_from_bf16(case: str, scheme: Scheme) -> None:
    """Weights of any magnitude, denormal and tied ones included, give bitsandbytes' bits."""
    rows = BF16_CASES[case]
    assert_like_bitsandbytes(bnb4.quantize(rows, scheme), rows, scheme)


@every_scheme
def test_dequantize(scheme: Scheme) -> None:
    """Expanded again, weights are bitsandbytes' within a last bit of float32."""
    rows = BF16_CASES["normal"]
    codes, state = bnb.quantize_4bit(
        to_bf16(rows).float(), blocksize=scheme.block_size, compress_statistics=False, quant_type=scheme.format
    )
    found = bnb4.dequantize(codes.numpy(), state.absmax.numpy(), scheme)
    np.testing.assert_array_max_ulp(found, bnb.dequantize_4bit(codes, state).numpy().reshape(-1), maxulp=1)


@pytest.mark.parametrize("broken", [0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81], ids=hex)
@every_scheme
def test_not_finite(broken: int, scheme: Scheme) -> None:
    """NaN and infinity of either sign are refused by their tensor's name."""
    rows = BF16_CASES["normal"].copy()
    rows[95, 191] = broken
    with pytest.raises(CheckpointError, match="q_proj: NaN or infinity"):
        bnb4.quantize(rows, scheme, "q_proj")


@pytest.mark.parametrize("scale", [253, 255])
def test_scale_beyond_bf16(scale: int) -> None:
    """An MXFP4 scale that stands for NaN, or for weights beyond bf16, is refused by its tensor's name."""
    blocks, scales = random_mxfp4(4, 4)
    scales[3, 3] = scale
    with pytest.raises(CheckpointError, match=f"down_proj.*{scale}"):
        bnb4.transcode(blocks, scales, Scheme("nf4"), "down_proj")


@pytest.mark.parametrize("source", ["mxfp4", "bf16"])
def test_mean_beyond_float32(source: str) -> None:
    """Weights so large that the mean of their absmax overflows are refused, not written as infinity."""
    blocks, scales = random_mxfp4(64, 6, 252, 252)
    with pytest.raises(CheckpointError, match="down_proj"):
        if source == "mxfp4":
            bnb4.transcode(blocks, scales, Scheme("nf4"), "down_proj")
        else:
            bnb4.quantize(mxfp4.dequantize(blocks, scales), Scheme("nf4"), "down_proj")
