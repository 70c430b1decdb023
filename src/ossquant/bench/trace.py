"""Trace: one request as it was seen from here, and the times that follow from it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

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
