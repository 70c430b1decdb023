"""Read what a server streamed, once nothing is being timed any more."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ossquant.bench.sse import Piece, events
from ossquant.bench.trace import Chunk, Trace, Usage
from ossquant.errors import plain

MAX_SENTENCE = 200  # characters that are repeated of what a server says

# vLLM and Ollama stream `reasoning`; llama.cpp, SGLang and transformers serve `reasoning_content`
REASONING_FIELDS = ("reasoning_content", "reasoning")


@dataclass
class Raw:
    """An answer as it came, parsed when nothing is being timed."""

    blank: Trace
    pieces: list[Piece]

    @property
    def failed(self) -> bool:
        """Whether it failed in a way that is known before its stream is read."""
        return self.blank.error is not None

    def trace(self) -> Trace:
        """Read the stream."""
        return self.blank if self.failed else read_trace(self.blank, self.pieces)


def read_trace(blank: Trace, pieces: Iterable[Piece]) -> Trace:
    """Fill in what a stream said. An error in it, and a stream that says nothing, are the trace's error."""
    reading = _Reading()
    for event in events(pieces):
        if event.data.strip() == b"[DONE]":
            reading.done = True
        elif error := reading.take(event.at, event.data):
            return replace(blank, error=error, chunks=tuple(reading.chunks))
    if not reading.chunks:
        said = "no text in the stream" if reading.seen or reading.done else "an empty stream"
        return replace(blank, error=said, usage=reading.usage, finish_reason=reading.finish_reason)
    return replace(
        blank,
        chunks=tuple(reading.chunks),
        usage=reading.usage,
        finish_reason=reading.finish_reason,
        finished=reading.finished,
        truncated=reading.finish_reason is None and not reading.done,
        fields=frozenset(reading.fields),
    )


class _Reading:
    """What was read of a stream so far."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.usage = Usage()
        self.finish_reason: str | None = None
        self.finished: float | None = None
        self.fields: set[str] = set()
        self.done = self.seen = False

    def take(self, at: float, data: bytes) -> str | None:
        """Take an event's data; return an error that it tells."""
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            return "an event that is not JSON"
        if not isinstance(body, dict):
            return "an event that is no object"
        self.seen = True
        if body.get("error"):
            return f"an error in the stream: {error_text(body)}"
        if isinstance(body.get("usage"), dict):
            self.usage = _usage(body["usage"])
        choices = body.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if isinstance(choice, dict):
            self._choice(at, choice, _so_far(body))
        return None

    def _choice(self, at: float, choice: dict[str, Any], tokens: int | None) -> None:
        if isinstance(choice.get("finish_reason"), str):
            self.finish_reason, self.finished = choice["finish_reason"], at
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return
        for name in REASONING_FIELDS:
            if isinstance(delta.get(name), str) and delta[name]:
                self.fields.add(name)
                self.chunks.append(Chunk(at, "reasoning", delta[name], tokens))
                break  # a server may send both for the sake of clients that know one
        if isinstance(delta.get("content"), str) and delta["content"]:
            self.chunks.append(Chunk(at, "final", delta["content"], tokens))


def error_text(body: Any) -> str:
    """Find the sentence in a server's error, whichever of the usual shapes it has, safe to print."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            return error_text(body[key])
    return plain(body if isinstance(body, str) else json.dumps(body))[:MAX_SENTENCE]


def _so_far(body: dict[str, Any]) -> int | None:
    """The completion's tokens with this chunk: vLLM tells them in its usage, llama.cpp in its timings."""
    for name, key in (("usage", "completion_tokens"), ("timings", "predicted_n")):
        if isinstance(body.get(name), dict):
            return _count(body[name].get(key))
    return None


def _usage(raw: dict[str, Any]) -> Usage:
    prompt, completion = raw.get("prompt_tokens_details"), raw.get("completion_tokens_details")
    return Usage(
        prompt=_count(raw.get("prompt_tokens")),
        completion=_count(raw.get("completion_tokens")),
        cached=_count(prompt.get("cached_tokens")) if isinstance(prompt, dict) else None,
        reasoning=_count(completion.get("reasoning_tokens")) if isinstance(completion, dict) else None,
    )


def _count(raw: Any) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0 else None
