"""Every tensor of a gpt-oss model."""

from collections import Counter
from dataclasses import replace

import pytest

from ossquant.layout import Role, tensors
from ossquant.spec import ModelSpec, alternating_layer_types

EXPERT_WEIGHTS = {"20b": 19_110_297_600, "120b": 114_661_785_600}


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_expert_weights(size: str) -> None:
    """19,110,297,600 of the 20b's parameters are expert weights, and 114,661,785,600 of the 120b's."""
    found = tensors(ModelSpec.published(size))
    assert sum(tensor.numel for tensor in found if tensor.role is Role.EXPERTS) == EXPERT_WEIGHTS[size]


def test_roles() -> None:
    """Four projections, two norms, eight kinds of bias and two stacks of experts a layer; all names differ."""
    found = tensors(ModelSpec.published("20b"))
    assert len({tensor.name for tensor in found}) == len(found) == 17 * 24 + 3
    assert Counter(tensor.role for tensor in found) == {
        Role.EMBEDDING: 1, Role.LM_HEAD: 1, Role.NORM: 2 * 24 + 1, Role.ATTENTION: 4 * 24, Role.ROUTER: 24,
        Role.BIAS: 6 * 24, Role.EXPERTS: 2 * 24, Role.EXPERT_BIAS: 2 * 24,
    }  # fmt: skip


def test_order() -> None:
    """Tensors stand in the order a forward pass meets them, so that layers lie together in the files."""
    names = [tensor.name for tensor in tensors(ModelSpec.published("20b"))]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert (names[0], names[-1]) == ("model.embed_tokens.weight", "lm_head.weight")
    assert layers == sorted(layers)


def test_sizes_differ() -> None:
    """Each tensor follows its own dimensions: hidden, intermediate, query and key widths are told apart."""
    spec = replace(
        ModelSpec.published("20b"), num_hidden_layers=1, num_local_experts=3, hidden_size=192, intermediate_size=128,
        num_attention_heads=5, num_key_value_heads=1, head_dim=32, vocab_size=640,
        layer_types=alternating_layer_types(1),
    )  # fmt: skip
    shapes = {tensor.name.removeprefix("model.layers.0."): tensor.shape for tensor in tensors(spec)}
    assert shapes == {
        "model.embed_tokens.weight": (640, 192), "lm_head.weight": (640, 192), "model.norm.weight": (192,),
        "input_layernorm.weight": (192,), "post_attention_layernorm.weight": (192,),
        "self_attn.q_proj.weight": (160, 192), "self_attn.q_proj.bias": (160,),
        "self_attn.k_proj.weight": (32, 192), "self_attn.k_proj.bias": (32,),
        "self_attn.v_proj.weight": (32, 192), "self_attn.v_proj.bias": (32,),
        "self_attn.o_proj.weight": (192, 160), "self_attn.o_proj.bias": (192,), "self_attn.sinks": (5,),
        "mlp.router.weight": (3, 192), "mlp.router.bias": (3,),
        "mlp.experts.gate_up_proj": (3, 256, 192), "mlp.experts.gate_up_proj_bias": (3, 256),
        "mlp.experts.down_proj": (3, 192, 128), "mlp.experts.down_proj_bias": (3, 192),
    }  # fmt: skip
