"""Positions as config.json says them: OpenAI's keys, transformers 5's, and what is neither."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig, GptOssForCausalLM

from ossquant.checkpoint.header import parse_json
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.rope import Rope

PUBLISHED = Rope(150000.0, 32.0, 4096, 32.0, 1.0, truncate=False)
SCALING: dict[str, Any] = {
    "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
    "rope_type": "yarn", "truncate": False,
}  # fmt: skip


def of(theta: Any = 150000, **changes: Any) -> Rope:
    """Read a config with some of its rope keys changed; a key without a value is left out."""
    scaling = {key: value for key, value in (SCALING | changes).items() if value is not ...}
    return Rope.from_config({"rope_scaling": scaling, **({} if theta is ... else {"rope_theta": theta})})


def test_published(trained: Path) -> None:
    """OpenAI's config.json says theta 150000, factor 32 from 4096 positions, betas 32 and 1, bounds not rounded."""
    assert Rope.from_config(json.loads((trained / "config.json").read_text())) == PUBLISHED
    assert of() == PUBLISHED


def test_transformers_5(tmp_path: Path) -> None:
    """What transformers 5 itself saves in place of the published keys is read, whatever the numbers."""
    rope = {"rope_type": "yarn", "factor": 16.5, "beta_fast": 30.0, "beta_slow": 2.0, "truncate": True,
            "original_max_position_embeddings": 2048, "rope_theta": 10000.0}  # fmt: skip
    config = GptOssConfig(
        num_hidden_layers=2, num_local_experts=4, hidden_size=64, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=64, rope_parameters=rope,
    )  # fmt: skip
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys().isdisjoint({"rope_scaling", "rope_theta"})
    assert Rope.from_config(saved) == Rope(10000.0, 16.5, 2048, 30.0, 2.0, truncate=True)
    published = Rope.from_config(saved).published()
    assert GptOssConfig(**published).rope_parameters == rope


@pytest.mark.parametrize("rope", [PUBLISHED, Rope(12345.5, 3.25, 1, 2.0, 0.5, truncate=True)])
def test_published_round_trip(rope: Rope) -> None:
    """The published keys, written and read as JSON, are the same numbers; a whole theta is an integer there."""
    written = json.dumps(rope.published())
    assert Rope.from_config(json.loads(written)) == rope
    assert ('"rope_theta": 150000}' in written) == (rope is PUBLISHED)


def test_published_is_the_published_config(trained: Path) -> None:
    """What is written has the keys and values of OpenAI's config.json, and no others."""
    config = json.loads((trained / "config.json").read_text())
    assert PUBLISHED.published() == {key: config[key] for key in ("rope_scaling", "rope_theta")}


def test_defaults() -> None:
    """Without betas and truncate transformers computes with 32, 1 and rounded bounds; so is it read."""
    assert of(beta_fast=..., beta_slow=..., truncate=...) == Rope(150000.0, 32.0, 4096, 32.0, 1.0, truncate=True)
    scaling = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    read = GptOssConfig(rope_scaling=scaling, rope_theta=150000)
    assert read.rope_parameters.get("truncate", True) is True


def test_older_names() -> None:
    """`type`, and the original context beside the table, are read as well."""
    scaling = {key: value for key, value in SCALING.items() if key not in ("rope_type", "type")}
    scaling.pop("original_max_position_embeddings")
    config = {"rope_scaling": scaling | {"type": "yarn"}, "rope_theta": 150000.0, "initial_context_length": 4096}
    assert Rope.from_config(config) == PUBLISHED


@pytest.mark.parametrize("kind", ["linear", "llama3", "default", "YARN", None, 3, ["yarn"], ...])
def test_other_kinds(kind: Any) -> None:
    """Any other scaling than YaRN is not supported, and named."""
    with pytest.raises(UnsupportedError, match=r"rope scaling is .*, not 'yarn'"):
        of(rope_type=kind)


@pytest.mark.parametrize("config", [{}, {"rope_scaling": None}, {"rope_scaling": "yarn", "rope_parameters": [1]}])
def test_no_table(config: dict[str, Any]) -> None:
    """A config that says nothing of positions is refused, with where to take one from."""
    with pytest.raises(CheckpointError, match=r"neither rope_scaling nor rope_parameters \(take config\.json from"):
        Rope.from_config(config)


BAD = ["NaN", "Infinity", "-Infinity", "0", "-1", "-0.5", '"32"', "true", "null", "[]", "{}", "1e300", "1e999",
       "9" * 400, str(2**40 + 1)]  # fmt: skip
NUMBERS = ("rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow")


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", BAD, ids=lambda value: value[:12])
def test_no_number(key: str, value: str) -> None:
    """Whatever JSON may hold in place of a sensible positive number is refused by its key, in one line."""
    table = ", ".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in SCALING.items() if name != key)
    text = f'{{"rope_parameters": {{{table}, "rope_theta": 150000, "x": 1}}}}'.replace('"x": 1', f'"{key}": {value}')
    if key == "rope_theta":
        text = text.replace('"rope_theta": 150000, ', "")
    with pytest.raises(CheckpointError, match=f"config.json: rope's '{key}' is '.*', not a sensible number") as error:
        Rope.from_config(parse_json(text.encode(), "config.json"))
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("key", ["rope_theta", "factor", "original_max_position_embeddings"])
def test_missing(key: str) -> None:
    """These have no default: a missing one is named."""
    with pytest.raises(CheckpointError, match=f"rope's '{key}' is 'None'"):
        of(theta=...) if key == "rope_theta" else of(**{key: ...})


@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_truncate(value: Any) -> None:
    """truncate is true or false, nothing like it."""
    with pytest.raises(CheckpointError, match="'truncate' is neither true nor false"):
        of(truncate=value)
