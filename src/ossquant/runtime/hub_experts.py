"""KernelMlp: a layer's router and experts on the MXFP4 kernels of transformers, made from ours."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import mxfp4
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP, swizzle_mxfp4_convertops
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from ossquant.errors import UnsupportedError

PROJECTIONS = ("gate_up_proj", "down_proj")


class KernelExperts(Mxfp4GptOssExperts):
    """Experts in the layout of the kernels. They infer, where they lie, and what they cannot do is an error.

    Of theirs a state_dict has the biases alone: peft asks for one to load an adapter, so it can be no error.
    """

    def forward_routed(self, hidden_states: Tensor, routing_data: Any, gather_idx: Any, scatter_idx: Any) -> Tensor:
        with torch.no_grad():
            mixed = super().forward_routed(hidden_states, routing_data, gather_idx, scatter_idx)
        return _Forward.apply(mixed, hidden_states, routing_data.gate_scal)

    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that hold codes and scales; they are no parameters."""
        values = (getattr(self, projection) for projection in PROJECTIONS)
        scales = (getattr(self, f"{projection}_precision_config").weight_scale for projection in PROJECTIONS)
        return tuple(wrapped.storage.data for wrapped in (*values, *scales))

    @property
    def parameters_4bit(self) -> int:
        """How many weights they stand for."""
        return sum(math.prod(getattr(self, projection).shape) for projection in PROJECTIONS)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        if fn(self.down_proj_bias.new_empty(0)).device != self.down_proj_bias.device:
            raise cannot_be("moved to another device")
        return super()._apply(fn, *args, **kwargs)


class KernelMlp(Mxfp4GptOssMLP):
    """A layer's router and experts; the kernels choose the experts, too, by the router's weight and bias."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.router, GptOssTopKRouter):
            raise cannot_be("used behind an adapted router")
        return super().forward(hidden_states)


class _Forward(torch.autograd.Function):
    """Tells of the gradient that the kernels do not have, where it would be taken for zero."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, *inputs: Tensor) -> Tensor:
        return mixed.view_as(mixed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise cannot_be("trained through")


def kernel_mlp(mlp: nn.Module, config: Any) -> KernelMlp:
    """The same layer on the kernels: router and biases are shared, the experts are put into their layout.

    mlp holds NativeMxfp4Experts, and transformers.integrations.mxfp4.triton_kernels_hub the kernels. Whatever these
    raise comes through.
    """
    native = mlp.experts
    experts = empty_experts(config)
    for projection in PROJECTIONS:
        blocks, scales = (getattr(native, f"{projection}_{part}").detach() for part in ("blocks", "scales"))
        setattr(experts, f"{projection}_bias", getattr(native, f"{projection}_bias"))
        swizzle_mxfp4_convertops(blocks, scales, experts, projection, blocks.device, mxfp4.triton_kernels_hub)
    return KernelMlp(mlp.router, experts).train(mlp.training)


def empty_experts(config: Any) -> KernelExperts:
    """Experts that hold nothing yet."""
    with torch.device("meta"):
        return KernelExperts(config)


def cannot_be(what: str) -> UnsupportedError:
    """The error of a model whose experts run on the kernels."""
    return UnsupportedError(
        f"experts on transformers' MXFP4 kernels cannot be {what}", hint="load_model(..., kernels='own')"
    )
