"""MXFP4 weights back to floats, on the device where they lie."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ossquant.codec import mxfp4


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand MXFP4 exactly: blocks (out, G, 16) and scales (out, G), uint8. Returns (out, G * 32) of dtype."""
    expand = _expand_on_cpu if blocks.device.type == "cpu" else _expand_with_torch
    return expand(blocks, scales).to(dtype)


def _expand_with_torch(blocks: Tensor, scales: Tensor) -> Tensor:
    decoded = _decoded(blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    index = scales.to(torch.int32).unsqueeze(-1) * 16 + codes
    return decoded[index].flatten(-2)


def _expand_on_cpu(blocks: Tensor, scales: Tensor) -> Tensor:
    packed, shared = blocks.numpy(), scales.numpy()
    rows = np.empty((packed.shape[0], packed.shape[1] * 32), np.uint16)
    threads = torch.get_num_threads()
    step = -(-packed.shape[0] // threads)

    def expand(begin: int) -> None:
        part = slice(begin, begin + step)
        mxfp4.dequantize(packed[part], shared[part], out=rows[part])

    list(_pool(threads).map(expand, range(0, packed.shape[0], step)))
    return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mxfp4")


@cache
def _decoded(device: torch.device) -> Tensor:
    """Every (scale, code) as bf16, flat."""
    return torch.from_numpy(mxfp4.DECODED.view(np.int16).reshape(-1)).view(torch.bfloat16).to(device)
