"""Harmony, the format in which gpt-oss speaks: messages, each in a channel.

A reply is `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>`.
Source: OpenAI's harmony response format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ossquant.errors import CheckpointError
from ossquant.spec import HARMONY_MARKERS

# gpt-oss' generation_config.json; <|call|> waits for a tool
STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")

# (channel, new text) of a message as it grows
OnText = Callable[[str, str], None]


@dataclass
class Message:
    """One message of a reply; header is what stood before its text, such as 'analysis'."""

    header: str = ""
    text: str = ""

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
        self._markers = {tokenizer.convert_tokens_to_ids(marker): marker for marker in HARMONY_MARKERS}
        if None in self._markers or tokenizer.unk_token_id in self._markers:
            raise CheckpointError(
                "the tokenizer has no harmony tokens such as <|channel|>",
                hint="copy gpt-oss' own tokenizer files there",
            )
        self._state = "text"  # a reply without markers is taken as one final message
        self._header: list[int] = []
        self._pending: list[int] = []  # tokens of a character that is still incomplete

    def feed(self, token: int) -> None:
        """Take the next token of the reply."""
        marker = self._markers.get(token)
        if marker:
            self.finish()
        if marker == "<|channel|>":
            self._state, self._header = "header", []
        elif marker == "<|message|>":
            self._state = "text"
            self.messages.append(Message(self._tokenizer.decode(self._header)))
        elif marker == "<|start|>":
            self._state, self._header = "role", []
        elif marker in ("<|end|>", "<|return|>", "<|call|>"):
            self._state = "between"
        elif self._state == "header":
            self._header.append(token)
        elif self._state == "text":
            self._pending.append(token)
            self._say(whole=True)

    def finish(self) -> None:
        """Say what is left of a character that was never completed."""
        self._say(whole=False)

    def _say(self, whole: bool) -> None:
        """Decode what is pending; its bytes stand alone, for the tokenizer is byte-level."""
        text = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        if whole and text.endswith("\ufffd"):
            return
        self._pending = []
        if text:
            if not self.messages:
                self.messages.append(Message())
            self.messages[-1].text += text
            self._on_text(self.messages[-1].channel, text)

    def text(self, channel: str) -> str:
        """All the text of a channel."""
        return "\n".join(message.text for message in self.messages if message.channel == channel)
