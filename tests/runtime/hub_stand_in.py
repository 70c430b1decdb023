"""A stand-in for the hub package behind transformers' MXFP4 kernels: the few names that transformers uses, in torch.

It is held to the signatures and demands of kernels-community/gpt-oss-triton-kernels, version 1, and shares no code
with ossquant: it decodes MXFP4 by itself. Its layout is its own, so that bytes taken past it are noise.
"""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass
class Behaviour:
    """What is to be wrong with it: a slip of its arithmetic, an error, seconds it wastes, bytes a byte takes."""

    slip: str = ""
    error: Exception | None = None
    error_from: int = 0  # the call of convert_layout that raises first
    waste: float = 0.0
    growth: int = 1
    conversions: int = 0
    calls: list[int] = field(default_factory=list)  # rows of each product


@dataclass
class Storage:
    data: Tensor
    layout: Any = None


@dataclass
class Wrapped:
    storage: Storage
    dtype: Any
    shape: Any
    expanded: Tensor | None = None


class Plain:
    """As it was, the contraction dimension having stride 1."""

    def __init__(self, growth: int = 1) -> None:
        self.growth = growth

    def store(self, data: Tensor) -> Tensor:
        return data

    def read(self, data: Tensor) -> Tensor:
        return data


class Backwards(Plain):
    """Every byte turned over, from the last to the first, and as often as growth says."""

    def store(self, data: Tensor) -> Tensor:
        self.strides = data.stride()
        turned = (255 - data).mT.flip(-1)
        return torch.cat([turned] * self.growth, dim=-1).mT

    def read(self, data: Tensor) -> Tensor:
        rows = data.shape[-2] // self.growth
        return 255 - data[..., :rows, :].mT.flip(-1).mT


@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: Any
    fn_arg_names: tuple[str, ...]


@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple[float, ...]
    reduction_n: int


@dataclass
class PrecisionConfig:
    weight_scale: Wrapped
    flex_ctx: Any


@dataclass
class RoutingData:
    gate_scal: Tensor
    expt_hist: Tensor
    n_expts_tot: int
    n_expts_act: int


@dataclass
class Indices:
    src_indx: Tensor
    dst_indx: Tensor


def stand_in(behaviour: Behaviour) -> SimpleNamespace:
    """The package, behaving so."""

    def convert_layout(wrapped: Wrapped, layout: type[Plain], **options: Any) -> Wrapped:
        behaviour.conversions += 1
        if behaviour.error and behaviour.conversions > behaviour.error_from:
            raise behaviour.error
        placed = layout(**options)
        return Wrapped(Storage(placed.store(wrapped.storage.data), placed), wrapped.dtype, wrapped.shape)

    def wrap_torch_tensor(tensor: Tensor, dtype: Any = None) -> Wrapped:
        assert tensor.dtype == torch.uint8 and tensor.stride(-2) == 1
        return Wrapped(Storage(tensor), dtype or tensor.dtype, list(tensor.shape))

    def matmul_ogs(x: Tensor, w: Wrapped, bias: Tensor, routing_data: RoutingData, **options: Any) -> Tensor:
        behaviour.calls.append(x.shape[0])
        time.sleep(behaviour.waste)
        return _matmul(behaviour.slip, x, w, bias, routing_data, **options)

    return SimpleNamespace(
        tensor=SimpleNamespace(FP4="fp4", convert_layout=convert_layout, wrap_torch_tensor=wrap_torch_tensor),
        tensor_details=SimpleNamespace(
            layout=SimpleNamespace(
                StridedLayout=Plain,
                make_default_matmul_mxfp4_w_layout=lambda mx_axis: (Backwards, {"growth": behaviour.growth}),
            )
        ),
        matmul_ogs=SimpleNamespace(
            FnSpecs=FnSpecs, FusedActivation=FusedActivation, matmul_ogs=matmul_ogs, PrecisionConfig=PrecisionConfig,
            FlexCtx=SimpleNamespace, InFlexData=SimpleNamespace,
        ),
        swiglu=SimpleNamespace(swiglu_fn=_swiglu),
        routing=SimpleNamespace(routing=_last_of_equals if behaviour.slip == "last of equals" else _routing),
    )  # fmt: skip


def _routing(logits: Tensor, n_expts_act: int) -> tuple[RoutingData, Indices, Indices]:
    """Slots sorted by expert: source indices lead from them to slots in the tokens' order, destinations back."""
    weights, chosen = logits.topk(n_expts_act)
    chosen = chosen.flatten()
    by_expert = chosen.argsort(stable=True)
    back = by_expert.argsort()
    data = RoutingData(
        torch.softmax(weights.float(), -1).to(logits.dtype).flatten()[by_expert],
        torch.bincount(chosen, minlength=logits.shape[1]), logits.shape[1], n_expts_act,
    )  # fmt: skip
    return data, Indices(by_expert, back), Indices(back, by_expert)


def _last_of_equals(logits: Tensor, n_expts_act: int) -> tuple[RoutingData, Indices, Indices]:
    """Prefer the later of two experts that weigh the same, which is nothing wrong."""
    order = torch.linspace(0, 1e-6, logits.shape[1], dtype=torch.float64)
    data, gather, scatter = _routing(logits.double() + order, n_expts_act)
    data.gate_scal = data.gate_scal.to(logits.dtype)
    return data, gather, scatter


def _matmul(
    slip: str,
    x: Tensor,
    w: Wrapped,
    bias: Tensor,
    routing: RoutingData,
    *,
    precision_config: PrecisionConfig,
    gammas: Tensor | None,
    gather_indx: Indices | None = None,
    scatter_indx: Indices | None = None,
    fused_activation: FusedActivation | None = None,
) -> Tensor:
    assert bias.dtype == torch.float32 and x.dtype == torch.bfloat16
    if w.expanded is None:
        w.expanded = _expand(w, precision_config.weight_scale)
    assert tuple(w.shape) == tuple(w.expanded.shape) and x.shape[-1] == w.expanded.shape[1]
    rows = x if gather_indx is None else x[gather_indx.src_indx // routing.n_expts_act]
    products = []
    for expert, mine in enumerate(rows.float().split(routing.expt_hist.tolist())):
        products.append(mine @ w.expanded[expert] + (0 if slip == "no bias" else bias[expert]))
    out = torch.cat(products)
    if fused_activation is not None:
        values = dict(zip(fused_activation.specs.fn_arg_names, fused_activation.fn_args, strict=True))
        out = fused_activation.specs.fn(out, **values | ({"limit": 1e9} if slip == "no limit" else {}))
        assert out.shape[1] * fused_activation.reduction_n == w.shape[-1]
    if gammas is not None:
        out = out * gammas[:, None].float()
    if scatter_indx is not None:
        source = scatter_indx.src_indx.roll(1) if slip == "scattered wrongly" else scatter_indx.src_indx
        out = out[source].view(-1, routing.n_expts_act, out.shape[1]).sum(1)
    return out.bfloat16()


def _expand(w: Wrapped, scale: Wrapped) -> Tensor:
    """Weights (expert, in, out) in fp32."""
    packed, scales = (part.storage.layout.read(part.storage.data) for part in (w, scale))
    codes = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1, 2).int()
    return FP4_VALUES[codes] * torch.exp2(scales.float() - 127).repeat_interleave(32, dim=1)


def _swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = x[:, ::2].clamp(max=limit), x[:, 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
