"""Double quantization: absmax values, less their mean, in 8 bits."""

import math
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from ossquant.codec import nested


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch's sum and mean differ in the last bit with the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def absmax(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(-3, 1, count).astype(np.float32)


def test_dynamic_map() -> None:
    """The 8-bit type is bitsandbytes' to the last bit."""
    assert nested.dynamic_map().tobytes() == bnb.create_dynamic_map().numpy().tobytes()


COUNTS = [*range(1, 300), 511, 512, 1000, 4095, 4096, 4097, 65535, 65537, 259_200]


def test_sum() -> None:
    """The sum is torch's on one thread to the last bit, for short, odd and long vectors."""
    for count in COUNTS:
        vector = absmax(count)
        assert nested.pairwise_sum(vector) == torch.from_numpy(vector).sum().item(), count


@pytest.mark.parametrize("count", [1, 2, 7, 8, 255, 256, 257, 4096, 4097, 129_600])
def test_quantize(count: int) -> None:
    """Codes, nested absmax and offset are bitsandbytes', a last block that is not full included."""
    vector = absmax(count, seed=count)
    mean = torch.from_numpy(vector).mean()
    codes, state = bnb.quantize_blockwise(torch.from_numpy(vector) - mean, blocksize=256)
    found = nested.quantize(vector)
    assert found[0].tobytes() == codes.numpy().tobytes()
    assert found[1].tobytes() == state.absmax.numpy().tobytes()
    assert found[2] == mean.item()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
def test_all_equal(value: float) -> None:
    """absmax values that are all the same come back as they are."""
    codes, scales, offset = nested.quantize(np.full(300, value, np.float32))
    assert np.array_equal(nested.dequantize(codes, scales, offset), np.full(300, value, np.float32))


@pytest.mark.parametrize("count", [5, 256, 1000])
def test_dequantize(count: int) -> None:
    """What comes back is bitsandbytes' within a last bit, and within 8 bits of what went in."""
    vector = absmax(count)
    codes, scales, offset = nested.quantize(vector)
    found = nested.dequantize(codes, scales, offset)
    state = bnb.QuantState(torch.from_numpy(scales), code=bnb.create_dynamic_map(), blocksize=256, dtype=torch.float32)
    expected = (bnb.dequantize_blockwise(torch.from_numpy(codes), state) + offset).numpy()
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    assert np.abs(found - vector).max() <= math.ldexp(np.abs(vector - offset).max(), -5)
