"""Ask a loaded model, and hear its channels as they come."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jinja2 import TemplateError
from transformers.generation.streamers import BaseStreamer

from ossquant.errors import CheckpointError, UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.decoder import Cache, decoding
from ossquant.runtime.fixed_cache import CACHE
from ossquant.runtime.harmony import STOPS, HarmonyParser, OnText

REASONING_EFFORTS = ("low", "medium", "high")


@dataclass(frozen=True)
class Reply:
    """What a model said; times in seconds.

    finish_reason is 'stop', 'length' when max_new_tokens or the model's context ran out, or 'interrupted'.
    """

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while a model spoke; reply is what it had said."""

    def __init__(self, reply: Reply) -> None:
        super().__init__()
        self.reply = reply


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
        self.parser.finish()


def generate(
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    reasoning_effort: str = "medium",
    cache: Cache = "auto",
    on_text: OnText | None = None,
) -> Reply:
    """Answer a conversation, one {'role', 'content'} a message. temperature 0 takes the likeliest token each time.

    Of earlier answers only what was final belongs in messages. A long prompt is computed PREFILL_CHUNK tokens at
    a time: eager attention's memory grows with their number. Raises UsageError, CheckpointError; Interrupted, a
    KeyboardInterrupt, on Ctrl-C.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise UsageError("max_new_tokens must be at least 1, temperature at least 0")
    if cache not in get_args(Cache):
        raise UsageError(f"cache '{cache}'", hint=f"one of {', '.join(get_args(Cache))}")
    started = time.monotonic()
    prompt = encode(tokenizer, messages, reasoning_effort, answer=True).to(model.device)
    room = _room(model, prompt.shape[1])
    stream = _TokenStream(HarmonyParser(tokenizer, on_text))
    stops = stop_tokens(model, tokenizer)

    def reply(finish_reason: str) -> Reply:
        ended = time.monotonic()
        return Reply(
            analysis=stream.parser.text("analysis"),
            final=stream.parser.text("final"),
            token_ids=stream.token_ids,
            prompt_tokens=prompt.shape[1],
            finish_reason=finish_reason,
            ttft=(stream.first_at or ended) - started,
            seconds=ended - started,
        )

    try:
        continue_prompt(model, prompt, max_new_tokens=min(max_new_tokens, room), cache=cache, streamer=stream,
                        eos_token_id=stops, **sampling(model, temperature))  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(reply("interrupted")) from None
    return reply("stop" if stream.token_ids[-1] in stops else "length")


@torch.inference_mode()
def continue_prompt(
    model: Any, prompt: torch.Tensor, *, max_new_tokens: int, cache: Cache, **options: Any
) -> torch.Tensor:
    """Compute a prompt (1, tokens) in chunks and return it with what follows; options are transformers' own."""
    tokens = prompt.shape[1]
    with decoding(model, tokens, tokens + max_new_tokens, cache) as prompt_cache:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            prefill_chunk_size=PREFILL_CHUNK,
            disable_compile=True,
            **{CACHE: prompt_cache},
            **options,
        )


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: those of generation_config.json, and harmony's own if it leaves some out."""
    stated = model.generation_config.eos_token_id
    known = [tokenizer.convert_tokens_to_ids(stop) for stop in STOPS]
    own = {token for token in known if token not in (None, tokenizer.unk_token_id)}
    return sorted(own.union(stated if isinstance(stated, list) else [] if stated is None else [stated]))


def sampling(model: Any, temperature: float) -> dict[str, Any]:
    """The options of continue_prompt for a temperature.

    gpt-oss is sampled over all tokens; transformers would keep 50 where the checkpoint says nothing.
    """
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": model.generation_config.top_k or 0}


def _room(model: Any, prompt_tokens: int) -> int:
    """How many tokens may follow the prompt."""
    longest = model.config.max_position_embeddings
    if prompt_tokens >= longest:
        raise UsageError(
            f"the conversation is {prompt_tokens} tokens, the model's context {longest}", hint="shorten the prompt"
        )
    return longest - prompt_tokens


def encode(tokenizer: Any, messages: Sequence[dict[str, str]], reasoning_effort: str, *, answer: bool) -> torch.Tensor:
    """Write a conversation as the checkpoint's template has it: (1, tokens); answer: begin one at its end.

    Raises UsageError, CheckpointError.
    """
    if reasoning_effort not in REASONING_EFFORTS:
        raise UsageError(f"reasoning effort '{reasoning_effort}'", hint=f"one of {', '.join(REASONING_EFFORTS)}")
    if not tokenizer.chat_template:
        raise CheckpointError("the checkpoint has no chat template", hint="copy gpt-oss' chat_template.jinja there")
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=answer, reasoning_effort=reasoning_effort,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
    except TemplateError as error:
        raise UsageError(f"the checkpoint's chat template refuses the conversation: {error}") from None
    return encoded["input_ids"]
