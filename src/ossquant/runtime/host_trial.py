"""Trial passes through experts that lie on the host: are they copied ahead rightly, and when is copying worth it."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ossquant.place import HOST
from ossquant.runtime.experts import NativeMxfp4Experts

NEVER = 2**62  # more tokens than there are
_EXPERTS = 8  # enough for either buffer to be filled again while the other is in use
_MANY = 64  # tokens of one expert; enough to tell arithmetic from reading
_REPEATS = 3

# hidden states, router indices, routing weights
Inputs = tuple[Tensor, Tensor, Tensor]


def fault_of_copying_ahead(experts: NativeMxfp4Experts, accelerator: str) -> str:
    """Why experts are not to be copied ahead to an accelerator, in words; empty if that gives the very numbers that
    copying them one after the other gives, with few tokens and with many.
    """
    try:
        right = all(_agree(experts, inputs) for inputs in _trials(experts, accelerator))
    except RuntimeError as error:  # what torch raises for all that a device refuses
        return f"copying ahead fails: {str(error).splitlines()[0]}"
    return "" if right else "copying ahead gives other numbers here"


def tokens_worth_streaming(experts: NativeMxfp4Experts, accelerator: str) -> int:
    """From how many tokens on a layer's experts are better copied to the accelerator than computed on the host.

    Both are timed here, through several experts with one token each, and with many.
    """
    few, many = (_seconds(experts, tokens, accelerator) - _seconds(experts, tokens, HOST) for tokens in (1, _MANY))
    return crossing(few, many, experts.down_proj_bias.shape[0] / experts.experts_per_token)


def crossing(few: float, many: float, tokens_per_expert_token: float) -> int:
    """The tokens from which on copying is no slower, given how much slower it is with one token an expert and with
    many, in seconds; tokens_per_expert_token is how many it takes to give each expert one.
    """
    if few <= 0:
        return 0
    if many >= few:
        return NEVER
    of_one_expert = 1 + (_MANY - 1) * few / (few - many)
    return math.ceil(of_one_expert * tokens_per_expert_token)


def _agree(experts: NativeMxfp4Experts, inputs: Inputs) -> bool:
    ahead = _outputs(experts, inputs, ahead=True)
    return torch.equal(ahead, _outputs(experts, inputs, ahead=False))


@torch.no_grad()
def _outputs(experts: NativeMxfp4Experts, inputs: Inputs, ahead: bool) -> Tensor:
    before = experts.copied_ahead
    experts.copied_ahead = ahead
    try:
        found: Tensor = experts(*inputs).cpu()
        return found
    finally:
        experts.copied_ahead = before


def _trials(experts: NativeMxfp4Experts, accelerator: str) -> Iterator[Inputs]:
    for tokens in (1, _MANY) * _REPEATS:
        yield _inputs(experts, tokens, accelerator)


@torch.no_grad()
def _seconds(experts: NativeMxfp4Experts, tokens: int, device: str) -> float:
    """The fastest of some passes with so many tokens an expert, the inputs on a device."""
    inputs = _inputs(experts, tokens, device)
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        experts(*inputs).sum().item()  # which waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def _inputs(experts: NativeMxfp4Experts, tokens: int, device: str) -> Inputs:
    """So many tokens for each of some experts, with others between them that have none."""
    bias: Any = experts.down_proj_bias
    chosen = torch.arange(bias.shape[0])[::2][:_EXPERTS]
    hidden = torch.randn(len(chosen) * tokens, bias.shape[1], generator=torch.Generator().manual_seed(0))
    indices = chosen.repeat(tokens)[:, None]
    weights = torch.ones(indices.shape, dtype=bias.dtype)
    return hidden.to(bias.dtype).to(device), indices.to(device), weights.to(device)
