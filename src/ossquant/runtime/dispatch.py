"""Run a model that lies on several devices: tensors are brought to each part, and experts on the host to theirs.

accelerate would copy a host module's weights to the accelerator for every pass; experts are large, and what goes
through them for a token is small, so they are computed where they lie, unless there are many tokens.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from ossquant.place import HOST, DevicePlan
from ossquant.runtime.experts import NativeMxfp4Experts

NEVER = 2**62  # more tokens than there are
_MANY = 64  # tokens of one expert; enough to tell arithmetic from reading
_REPEATS = 3


def dispatch(model: nn.Module, devices: DevicePlan) -> None:
    """Have every part of a model that is loaded by this plan bring its inputs to where it lies."""
    if not devices.crosses:
        return
    placed = devices.device_map()
    model.hf_device_map = placed
    stream_from: int | None = None
    for part, device in placed.items():
        module = model.get_submodule(part)
        owner = placed.get(part.removesuffix(".mlp.experts"), device)
        if device == owner:
            module.register_forward_pre_hook(_Bring(device), with_kwargs=True)
            continue
        if stream_from is None:
            stream_from = tokens_worth_streaming(module, device, owner)
        module.register_forward_pre_hook(_Bring(device, below=stream_from), with_kwargs=True)
        module.register_forward_hook(_Return(owner))


class _Bring:
    """Moves the tensors of a call to a device; calls of many tokens stay where they are, and fetch the weights."""

    def __init__(self, device: str, below: int = NEVER) -> None:
        self.device = torch.device(device)
        self.below = below

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.below < NEVER and args[0].shape[0] >= self.below:
            return None
        return _moved(args, self.device), {name: _moved(value, self.device) for name, value in kwargs.items()}


class _Return:
    """Moves what a module gives back to the device that asked."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value  # a cache, which lies beside each layer already


def tokens_worth_streaming(experts: nn.Module, device: str, accelerator: str) -> int:
    """From how many tokens on a layer's experts are better copied to the accelerator than computed on their device.

    Both are timed here, for one expert with one token and with many. bitsandbytes' experts are never copied.
    """
    if device != HOST or not isinstance(experts, NativeMxfp4Experts):
        return NEVER
    few, many = (_seconds(experts, tokens, accelerator) - _seconds(experts, tokens, device) for tokens in (1, _MANY))
    if few <= 0:
        return 0
    if many >= few:
        return NEVER
    of_one_expert = 1 + (_MANY - 1) * few / (few - many)
    return math.ceil(of_one_expert * experts.down_proj_bias.shape[0] / experts.experts_per_token)


def _seconds(experts: NativeMxfp4Experts, tokens: int, device: str) -> float:
    """The fastest of some passes of tokens, all through the first expert, with the inputs on a device."""
    bias = experts.down_proj_bias
    hidden = torch.zeros(tokens, bias.shape[1], dtype=bias.dtype, device=device)
    indices = torch.zeros(tokens, 1, dtype=torch.int64, device=device)
    weights = torch.ones(tokens, 1, dtype=bias.dtype, device=device)
    times = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            started = time.perf_counter()
            experts(hidden, indices, weights).sum().item()  # which waits for the device
            times.append(time.perf_counter() - started)
    return min(times)
