"""Which attention gpt-oss can use here: it has sinks, a learned share of attention that goes to no token."""

from dataclasses import dataclass

import torch
from transformers.utils import is_flash_attn_4_available, is_kernels_available

from ossquant.errors import UnsupportedError, UsageError
from ossquant.units import nearest

EAGER, FLASH_4, FLASH_3_KERNEL = "eager", "flash_attention_4", "kernels-community/vllm-flash-attn3"
IMPLEMENTATIONS = (EAGER, FLASH_4, FLASH_3_KERNEL)
NO_SINKS = {
    "sdpa": "PyTorch's attention knows no sinks",
    "flash_attention_2": "flash-attn 2 knows no attention sinks",
    "flash_attention_3": "flash-attn 3 as its authors publish it knows no attention sinks",
    "flex_attention": "its sinks are not supported by transformers' gpt-oss on every device",
}


@dataclass(frozen=True)
class Attention:
    """An implementation by transformers' name, and why it was chosen."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} attention: {self.reason}"


def choose_attention(asked: str, device: str, dtype: torch.dtype) -> Attention:
    """Resolve 'auto', and refuse what does not know sinks. Raises UnsupportedError, UsageError."""
    if asked in NO_SINKS:
        raise UnsupportedError(
            f"attn_implementation '{asked}': {NO_SINKS[asked]}",
            hint=f"use 'auto', 'eager', '{FLASH_4}' or '{FLASH_3_KERNEL}'",
        )
    if asked not in ("auto", *IMPLEMENTATIONS):
        raise UsageError(f"unknown attn_implementation '{asked}'", hint=nearest(asked, ["auto", *IMPLEMENTATIONS]))
    capability = torch.cuda.get_device_capability(device) if device.startswith("cuda") else None
    possible = {name: _obstacle(name, capability, dtype) for name in (FLASH_4, FLASH_3_KERNEL)}
    if asked != "auto":
        if possible.get(asked):
            raise UnsupportedError(f"attn_implementation '{asked}' {possible[asked]}", hint="use 'auto' or 'eager'")
        return Attention(asked, "as asked")
    fast = next((name for name, obstacle in possible.items() if not obstacle), None)
    if fast:
        return Attention(fast, "it knows sinks and is installed")
    if capability is None:
        return Attention(EAGER, "no CUDA GPU")
    return Attention(EAGER, "; ".join(f"{name} {obstacle}" for name, obstacle in possible.items()))


def _obstacle(name: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
    """Why an implementation cannot be used on a device of this compute capability; empty if it can."""
    if capability is None:
        return "needs a CUDA GPU"
    if dtype == torch.float32:
        return "does not compute in float32"
    if name == FLASH_4:
        if capability[0] not in (9, 10):
            return "needs a Hopper or Blackwell data-centre GPU"
        return "" if is_flash_attn_4_available() else "is not installed: pip install 'ossquant[flash]'"
    if capability[0] != 9:
        return "needs a Hopper GPU"
    return "" if is_kernels_available() else "needs the package kernels: pip install 'ossquant[flash]'"
