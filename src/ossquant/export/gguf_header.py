"""What a GGUF file says before its weights: the model's numbers, its tokenizer, and the place of every tensor."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from ossquant.checkpoint.header import Placed
from ossquant.checkpoint.writer import Shard
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.export.gguf_tensors import ALIGNMENT, GgufTensor
from ossquant.export.vocabulary import Vocabulary
from ossquant.layout import Role
from ossquant.plan import Plan
from ossquant.rope import Rope
from ossquant.spec import alternating_layer_types

ARCHITECTURE = "gpt-oss"
# by the experts' format, as llama.cpp calls a whole file
_FILE_TYPES = {
    "mxfp4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "f32": gguf.LlamaFileType.ALL_F32,
}
# llama.cpp has these in its code, not in the file; openai-moe's graph, 2026-11-22
_BUILT_IN = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "hidden_act": "silu"}

_ELSEWHERE = "serve it with vLLM or transformers: --to mxfp4"


def plan_files(
    tensors: Sequence[GgufTensor],
    plan: Plan,
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    name: str,
    stem: str,
    split_max_size: int | None,
) -> list[Shard]:
    """Lay the tensors out in files called after stem, each with its header and at most split_max_size bytes of data.

    config is the checkpoint's config.json, name what the model is called. Raises CheckpointError, UnsupportedError
    for what llama.cpp would compute otherwise.
    """
    _check_built_in(plan, config)
    total = sum(tensor.stored.nbytes for tensor in tensors)
    split = split_max_size if split_max_size is not None and total > split_max_size else 0
    writer = gguf.GGUFWriter(None, ARCHITECTURE, split_max_size=split)
    for tensor in tensors:
        stored = tensor.stored
        kind = gguf.GGMLQuantizationType[stored.dtype]
        writer.add_tensor_info(stored.name, stored.shape, np.dtype(np.float32), stored.nbytes, raw_dtype=kind)
    _describe_model(writer, plan, config, name)
    _describe_vocabulary(writer, vocabulary)
    return list(_shards(writer, tensors, Path(f"{stem}.gguf")))


def _check_built_in(plan: Plan, config: Mapping[str, Any]) -> None:
    spec = plan.spec
    for key, expected in _BUILT_IN.items():
        if config.get(key, expected) != expected:
            raise UnsupportedError(
                f"config.json: '{key}' is {str(config[key])[:40]}, llama.cpp computes with {expected}", hint=_ELSEWHERE
            )
    if spec.layer_types != alternating_layer_types(spec.num_hidden_layers):
        raise UnsupportedError(
            "config.json: 'layer_types' are not sliding and full in turns, llama.cpp knows no other", hint=_ELSEWHERE
        )


def _describe_model(writer: gguf.GGUFWriter, plan: Plan, config: Mapping[str, Any], name: str) -> None:
    spec, rope = plan.spec, Rope.from_config(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    writer.add_rope_freq_base(rope.theta)
    writer.add_layer_norm_rms_eps(_epsilon(config))
    writer.add_expert_count(spec.num_local_experts)
    writer.add_expert_used_count(spec.num_experts_per_tok)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_file_type(_FILE_TYPES[plan.scheme(Role.EXPERTS).format])
    writer.add_sliding_window(spec.sliding_window)
    writer.add_expert_feed_forward_length(spec.intermediate_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _epsilon(config: Mapping[str, Any]) -> float:
    value = config.get("rms_norm_eps")
    if type(value) is not float or not 0 < value < 1:
        raise CheckpointError(f"config.json: 'rms_norm_eps' is {str(value)[:40]!r}, not a small number",
                              hint="take config.json from openai/gpt-oss-20b or -120b")  # fmt: skip
    return value


def _describe_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.bos is not None:
        writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    if vocabulary.padding is not None:
        writer.add_pad_token_id(vocabulary.padding)
    # the template writes what begins and ends a conversation; llama.cpp would add it again
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def _shards(writer: gguf.GGUFWriter, tensors: Sequence[GgufTensor], path: Path) -> Iterator[Shard]:
    """Have the library write each file's beginning into memory, and place the tensors behind it."""
    stored = {tensor.stored.name: tensor.stored for tensor in tensors}
    beginnings = [io.BytesIO() for _ in writer.tensors]
    writer.fout = beginnings  # type: ignore[assignment]
    writer.state = WriterState.EMPTY  # an open file that nothing is written to
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file, beginning, inside in zip(writer.format_shard_names(path), beginnings, writer.tensors, strict=True):
        header = _padded(beginning.getvalue())
        placed, offset = [], len(header)
        for name in inside:
            placed.append(Placed(stored[name], offset))
            offset += gguf.GGUFWriter.ggml_pad(stored[name].nbytes, ALIGNMENT)
        last = placed[-1]
        yield Shard(file.name, header, tuple(placed), padding=offset - last.offset - last.tensor.nbytes)


def _padded(data: bytes) -> bytes:
    return data.ljust(gguf.GGUFWriter.ggml_pad(len(data), ALIGNMENT), b"\0")
