"""ModelSpec: what a gpt-oss config.json says, in its own names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ossquant.errors import CheckpointError, UnsupportedError

# The tokens that give a conversation its form. Source: OpenAI's harmony response format.
HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
# Beyond these it is a damaged or hostile config, not a model.
MAX_DIMENSION = 2**24
MAX_LAYERS = MAX_EXPERTS = 2**12


@dataclass(frozen=True)
class ModelSpec:
    """The dimensions of a gpt-oss model; field names are those of config.json."""

    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read a parsed config.json. Raises CheckpointError, UnsupportedError."""
        model_type = config.get("model_type")
        if model_type != "gpt_oss":
            raise UnsupportedError(
                f"config.json: model_type is {model_type!r}, not 'gpt_oss'",
                hint="ossquant handles gpt-oss models only",
            )
        if config.get("tie_word_embeddings") or not config.get("attention_bias", True):
            raise UnsupportedError("config.json: tied embeddings or attention without bias is not gpt-oss")
        layers = _dimension(config, "num_hidden_layers", at_most=MAX_LAYERS)
        experts = _dimension(config, "num_local_experts", at_most=MAX_EXPERTS)
        return cls(
            num_hidden_layers=layers,
            num_local_experts=experts,
            num_experts_per_tok=_dimension(config, "num_experts_per_tok", "experts_per_token", at_most=experts),
            hidden_size=_dimension(config, "hidden_size"),
            intermediate_size=_dimension(config, "intermediate_size"),
            num_attention_heads=_dimension(config, "num_attention_heads"),
            num_key_value_heads=_dimension(config, "num_key_value_heads"),
            head_dim=_dimension(config, "head_dim"),
            vocab_size=_dimension(config, "vocab_size"),
            sliding_window=_dimension(config, "sliding_window"),
            max_position_embeddings=_dimension(config, "max_position_embeddings"),
            layer_types=_layer_types(config, layers),
        )

    @classmethod
    def published(cls, size: str) -> "ModelSpec":
        """The spec of openai/gpt-oss-20b or gpt-oss-120b; size is '20b' or '120b'."""
        layers, experts = {"20b": (24, 32), "120b": (36, 128)}[size]
        return cls(
            num_hidden_layers=layers,
            num_local_experts=experts,
            num_experts_per_tok=4,
            hidden_size=2880,
            intermediate_size=2880,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=201088,
            sliding_window=128,
            max_position_embeddings=131072,
            layer_types=alternating_layer_types(layers),
        )


def alternating_layer_types(layers: int) -> tuple[str, ...]:
    """Sliding and full attention in turns, sliding first, as gpt-oss has them."""
    return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(layers))


def _dimension(config: Mapping[str, Any], *names: str, at_most: int = MAX_DIMENSION) -> int:
    value = next((config[name] for name in names if name in config), None)
    if value is None:
        raise CheckpointError(f"config.json: '{names[0]}' is missing", hint="fetch the model's own config.json")
    if type(value) is not int or not 0 < value <= at_most:
        raise CheckpointError(f"config.json: '{names[0]}' is {value!r}, not a sensible positive integer")
    return value


def _layer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types is None:
        return alternating_layer_types(layers)
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise CheckpointError(f"config.json: 'layer_types' must name {layers} layers, each one of {known}")
    return tuple(types)
