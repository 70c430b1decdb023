"""Trial: a layer on the MXFP4 kernels of transformers, held against the same layer on our own experts."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.hub_experts import KernelMlp, kernel_mlp

# Tokens: alone, fewer than an expert's tile, a chunk of a prompt, and enough for the kernels' largest tiles
CHECKED = (1, 48, PREFILL_CHUNK, 4096)
# bf16 rounds by 2**-8 at most. Our way rounds about ten times in a row and lies up to 0.6 % from fp32 in the worst
# token, the kernels, which add up in fp32, about half as far; four such steps leave room for both together. In the
# small trained model a lost bias changes 99 %, a gate without its limit more.
TOLERANCE = 4 * 2**-8
_LOUD = 16  # every second token is that much larger, for the gate's limit to be reached
_ANSWER = 128  # tokens of the answer, computed one by one, that a chunk of a prompt is weighed against
_REPEATS = 3


@dataclass(frozen=True)
class Trial:
    """A layer both ways: the worst token's error, seconds by tokens, and bytes that the kernels' layout adds."""

    error: float
    plain: Mapping[int, float]
    kernels: Mapping[int, float]
    growth: int

    @property
    def faster(self) -> bool:
        """Whether a chunk of a prompt and an answer are computed in less time."""
        return _exchange(self.kernels) < _exchange(self.plain)

    def __str__(self) -> str:
        many, one = (self.plain[tokens] / self.kernels[tokens] for tokens in (PREFILL_CHUNK, 1))
        return (
            f"checked (error {self.error:.1%}), {many:.1f} times as fast for {PREFILL_CHUNK} tokens, {one:.1f} for one"
        )


def try_kernels(mlp: nn.Module, config: Any, device: torch.device) -> tuple[KernelMlp, Trial]:
    """Put a layer on the kernels, beside ours, and hold one against the other. Raises what the kernels raise."""
    layer = kernel_mlp(mlp, config)
    errors, plain, kernels = [], {}, {}
    for tokens in CHECKED:
        hidden = _hidden_states(mlp.router, tokens, device)
        errors.append(_error(_output(layer, hidden), _output(mlp, hidden)))
        if tokens in (1, PREFILL_CHUNK):
            plain[tokens], kernels[tokens] = _seconds(mlp, hidden), _seconds(layer, hidden)
    growth = _nbytes((*layer.experts.parameters(), *layer.experts.packed())) - _nbytes(mlp.experts.parameters())
    return layer, Trial(torch.tensor(errors).max().item(), plain, kernels, growth)


def _hidden_states(router: Any, tokens: int, device: torch.device) -> Tensor:
    """Random tokens (1, tokens, hidden), without those of which the last expert chosen and the next weigh the same."""
    drawn = torch.randn(2 * tokens + 16, router.hidden_dim, generator=torch.Generator().manual_seed(0))
    drawn[1::2] *= _LOUD
    hidden = drawn.to(device, router.weight.dtype)
    with torch.no_grad():
        weights = router(hidden)[0].sort(descending=True).values
    last, following = router.top_k - 1, min(router.top_k, router.num_experts - 1)
    clear = (weights[:, last] > weights[:, following]) | (last == following)
    return hidden[clear][None, :tokens]


def _output(mlp: nn.Module, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        return mlp(hidden)[0].reshape(-1, hidden.shape[-1]).float()


def _error(found: Tensor, expected: Tensor) -> float:
    """The worst token's error, NaN if there is none: norm of the difference by norm of what was expected."""
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return errors.max().item() if len(errors) else float("nan")


def _seconds(mlp: nn.Module, hidden: Tensor) -> float:
    """The fastest of some passes."""
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        _output(mlp, hidden).sum().item()  # which waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def _exchange(seconds: Mapping[int, float]) -> float:
    return seconds[PREFILL_CHUNK] + _ANSWER * seconds[1]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
