"""Give a model's experts Triton's kernels for few tokens, where these agree with the plain way and are faster."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ossquant.runtime.chosen import FEW_TOKENS, ChosenExperts, Matrices, bnb_matrices, mxfp4_matrices
from ossquant.runtime.experts import Linear4bitExperts, NativeMxfp4Experts
from ossquant.runtime.kernels import check_alive, first_line, mxfp4_values

Experts = Linear4bitExperts | NativeMxfp4Experts
Clock = Callable[[], float]

# how far from the plain way, which rounds weights and what lies between the projections to dtype, the kernels may be
# in a token, by norm; on the 20b's shape they are 1.1e-6, 7e-4 and 6.4e-3 in Triton's interpreter, 2026-11-26
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_REPEATS = 5
_SEED = 0
_LOUD = 16  # every second token is that much larger, for the gate's limit to be reached


def use_decode_kernels(
    model: nn.Module, announce: Callable[[str], None], device: str = "cuda", clock: Clock = time.perf_counter
) -> None:
    """Have the experts on devices of a type use the kernels; announce hears what was decided, if there are such.

    The first layer on each device tries them out, on its own weights, for one token and for FEW_TOKENS.
    """
    layers = [module for module in model.modules() if isinstance(module, Experts) and _device(module).type == device]
    if layers:
        announce(_decide(layers, clock))


def _decide(layers: Sequence[Experts], clock: Clock) -> str:
    """Give layers the kernels, or leave them; says which, and why."""
    left = "experts are asked for one by one: Triton's kernels"
    try:
        trials = [_try(layer, clock) for layer in {_device(layer): layer for layer in reversed(layers)}.values()]
    except Exception as error:  # noqa: BLE001  the compiler, its compiler of C and the driver each have their own
        for layer in layers:
            check_alive(_device(layer), "Triton's kernels", "never")
        return f"{left} failed here: {first_line(error)}"
    far = torch.tensor([trial[0] for trial in trials]).max().item()  # NaN if one is
    times_as_fast = min(trial[1] for trial in trials)
    if not far <= TOLERANCE[layers[0].dtype]:  # nor is NaN
        return f"{left} are off by {far:.2g} here; please report it"
    if times_as_fast < 1:
        return f"{left} are {times_as_fast:.2g} times as fast here"
    for layer in layers:
        layer.chosen = chosen_experts(layer)
    return f"experts by Triton's kernels: checked here, off by {far:.1g}, {times_as_fast:.1f} times as fast for a token"


def chosen_experts(layer: Experts) -> ChosenExperts:
    """The kernels' view of a layer's experts."""
    gate_up, down = _mxfp4(layer) if isinstance(layer, NativeMxfp4Experts) else _bitsandbytes(layer)
    return ChosenExperts(gate_up, down, layer.gate.alpha, layer.gate.limit)


def _mxfp4(layer: NativeMxfp4Experts) -> tuple[Matrices, Matrices]:
    values = mxfp4_values(_device(layer))
    return (
        mxfp4_matrices(layer.gate_up_proj_blocks, layer.gate_up_proj_scales, layer.gate_up_proj_bias, values),
        mxfp4_matrices(layer.down_proj_blocks, layer.down_proj_scales, layer.down_proj_bias, values),
    )


def _bitsandbytes(layer: Linear4bitExperts) -> tuple[Matrices, Matrices]:
    gate_up, down = (
        bnb_matrices([projection.weight for projection in projections], [projection.bias for projection in projections])
        for projections in (layer.gate_up_projs, layer.down_projs)
    )
    return gate_up, down


def error_of(layer: Experts, chosen: ChosenExperts, tokens: int) -> Tensor:
    """How far the kernels are from a layer that has none, in the worst of some random tokens, by norm."""
    call = _call(layer, tokens)
    with torch.inference_mode():
        plain, found = layer(*call).float(), chosen(*call).float()
    return ((found - plain).norm(dim=-1) / plain.norm(dim=-1)).max()


def _try(layer: Experts, clock: Clock) -> tuple[float, float]:
    """How far the kernels are from the plain way, and how many times as fast for one token."""
    chosen, call = chosen_experts(layer), _call(layer, 1)
    errors = torch.stack([error_of(layer, chosen, tokens) for tokens in (1, FEW_TOKENS)])
    plain = _seconds(layer, call, clock)
    layer.chosen = chosen
    try:
        times_as_fast = plain / _seconds(layer, call, clock)
    finally:
        layer.chosen = None
    return errors.max().item(), times_as_fast


def _call(layer: Experts, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens through random experts."""
    generator = torch.Generator().manual_seed(_SEED)
    experts, hidden, dtype = layer.experts, layer.hidden_size, layer.dtype
    indices = torch.rand(tokens, experts, generator=generator).topk(layer.experts_per_token).indices
    weights = torch.rand(indices.shape, generator=generator).softmax(-1)
    states = torch.randn(tokens, hidden, generator=generator)
    states[::2] *= _LOUD
    device = _device(layer)
    return states.to(device, dtype), indices.to(device), weights.to(device, dtype)


@torch.inference_mode()
def _seconds(experts: Any, call: tuple[Tensor, Tensor, Tensor], clock: Clock) -> float:
    """The fastest of some calls."""
    times = []
    for _ in range(_REPEATS):
        started = clock()
        experts(*call).sum().item()  # which waits for the device
        times.append(clock() - started)
    return min(times)


def _device(layer: Experts) -> torch.device:
    return next(layer.parameters()).device
