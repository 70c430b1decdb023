"""Ask a loaded model, and hear its channels as they come."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ossquant.errors import CheckpointError, UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.harmony import HarmonyParser, OnText

REASONING_EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Reply:
    """What a model said. finish_reason is 'stop', or 'length' when max_new_tokens ran out; times in seconds."""

    analysis: str
    final: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    ttft: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode rate: tokens after the first, by the time they took."""
        decode = self.seconds - self.ttft
        return (len(self.token_ids) - 1) / decode if decode > 0 else 0.0


class _TokenStream(BaseStreamer):
    """Passes generated tokens on; the first thing that generate puts is the prompt."""

    def __init__(self, parser: HarmonyParser) -> None:
        self.parser = parser
        self.token_ids: list[int] = []
        self.first_at = 0.0
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self.first_at = self.first_at or time.monotonic()
            self.token_ids.append(token)
            self.parser.feed(token)

    def end(self) -> None:
        pass


def generate(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    reasoning_effort: str = "medium",
    on_text: OnText | None = None,
) -> Reply:
    """Answer a conversation, one {'role', 'content'} a message. temperature 0 takes the likeliest token each time.

    A long prompt is computed PREFILL_CHUNK tokens at a time: eager attention's memory grows with their number.
    Raises UsageError, CheckpointError.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError("max_new_tokens must be at least 1, temperature at least 0")
    inputs = _prompt(tokenizer, messages, reasoning_effort).to(model.device)
    stream = _TokenStream(HarmonyParser(tokenizer, on_text))
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    started = time.monotonic()
    with torch.inference_mode():
        model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=max_new_tokens,
                       prefill_chunk_size=PREFILL_CHUNK, streamer=stream, **sampling)  # fmt: skip
    ended = time.monotonic()
    return Reply(
        analysis=stream.parser.text("analysis"),
        final=stream.parser.text("final"),
        token_ids=stream.token_ids,
        prompt_tokens=inputs.shape[1],
        finish_reason="stop" if stream.token_ids[-1] in _stop_tokens(model) else "length",
        ttft=stream.first_at - started,
        seconds=ended - started,
    )


def _prompt(tokenizer: Any, messages: Sequence[dict[str, str]], reasoning_effort: str) -> torch.Tensor:
    if reasoning_effort not in REASONING_EFFORTS:
        raise UsageError(f"reasoning effort '{reasoning_effort}'", hint=f"one of {', '.join(REASONING_EFFORTS)}")
    if not tokenizer.chat_template:
        raise CheckpointError("the checkpoint has no chat template", hint="copy gpt-oss' chat_template.jinja there")
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, reasoning_effort=reasoning_effort,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    return encoded["input_ids"]


def _stop_tokens(model: Any) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set(stop) if isinstance(stop, list) else {stop}
