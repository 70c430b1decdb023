"""What vLLM asks for of INT4 experts: each of its parameters, and the stored tensors that fill it.

vLLM passes over names that it does not know and starts with what is missing left unset, so nothing but a list of what
it asks for shows that all is there. Source: vLLM 0.32, its gpt-oss model and WNA16 experts, 2026-11-26.
"""

from collections.abc import Mapping

from ossquant.errors import CheckpointError
from ossquant.scheme import INT4_GROUP, StoredTensor
from ossquant.spec import ModelSpec


def check_coverage(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> int:
    """Check that the stored tensors, by name, fill every parameter of vLLM's and nothing else; gives how many.

    Raises CheckpointError for the first that is missing, not as vLLM reads it, or left over.
    """
    asked = parameters(spec)
    for parameter, tensors in asked.items():
        for tensor in tensors:
            found = stored.get(tensor.name)
            if found != tensor:
                state = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
                raise CheckpointError(f"'{tensor.name}' {state}; vLLM fills '{parameter}' with it",
                                      hint="export it again")  # fmt: skip
    known = {tensor.name for tensors in asked.values() for tensor in tensors}
    left_over = next((name for name in stored if name not in known), None)
    if left_over is not None:
        raise CheckpointError(f"'{left_over}': vLLM would pass over it", hint="export it again")
    return len(asked)


def parameters(spec: ModelSpec) -> dict[str, list[StoredTensor]]:
    """vLLM's parameters, and the tensors of the file that each is filled with."""
    vocabulary, hidden = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)
    asked = {
        "model.embedding.weight": [StoredTensor("model.embed_tokens.weight", "BF16", vocabulary)],
        "model.norm.weight": [StoredTensor("model.norm.weight", "BF16", hidden)],
        "lm_head.weight": [StoredTensor("lm_head.weight", "BF16", vocabulary)],
    }
    for layer in range(spec.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            asked[f"{prefix}.{norm}.weight"] = [StoredTensor(f"{prefix}.{norm}.weight", "BF16", hidden)]
        asked |= _attention(spec, prefix) | _experts(spec, f"{prefix}.mlp")
    return asked


def _attention(spec: ModelSpec, prefix: str) -> dict[str, list[StoredTensor]]:
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    rows = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
    ours, theirs = f"{prefix}.self_attn", f"{prefix}.attn"
    return {
        f"{theirs}.qkv_proj.weight": [
            StoredTensor(f"{ours}.{name}.weight", "BF16", (out, spec.hidden_size)) for name, out in rows.items()
        ],
        f"{theirs}.qkv_proj.bias": [StoredTensor(f"{ours}.{name}.bias", "BF16", (out,)) for name, out in rows.items()],
        f"{theirs}.o_proj.weight": [StoredTensor(f"{ours}.o_proj.weight", "BF16", (spec.hidden_size, query))],
        f"{theirs}.o_proj.bias": [StoredTensor(f"{ours}.o_proj.bias", "BF16", (spec.hidden_size,))],
        f"{theirs}.sinks": [StoredTensor(f"{ours}.sinks", "BF16", (spec.num_attention_heads,))],
    }


def _experts(spec: ModelSpec, mlp: str) -> dict[str, list[StoredTensor]]:
    count, hidden, intermediate = spec.num_local_experts, spec.hidden_size, spec.intermediate_size
    asked = {
        f"{mlp}.router.weight": [StoredTensor(f"{mlp}.router.weight", "BF16", (count, hidden))],
        f"{mlp}.router.bias": [StoredTensor(f"{mlp}.router.bias", "BF16", (count,))],
    }
    matrices = {"w13": ("gate_up_proj", 2 * intermediate, hidden), "w2": ("down_proj", hidden, intermediate)}
    for matrix, (name, out, columns) in matrices.items():
        fused = f"{mlp}.experts.routed_experts.{matrix}"
        parts = {"packed": ("I32", columns // 8), "scale": ("BF16", columns // INT4_GROUP)}
        for part, (dtype, width) in parts.items():
            asked[f"{fused}_weight_{part}"] = [
                StoredTensor(f"{mlp}.experts.{expert}.{matrix}_weight_{part}", dtype, (out, width))
                for expert in range(count)
            ]
        asked[f"{fused}_bias"] = [StoredTensor(f"{mlp}.experts.{name}_bias", "BF16", (count, out))]
    return asked
