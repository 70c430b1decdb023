"""Trace: one request as it was seen from here, and the times that follow from it."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from ossquant.bench.sse import Piece, events

# vLLM and Ollama stream `reasoning`; llama.cpp, SGLang and transformers serve `reasoning_content`
REASONING_FIELDS = ("reasoning_content", "reasoning")
# <|channel|>analysis<|message|> … <|end|><|start|>assistant<|channel|>final<|message|> … <|return|> are 10 tokens that
# nobody sees; text that was cut into channels may take some more or less than it did as it was written
HIDDEN = 16
UNSEEN_SHARE = 0.05  # of an answer's time; a silence at its end that is longer, and lasts as HIDDEN chunks do, is more
Channel = Literal["reasoning", "final", "other"]
now = time.perf_counter  # the clock of all times; on Linux every process reads the same


@dataclass(frozen=True)
class Chunk:
    """One delta that brought text: when, in which channel, what.

    tokens is the completion's count so far, those that nobody sees included, where the server tells it with each chunk.
    """

    at: float
    channel: Channel
    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens as a server counts them; None where it does not say."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    reasoning: int | None = None


@dataclass(frozen=True)
class Trace:
    """One request. All times are seconds of one monotonic clock.

    intended is when it was to be sent, sent when it was, finished when the stream said that the answer was over.
    error says why it failed; truncated that its stream ended before the answer did. fields are the names under which
    reasoning came; messages what was asked.
    """

    index: int
    intended: float
    sent: float
    ended: float
    chunks: tuple[Chunk, ...] = ()
    usage: Usage = Usage()
    finish_reason: str | None = None
    finished: float | None = None
    truncated: bool = False
    error: str | None = None
    status: int | None = None
    fields: frozenset[str] = frozenset()
    turn: int = 0
    messages: Sequence[Mapping[str, str]] = ()

    @property
    def sent_words(self) -> int:
        """Words that were sent, of which none takes less than a token."""
        return sum(len(message["content"].split()) for message in self.messages)

    @property
    def ok(self) -> bool:
        """Whether it was answered, and to the end."""
        return self.error is None and not self.truncated

    @property
    def ttft(self) -> float:
        """Seconds to the first text in any channel."""
        return self.chunks[0].at - self.intended

    @property
    def ttfa(self) -> float | None:
        """Seconds to the first text of the final channel; None if there was none."""
        return next((chunk.at - self.intended for chunk in self.chunks if chunk.channel == "final"), None)

    @property
    def e2e(self) -> float:
        """Seconds to the last text."""
        return self.chunks[-1].at - self.intended

    @property
    def gaps(self) -> list[float]:
        """Seconds between chunks."""
        return [later.at - chunk.at for chunk, later in pairwise(self.chunks)]

    @property
    def first_tokens(self) -> int | None:
        """Tokens that were there with the first chunk; None if the server does not say."""
        return self.chunks[0].tokens if self.chunks else None

    def tpot(self, completion: int) -> float | None:
        """Seconds a token from the first chunk to the last, of so many tokens; None where nothing came after it.

        Where each chunk tells how many tokens there are, those between the two count, else all but one.
        """
        if len(self.chunks) < 2:
            return None
        after = (self.chunks[-1].tokens or completion) - (self.first_tokens or 1)
        return (self.chunks[-1].at - self.chunks[0].at) / after if after > 0 else None

    @property
    def went_on_unseen(self) -> bool:
        """Whether the server wrote on long after the last text that it showed, as past harmony's end."""
        if len(self.chunks) < 2:
            return False
        if self.chunks[-1].tokens is not None and self.usage.completion is not None:
            return self.usage.completion - self.chunks[-1].tokens > HIDDEN
        silence, shown = (self.finished or 0.0) - self.chunks[-1].at, self.e2e - self.ttft
        return silence > UNSEEN_SHARE * shown and silence > HIDDEN * shown / (len(self.chunks) - 1)

    def text(self, channel: Channel) -> str:
        """All the text of a channel."""
        return "".join(chunk.text for chunk in self.chunks if chunk.channel == channel)


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
    """Find the sentence in a server's error, whichever of the usual shapes it has."""
    for key in ("error", "message", "detail"):
        if isinstance(body, dict) and key in body:
            return error_text(body[key])
    return body if isinstance(body, str) else json.dumps(body)[:200]


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
