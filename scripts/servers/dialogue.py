"""Dialogues that a tiny model knows by heart, with their tokens counted, and the ways in which servers show harmony."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from servers.case import TINY


@dataclass(frozen=True)
class Dialogue:
    """A conversation, its answer, and the tokens of prompt and answer, <|return|> included."""

    messages: Sequence[dict[str, str]]
    reasoning_effort: str
    analysis: str
    final: str
    prompt_tokens: int
    answer_tokens: int


def channels(dialogue: Dialogue) -> tuple[str, str]:
    """Harmony parsed: the analysis apart from the final answer."""
    return dialogue.analysis, dialogue.final


def markers(dialogue: Dialogue) -> tuple[str, str]:
    """Harmony as it was generated."""
    thought = f"<|channel|>analysis<|message|>{dialogue.analysis}<|end|>"
    return "", f"{thought}<|start|>assistant<|channel|>final<|message|>{dialogue.final}"


def bare(dialogue: Dialogue) -> tuple[str, str]:
    """Harmony not parsed, its markers left out."""
    return "", f"analysis{dialogue.analysis}assistantfinal{dialogue.final}"


@cache
def tiny_dialogues() -> tuple[Dialogue, ...]:
    """Every question that the tiny model knows, at low, medium and high effort in turn."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    known = json.loads((TINY / "dialogues.json").read_text("utf-8"))
    return tuple(_counted(tokenizer, known[3 * question + question % 3]) for question in range(len(known) // 3))


def _counted(tokenizer: Any, dialogue: dict[str, Any]) -> Dialogue:
    prompt = tokenizer.apply_chat_template(
        dialogue["messages"], add_generation_prompt=True, tokenize=False, reasoning_effort=dialogue["reasoning_effort"]
    )
    answer = markers(Dialogue(**dialogue, prompt_tokens=0, answer_tokens=0))[1] + "<|return|>"
    sizes = [len(tokenizer.encode(text, add_special_tokens=False)) for text in (prompt, answer)]
    return Dialogue(**dialogue, prompt_tokens=sizes[0], answer_tokens=sizes[1])


def read_dialogues(path: Path) -> tuple[Dialogue, ...]:
    """Dialogues that were written with their counts."""
    return tuple(Dialogue(**dialogue) for dialogue in json.loads(path.read_text("utf-8")))
