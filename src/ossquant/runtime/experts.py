"""Mixture-of-experts layers whose weights stay in four bits.

Both take the place of transformers' GptOssExperts and are called like it: hidden_states (tokens, hidden),
router_indices and routing_weights (tokens, top_k). Where decode_kernels.py has set chosen, that computes few tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import linear

from ossquant.runtime.chosen import ChosenExperts
from ossquant.runtime.kernels import dequantize_mxfp4
from ossquant.runtime.streaming import Parts, experts_for
from ossquant.scheme import Scheme

# gpt-oss' gate; a constant of the model, not of every config.json
SWIGLU_ALPHA = 1.702

# the product of one expert with tokens: (expert, (n, in)) -> (n, out)
ExpertLinear = Callable[[int, Tensor], Tensor]


class Linear4bitExperts(nn.Module):
    """One bitsandbytes Linear4bit for each expert's matrices."""

    def __init__(self, config: Any, scheme: Scheme, dtype: torch.dtype) -> None:
        super().__init__()
        self.chosen: ChosenExperts | None = None
        self.gate = _Gate(config)
        self.experts, self.experts_per_token = config.num_local_experts, config.num_experts_per_tok
        self.hidden_size = hidden = config.hidden_size
        intermediate = config.intermediate_size

        def stack(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(linear4bit(inputs, outputs, scheme, dtype) for _ in range(self.experts))

        self.gate_up_projs = stack(hidden, 2 * intermediate)
        self.down_projs = stack(intermediate, hidden)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.down_projs[0].bias.dtype

    def matrices(self) -> list[Tensor | None]:
        """Weight, bias and scales of every expert, first of gate_up_projs; None where it does more than multiply."""
        projections = (*self.gate_up_projs._modules.values(), *self.down_projs._modules.values())
        return [part for projection in projections for part in _stored(projection)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.chosen = None  # which knows where weights lie
        return super()._apply(fn, recurse)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        if self.chosen and self.chosen.takes(hidden_states, self.matrices()):
            return self.chosen(hidden_states, router_indices, routing_weights)
        return _mix(
            hidden_states, router_indices, routing_weights, self.experts, self.gate,
            lambda expert, x: self.gate_up_projs[expert](x), lambda expert, x: self.down_projs[expert](x),
        )  # fmt: skip


class NativeMxfp4Experts(nn.Module):
    """The published MXFP4 bytes, expanded one expert at a time while it computes, on the device of its input.

    copied_ahead: whether experts that lie elsewhere are copied there while others compute, or one after the other.
    """

    copied_ahead = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.chosen: ChosenExperts | None = None
        self.gate = _Gate(config)
        self.experts, self.experts_per_token = config.num_local_experts, config.num_experts_per_tok
        self.hidden_size = hidden = config.hidden_size
        experts, intermediate = self.experts, config.intermediate_size
        self.gate_up_proj_blocks = _bytes(experts, 2 * intermediate, hidden // 32, 16)
        self.gate_up_proj_scales = _bytes(experts, 2 * intermediate, hidden // 32)
        self.gate_up_proj_bias = nn.Parameter(torch.empty(experts, 2 * intermediate), requires_grad=False)
        self.down_proj_blocks = _bytes(experts, hidden, intermediate // 32, 16)
        self.down_proj_scales = _bytes(experts, hidden, intermediate // 32)
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.down_proj_bias.dtype

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        if self.chosen and self.chosen.takes(hidden_states, self.stacks()):
            return self.chosen(hidden_states, router_indices, routing_weights)
        stored = experts_for(hidden_states.device, self.stacks(), self.copied_ahead)

        def gate_up(expert: int, x: Tensor) -> Tensor:
            return _linear_mxfp4(x, *stored.take(expert)[:3])

        def down(expert: int, x: Tensor) -> Tensor:
            out = _linear_mxfp4(x, *stored.take(expert)[3:])
            stored.done(expert)
            return out

        return _mix(
            hidden_states, router_indices, routing_weights, self.experts, self.gate, gate_up, down, stored.expect
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.chosen = None  # which knows where weights lie
        return super()._apply(fn, recurse)

    def stacks(self) -> Parts:
        """Blocks, scales and biases of gate_up_proj, then of down_proj, all experts in one."""
        return (
            self.gate_up_proj_blocks, self.gate_up_proj_scales, self.gate_up_proj_bias,
            self.down_proj_blocks, self.down_proj_scales, self.down_proj_bias,
        )  # fmt: skip


def _stored(projection: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias and scales of a Linear4bit; None for one that is wrapped, has hooks or another forward."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    if type(projection) is not Linear4bit or hooks or "forward" in vars(projection):
        return None, None, None
    weight = projection._parameters["weight"]
    return weight, projection._parameters["bias"], weight.quant_state.absmax


def _linear_mxfp4(x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    blocks, scales = blocks.to(x.device, non_blocking=True), scales.to(x.device, non_blocking=True)
    return linear(x, dequantize_mxfp4(blocks, scales, x.dtype), bias.to(x.device, non_blocking=True))


class _Gate:
    """gpt-oss' clamped SwiGLU over interleaved gate (even) and up (odd) columns."""

    def __init__(self, config: Any) -> None:
        self.alpha = getattr(config, "swiglu_alpha", SWIGLU_ALPHA)
        self.limit = config.swiglu_limit

    def __call__(self, gate_up: Tensor) -> Tensor:
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def _mix(
    hidden_states: Tensor,
    router_indices: Tensor,
    routing_weights: Tensor,
    experts: int,
    gate: _Gate,
    gate_up: ExpertLinear,
    down: ExpertLinear,
    expect: Callable[[Sequence[int]], None] = lambda experts: None,
) -> Tensor:
    """Send each token through its experts and add up what comes back, by weight; expect hears first which."""
    mixed = torch.zeros_like(hidden_states)
    chosen, weights = router_indices.reshape(-1), routing_weights.reshape(-1, 1)
    by_expert = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts).tolist()  # the one wait for the device
    expect([expert for expert, count in enumerate(counts) if count])
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            slots = by_expert[begin : begin + count]
            tokens = slots // router_indices.shape[-1]
            out = down(expert, gate(gate_up(expert, hidden_states[tokens])))
            mixed.index_add_(0, tokens, (out * weights[slots]).to(mixed.dtype))
            begin += count
    return mixed


def linear4bit(inputs: int, outputs: int, scheme: Scheme, dtype: torch.dtype, bias: bool = True) -> Linear4bit:
    """An empty Linear4bit of a scheme, computing in dtype."""
    module = Linear4bit(
        inputs,
        outputs,
        bias=bias,
        compute_dtype=dtype,
        compress_statistics=scheme.double_quant,
        quant_type=scheme.format,
    )
    module.requires_grad_(False)
    # With AVX512-BF16 bitsandbytes repacks for a kernel that computes in bf16, whatever was asked for
    module.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu and dtype == torch.bfloat16
    return module


def _bytes(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=torch.uint8), requires_grad=False)
