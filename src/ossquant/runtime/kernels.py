"""MXFP4 weights back to floats, on the device where they lie."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ossquant.codec import mxfp4
from ossquant.errors import UnsupportedError

Expander = Callable[[Tensor, Tensor], Tensor]  # blocks (out, G, 16) and scales (out, G) to bf16 (out, G * 32)

_SAID = 160  # characters of an error of others

logger = logging.getLogger(__name__)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand MXFP4 exactly: blocks (out, G, 16) and scales (out, G), uint8. Returns (out, G * 32) of dtype."""
    return _expander(blocks.device)(blocks, scales).to(dtype)


@cache
def _expander(device: torch.device) -> Expander:
    """The way to expand on a device: Triton's, if it gives the bits of torch's there for every scale and code."""
    if device.type == "cpu":
        return _expand_on_cpu
    if device.type != "cuda" or find_spec("triton") is None:
        return expand_with_torch
    blocks, scales = every_mxfp4(device)
    try:
        same = torch.equal(expand_with_triton(blocks, scales), expand_with_torch(blocks, scales))
    except Exception as error:  # noqa: BLE001  the compiler, its compiler of C and the driver each have their own
        logger.warning("MXFP4 is expanded by torch: Triton failed here: %s", first_line(error))
        return expand_with_torch
    if not same:
        logger.warning("MXFP4 is expanded by torch: Triton gives other bits here; please report it")
    return expand_with_triton if same else expand_with_torch


def every_mxfp4(device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks (253, 16, 16) and scales (253, 16): every pair of codes under every scale that bf16 can hold."""
    pairs = torch.arange(256, dtype=torch.uint8, device=device).reshape(16, 16)
    scales = torch.arange(mxfp4.MAX_SCALE + 1, dtype=torch.uint8, device=device)
    return pairs.expand(len(scales), 16, 16).contiguous(), scales[:, None].expand(-1, 16).contiguous()


def expand_with_triton(blocks: Tensor, scales: Tensor) -> Tensor:
    """Expand contiguous MXFP4 to bf16: blocks (out, G, 16), scales (out, G)."""
    import triton

    from ossquant.runtime.expert_kernels import EXPANDED_GROUPS, expand_mxfp4_kernel

    out = torch.empty(blocks.shape[0], 32 * blocks.shape[1], dtype=torch.bfloat16, device=blocks.device)
    groups = scales.numel()
    with torch.cuda.device_of(blocks):
        expand_mxfp4_kernel[(triton.cdiv(groups, EXPANDED_GROUPS),)](
            blocks, scales, _decoded(blocks.device), out, groups, GROUPS=EXPANDED_GROUPS
        )
    return out


def check_alive(device: torch.device, kernels: str, choice: str) -> None:
    """Raise UnsupportedError if a GPU refuses all that follows, as after an illegal access by kernels that were tried.

    choice is what load_model's kernels has to be for them to be left alone.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise UnsupportedError(
            f"{kernels} have left {device} unusable: {first_line(error)}",
            hint=f"--kernels {choice}, or load_model(..., kernels='{choice}')",
        ) from error


def first_line(error: Exception) -> str:
    """What an error of others says, in a line, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_SAID].removesuffix(": ")


@cache
def mxfp4_values(device: torch.device) -> Tensor:
    """What MXFP4's 16 codes mean before their scale, float32."""
    return torch.tensor([*mxfp4.MAGNITUDES, *-mxfp4.MAGNITUDES], dtype=torch.float32, device=device)


def expand_with_torch(blocks: Tensor, scales: Tensor) -> Tensor:
    """Expand MXFP4 to bf16 on any device: blocks (out, G, 16), scales (out, G)."""
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
