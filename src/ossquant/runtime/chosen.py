"""A few tokens through their experts without the host having to know which: what CUDA graphs need.

The plain way, in experts.py, asks the device which experts are chosen and calls them one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW_TOKENS = 4  # of more, several go through one expert, whose weights are better read once for all of them
# blocks of 32 bits' words that a program of the kernel has in flight, by weights to a scale
STEPS = {32: 32, 64: 16}


@dataclass(frozen=True)
class Matrices:
    """One projection of all of a layer's experts, by the addresses of its parts: int64 (experts,) on their device.

    values: the float of each of the 16 codes. group: how many weights share a scale. nested: whether scales are
    bytes with scales of their own, at the addresses in outer, and an offset. kept: what lies at the addresses, and
    known where that was, of what a module can be asked for.
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
    dtype: torch.dtype
    mxfp4: bool
    nested: bool
    kept: tuple[Tensor, ...]
    known: tuple[int, ...]


def mxfp4_matrices(blocks: Tensor, scales: Tensor, bias: Tensor, values: Tensor) -> Matrices:
    """blocks (experts, out, G, 16) and scales (experts, out, G) uint8; bias (experts, out); values (16,) float32.

    known are the addresses of blocks, scales and bias.
    """
    none = torch.zeros(len(blocks), device=blocks.device)
    stacks = blocks, scales, bias
    return Matrices(
        weights=_table(blocks.unbind()),
        scales=_table(scales.unbind()),
        outer=none.long(),
        offsets=none,
        biases=_table(bias.unbind()),
        values=values,
        outer_values=none,
        outputs=blocks.shape[1],
        group=32,
        dtype=bias.dtype,
        mxfp4=True,
        nested=False,
        kept=stacks,
        known=tuple(stack.data_ptr() for stack in stacks),
    )


def bnb_matrices(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Matrices:
    """weights: bitsandbytes' Params4bit, one an expert, quantized alike; biases (out,) each.

    known are the addresses of each expert's weight, bias and scales.
    """
    states = [weight.quant_state for weight in weights]
    first = states[0]
    nested = bool(first.nested)
    none = torch.zeros(len(weights), device=weights[0].device)
    scales = [state.absmax for state in states]
    outer = [state.state2.absmax for state in states] if nested else []
    return Matrices(
        weights=_table(weights),
        scales=_table(scales),
        outer=_table(outer) if nested else none.long(),
        offsets=torch.stack([state.offset for state in states]).float() if nested else none,
        biases=_table(biases),
        values=first.code,
        outer_values=first.state2.code if nested else none,
        outputs=first.shape[0],
        group=first.blocksize,
        dtype=biases[0].dtype,
        mxfp4=False,
        nested=nested,
        kept=(*weights, *biases, *scales, *outer),
        known=tuple(part.data_ptr() for parts in zip(weights, biases, scales, strict=True) for part in parts),
    )


def _table(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=tensors[0].device)


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

    def takes(self, hidden_states: Tensor, stored: Sequence[Tensor | None]) -> bool:
        """Whether a call is one for the kernels; stored is what the module has now, None for what is not to be read."""
        if hidden_states.shape[0] > FEW_TOKENS or torch.is_grad_enabled():
            return False
        if hidden_states.dtype != self.down.dtype:
            return False
        with torch._C.DisableTorchFunctionSubclass():  # which Params4bit goes through, seven times as slow
            there = tuple(part.data_ptr() if part is not None else 0 for part in stored)
        return there == (*self.gate_up.known, *self.down.known)

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
