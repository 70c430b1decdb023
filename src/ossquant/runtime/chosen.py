"""A few tokens through their experts without the host having to know which: what CUDA graphs need.

The plain way, in experts.py, asks the device which experts are chosen and calls them one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

FEW_TOKENS = 4  # of more, several go through one expert, whose weights are better read once for all of them
# blocks of 32 bits' words that a program of the kernel has in flight, by weights to a scale
STEPS = {32: 32, 64: 16}


@dataclass(frozen=True)
class Matrices:
    """One projection of all of a layer's experts, by the addresses of its parts: int64 (experts,) on their device.

    values: the float of each of the 16 codes. group: how many weights share a scale. nested: whether scales are
    bytes with scales of their own, at the addresses in outer, and an offset. parameters: what lies at the addresses.
    """

    weights: Tensor
    scales: Tensor
    outer: Tensor
    offsets: Tensor
    biases: Tensor
    values: Tensor
    outer_values: Tensor
    outputs: int
    group: int
    mxfp4: bool
    nested: bool
    parameters: tuple[Tensor, ...]


def mxfp4_matrices(blocks: Tensor, scales: Tensor, bias: Tensor, values: Tensor) -> Matrices:
    """blocks (experts, out, G, 16) and scales (experts, out, G) uint8; bias (experts, out); values (16,) float32."""
    none = torch.zeros(len(blocks), device=blocks.device)
    return Matrices(
        _addresses(blocks.unbind()), _addresses(scales.unbind()), none.long(), none, _addresses(bias.unbind()), values,
        none, blocks.shape[1], 32, mxfp4=True, nested=False, parameters=(blocks, scales, bias),
    )  # fmt: skip


def bnb_matrices(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Matrices:
    """weights: bitsandbytes' Params4bit, one an expert, quantized alike; biases (out,) each."""
    states = [weight.quant_state for weight in weights]
    none = torch.zeros(len(weights), device=weights[0].device)
    first = states[0]
    nested = bool(first.nested)
    scales = [state.absmax for state in states]
    outer = [state.state2.absmax for state in states] if nested else []
    return Matrices(
        _addresses(weights),
        _addresses(scales),
        _addresses(outer) if nested else none.long(),
        torch.stack([state.offset for state in states]).float() if nested else none,
        _addresses(biases),
        first.code,
        first.state2.code if nested else none,
        first.shape[0],
        first.blocksize,
        mxfp4=False,
        nested=nested,
        parameters=(*weights, *biases),
    )


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    addresses = [tensor.data_ptr() for tensor in tensors]
    return torch.tensor(addresses, dtype=torch.int64, device=tensors[0].device)


@torch.library.custom_op("ossquant::chosen_linear", mutates_args=())
def chosen_linear(
    x: Tensor, chosen: Tensor, routing: Tensor, weights: Tensor, scales: Tensor, outer: Tensor, offsets: Tensor,
    biases: Tensor, values: Tensor, outer_values: Tensor, outputs: int, group: int, mxfp4: bool, nested: bool,
    gated: bool, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    """The product of each slot's input with the matrix of its expert, by Triton.

    x (slots / n, inputs): n slots in a row share an input; chosen, routing (slots,). gated: gpt-oss' SwiGLU of it,
    (slots, outputs / 2) of x's dtype; else it is multiplied by routing, float32 (slots, outputs).
    """
    import triton

    from ossquant.runtime import expert_kernels as kernels

    slots = chosen.numel()
    width, dtype = (outputs // 2, x.dtype) if gated else (outputs, torch.float32)
    out = torch.empty(slots, width, dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        kernels.chosen_linear_kernel[(triton.cdiv(outputs, kernels.ROWS), slots)](
            x, chosen, routing, weights, scales, outer, offsets, biases, values, outer_values, out,
            slots // x.shape[0], outputs, x.shape[1] // group, alpha, limit,
            GROUP=group, STEP=STEPS[group], ROWS=kernels.ROWS, MXFP4=mxfp4, NESTED=nested, GATED=gated,
            num_warps=kernels.WARPS,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class ChosenExperts:
    """A layer's experts for at most FEW_TOKENS tokens, with no grad; alpha and limit are of gpt-oss' SwiGLU."""

    gate_up: Matrices
    down: Matrices
    alpha: float
    limit: float

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        """What lies at the addresses."""
        return (*self.gate_up.parameters, *self.down.parameters)

    @cached_property
    def _known(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self.parameters]

    def takes(self, hidden_states: Tensor, parameters: Sequence[Tensor | None]) -> bool:
        """Whether a call is one for the kernels; parameters are the module's, None for one that is gone."""
        if hidden_states.shape[0] > FEW_TOKENS or torch.is_grad_enabled():
            return False
        if hidden_states.dtype != self.parameters[-1].dtype:
            return False
        return [parameter.data_ptr() if parameter is not None else 0 for parameter in parameters] == self._known

    def __call__(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """Called like transformers' GptOssExperts."""
        chosen, routing = router_indices.reshape(-1), routing_weights.reshape(-1).contiguous()
        gated = self._product(self.gate_up, hidden_states.contiguous(), chosen, routing, gated=True)
        weighted = self._product(self.down, gated, chosen, routing, gated=False)
        return weighted.view(*router_indices.shape, -1).sum(1).to(hidden_states.dtype)

    def _product(self, of: Matrices, x: Tensor, chosen: Tensor, routing: Tensor, *, gated: bool) -> Tensor:
        return chosen_linear(
            x, chosen, routing, of.weights, of.scales, of.outer, of.offsets, of.biases, of.values, of.outer_values,
            of.outputs, of.group, of.mxfp4, of.nested, gated, self.alpha, self.limit,
        )  # fmt: skip
