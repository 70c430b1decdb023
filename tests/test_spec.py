"""What a config.json says."""

from typing import Any

import pytest

from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.spec import ModelSpec

# openai/gpt-oss-20b, config.json, 2025-08: what a spec is read from
CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4,
    "experts_per_token": 4, "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "sliding_window": 128,
    "max_position_embeddings": 131072, "attention_bias": True, "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}  # fmt: skip
DIMENSIONS = [key for key, value in CONFIG.items() if type(value) is int and key != "experts_per_token"]


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key not in keys}


def test_published() -> None:
    """The published 20b config and the spec kept for it are the same; the 120b differs in layers and experts."""
    assert ModelSpec.from_config(CONFIG) == ModelSpec.published("20b")
    large = {"num_hidden_layers": 36, "num_local_experts": 128, "layer_types": CONFIG["layer_types"][:2] * 18}
    assert ModelSpec.from_config(CONFIG | large) == ModelSpec.published("120b")


def test_alternatives() -> None:
    """layer_types alternate where they are not given, and experts_per_token is another name for num_experts_per_tok."""
    assert ModelSpec.from_config(without("layer_types", "num_experts_per_tok")) == ModelSpec.published("20b")


@pytest.mark.parametrize("key", DIMENSIONS)
def test_missing_key(key: str) -> None:
    """A missing dimension is named."""
    with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
        ModelSpec.from_config(without(key, "experts_per_token"))


@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, "24", True, None, [24], float("nan")])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size"])
def test_senseless_dimension(key: str, value: object) -> None:
    """A dimension that is no sensible positive integer is refused by its name."""
    with pytest.raises(CheckpointError, match=key):
        ModelSpec.from_config(CONFIG | {key: value})


@pytest.mark.parametrize(
    "layer_types",
    ["sliding_attention", [], ["full_attention"], ["chunked_attention"] * 24, [["full_attention"]] * 24, 24],
)
def test_layer_types(layer_types: object) -> None:
    """layer_types must name every layer, by a kind that gpt-oss has."""
    with pytest.raises(CheckpointError, match="layer_types"):
        ModelSpec.from_config(CONFIG | {"layer_types": layer_types})


def test_too_many_layers() -> None:
    """A config of millions of layers is refused before a list of them is made."""
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        ModelSpec.from_config(without("layer_types") | {"num_hidden_layers": 2**24})


@pytest.mark.parametrize(
    "change",
    [{"model_type": "llama"}, {"model_type": None}, {"model_type": ["gpt_oss"]}, {"tie_word_embeddings": True},
     {"attention_bias": False}],
)  # fmt: skip
def test_not_gpt_oss(change: dict[str, Any]) -> None:
    """Another architecture is unsupported, not damaged."""
    with pytest.raises(UnsupportedError):
        ModelSpec.from_config(CONFIG | change)
