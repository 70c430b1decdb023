"""Rope: how positions turn queries and keys, as config.json says it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ossquant.errors import CheckpointError, UnsupportedError

_HINT = "take config.json from openai/gpt-oss-20b or -120b, whichever it was made of"


@dataclass(frozen=True)
class Rope:
    """YaRN's parameters. truncate rounds its bounds to whole dimensions, which gpt-oss does not ask for."""

    theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Rope":
        """Read rope_theta and rope_scaling, or the rope_parameters that transformers 5 saves in their place.

        Raises CheckpointError for what is missing or no number, UnsupportedError for another kind of scaling.
        """
        table = _table(config)
        kind = table.get("rope_type", table.get("type"))
        if kind != "yarn":
            raise UnsupportedError(f"config.json: rope scaling is {str(kind)[:40]!r}, not 'yarn'", hint=_HINT)
        truncate = table.get("truncate", True)  # transformers' default
        if not isinstance(truncate, bool):
            raise CheckpointError("config.json: rope scaling's 'truncate' is neither true nor false", hint=_HINT)
        original = _number(table, "original_max_position_embeddings", config.get("initial_context_length"))
        return cls(
            theta=_number(table, "rope_theta", config.get("rope_theta")),
            factor=_number(table, "factor"),
            original_max_position_embeddings=int(original),
            beta_fast=_number(table, "beta_fast", 32.0),
            beta_slow=_number(table, "beta_slow", 1.0),
            truncate=truncate,
        )

    def published(self) -> dict[str, Any]:
        """The two keys as OpenAI's config.json has them, which every server reads."""
        theta = self.theta
        return {
            "rope_scaling": {
                "beta_fast": self.beta_fast,
                "beta_slow": self.beta_slow,
                "factor": self.factor,
                "original_max_position_embeddings": self.original_max_position_embeddings,
                "rope_type": "yarn",
                "truncate": self.truncate,
            },
            "rope_theta": int(theta) if theta.is_integer() else theta,
        }


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):
        table = config.get(key)
        if isinstance(table, dict):
            return table
    raise CheckpointError("config.json: neither rope_scaling nor rope_parameters", hint=_HINT)


def _number(table: Mapping[str, Any], key: str, default: object = None) -> float:
    value = table.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= 2**40:  # nor is NaN in between
        raise CheckpointError(f"config.json: rope's '{key}' is {str(value)[:40]!r}, not a sensible number", hint=_HINT)
    return float(value)
