"""Every tensor of a gpt-oss model, with its shape and role.

Weights are named and shaped as matrices (out, in), experts as stacks (expert, out, in), whatever a
checkpoint stores in their place; a Scheme says which stored tensors those are.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from math import prod

from ossquant.spec import ModelSpec


class Role(StrEnum):
    """What a tensor is for; a recipe gives each role a scheme."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    ROUTER = "router"
    EXPERTS = "experts"
    LM_HEAD = "lm_head"
    NORM = "norm"
    BIAS = "bias"  # attention and router biases, and the attention sinks
    EXPERT_BIAS = "expert_bias"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the model. name is the bf16 form's; shape counts weights, not stored bytes."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def numel(self) -> int:
        """How many parameters it has."""
        return prod(self.shape)


def unsloth_name(name: str) -> str:
    """The name that unsloth's 4-bit gpt-oss gives a tensor: its router is a module with a linear one inside."""
    return name.replace(".mlp.router.", ".mlp.router.linear.")


@cache
def tensors(spec: ModelSpec) -> tuple[TensorInfo, ...]:
    """List the tensors in the order a forward pass meets them."""
    vocab, hidden = spec.vocab_size, spec.hidden_size
    return (
        TensorInfo("model.embed_tokens.weight", (vocab, hidden), Role.EMBEDDING),
        *(tensor for layer in range(spec.num_hidden_layers) for tensor in _layer(spec, layer)),
        TensorInfo("model.norm.weight", (hidden,), Role.NORM),
        TensorInfo("lm_head.weight", (vocab, hidden), Role.LM_HEAD),
    )


def _layer(spec: ModelSpec, layer: int) -> list[TensorInfo]:
    hidden, intermediate, experts = spec.hidden_size, spec.intermediate_size, spec.num_local_experts
    query = spec.num_attention_heads * spec.head_dim
    key_value = spec.num_key_value_heads * spec.head_dim
    linears = {"q_proj": (query, hidden), "k_proj": (key_value, hidden), "v_proj": (key_value, hidden),
               "o_proj": (hidden, query)}  # fmt: skip

    tensors: list[tuple[str, tuple[int, ...], Role]] = [("input_layernorm.weight", (hidden,), Role.NORM)]
    for name, shape in linears.items():
        tensors.append((f"self_attn.{name}.weight", shape, Role.ATTENTION))
        tensors.append((f"self_attn.{name}.bias", shape[:1], Role.BIAS))
    tensors += [
        ("self_attn.sinks", (spec.num_attention_heads,), Role.BIAS),
        ("post_attention_layernorm.weight", (hidden,), Role.NORM),
        ("mlp.router.weight", (experts, hidden), Role.ROUTER),
        ("mlp.router.bias", (experts,), Role.BIAS),
        ("mlp.experts.gate_up_proj", (experts, 2 * intermediate, hidden), Role.EXPERTS),
        ("mlp.experts.gate_up_proj_bias", (experts, 2 * intermediate), Role.EXPERT_BIAS),
        ("mlp.experts.down_proj", (experts, hidden, intermediate), Role.EXPERTS),
        ("mlp.experts.down_proj_bias", (experts, hidden), Role.EXPERT_BIAS),
    ]
    return [TensorInfo(f"model.layers.{layer}.{name}", shape, role) for name, shape, role in tensors]
