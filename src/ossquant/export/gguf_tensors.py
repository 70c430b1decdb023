"""The tensors of a GGUF file: llama.cpp's names for a plan's, gate and up of the experts apart."""

import re
from collections import Counter
from dataclasses import dataclass

from ossquant.layout import Role
from ossquant.plan import Plan, TensorPlan
from ossquant.scheme import StoredTensor

ALIGNMENT = 32  # of every tensor in the file; gguf's default
# Source: llama.cpp's tensor names for the architecture gpt-oss, by gguf 0.19
_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.o_proj.bias": "attn_output.bias",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
}
# the even rows of what gpt-oss keeps in one, and the odd ones
_HALVES = {
    "mlp.experts.gate_up_proj": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "mlp.experts.gate_up_proj_bias": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, by llama.cpp's name and ggml's type, and the model's tensor it holds.

    half is 0 where it has the even rows of that (gate), 1 where the odd ones (up), None where all. A bias' rows are
    its numbers.
    """

    stored: StoredTensor
    entry: TensorPlan
    half: int | None = None


def gguf_tensors(plan: Plan) -> list[GgufTensor]:
    """List the file's tensors, in the plan's order."""
    return [tensor for entry in plan.tensors for tensor in _tensors(entry)]


def role_counts(plan: Plan) -> Counter[Role]:
    """How many of the file's tensors each role has."""
    return Counter(tensor.entry.tensor.role for tensor in gguf_tensors(plan))


def _tensors(entry: TensorPlan) -> list[GgufTensor]:
    name, shape = entry.tensor.name, entry.tensor.shape
    dtype = entry.scheme.format.upper()
    if name in _MODEL:
        return [GgufTensor(StoredTensor(_MODEL[name], dtype, shape), entry)]
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if not layer:
        raise KeyError(name)
    block, inner = f"blk.{layer[1]}", layer[2]
    if inner in _LAYER:
        return [GgufTensor(StoredTensor(f"{block}.{_LAYER[inner]}", dtype, shape), entry)]
    halved = (shape[0], shape[1] // 2, *shape[2:])
    return [
        GgufTensor(StoredTensor(f"{block}.{each}", dtype, halved), entry, half)
        for half, each in enumerate(_HALVES[inner])
    ]
