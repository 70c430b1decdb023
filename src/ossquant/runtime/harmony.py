"""Harmony, the format in which gpt-oss speaks: messages, each in a channel.

A reply is `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`.
Source: OpenAI's harmony response format.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ossquant.errors import CheckpointError

MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")

# (channel, new text) of a message as it grows
OnText = Callable[[str, str], None]


@dataclass
class Message:
    """One message of a reply; header is what stood before its text, such as 'analysis'."""

    header: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)

    @property
    def channel(self) -> str:
        """The channel's name: analysis, commentary or final."""
        return self.header.split(maxsplit=1)[0] if self.header.strip() else "final"


class HarmonyParser:
    """Sorts a reply's tokens into messages as they come; on_text hears whole characters only."""

    def __init__(self, tokenizer: Any, on_text: OnText | None = None) -> None:
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._on_text = on_text or (lambda channel, text: None)
        self._markers = {tokenizer.convert_tokens_to_ids(marker): marker for marker in MARKERS}
        if None in self._markers or tokenizer.unk_token_id in self._markers:
            raise CheckpointError(
                "the tokenizer has no harmony tokens such as <|channel|>",
                hint="copy gpt-oss' own tokenizer files there",
            )
        self._state = "text"  # a reply without markers is taken as one final message
        self._header: list[int] = []

    def feed(self, token: int) -> None:
        """Take the next token of the reply."""
        marker = self._markers.get(token)
        if marker == "<|channel|>":
            self._state, self._header = "header", []
        elif marker == "<|message|>":
            self._state = "text"
            self.messages.append(Message(self._tokenizer.decode(self._header)))
        elif marker == "<|start|>":
            self._state = "role"
        elif marker in ("<|end|>", "<|return|>", "<|call|>"):
            self._state = "between"
        elif self._state == "header":
            self._header.append(token)
        elif self._state == "text":
            self._add_text(token)

    def _add_text(self, token: int) -> None:
        if not self.messages:
            self.messages.append(Message())
        message = self.messages[-1]
        message.tokens.append(token)
        text = self._tokenizer.decode(message.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else a character is still incomplete
            self._on_text(message.channel, text[len(message.text) :])
            message.text = text

    def text(self, channel: str) -> str:
        """All the text of a channel."""
        return "\n".join(message.text for message in self.messages if message.channel == channel)
