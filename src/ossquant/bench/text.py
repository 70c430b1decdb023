"""Text: the token ids that models are compared on, and which of them count."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ossquant.checkpoint.header import parse_json
from ossquant.errors import CheckpointError, UsageError
from ossquant.runtime.generate import encode
from ossquant.units import size

MAX_BYTES = 256 * 2**20  # of a text file
MAX_CONVERSATIONS = 100_000
ROLES = ("system", "developer", "user", "assistant")
PROMPTS = "eval_prompts.jsonl"  # packaged, beside this file

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Text:
    """One text. Its tokens from begin on are scored; answered: those are what the reference answered."""

    token_ids: tuple[int, ...]
    begin: int
    answered: bool = False

    @property
    def scored(self) -> int:
        """How many of its tokens are scored."""
        return len(self.token_ids) - self.begin

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before the scored tokens."""
        return self.token_ids[: self.begin]


def packaged_prompts() -> bytes:
    """The prompts that come along, as a file of conversations."""
    return files("ossquant.bench").joinpath(PROMPTS).read_bytes()


def read_text(path: Path) -> bytes:
    """Read a text file of a sensible size. Raises UsageError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {size(MAX_BYTES)}", hint="give a part of it")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="--text takes a .jsonl or .txt file") from error


def conversations(raw: bytes, name: str) -> list[Conversation]:
    """Read conversations, one JSON object a line: {"messages": [{"role", "content"}, …]}; its other keys are not read.

    Raises UsageError that names the line.
    """
    lines = [(number, line) for number, line in enumerate(raw.splitlines(), 1) if line.strip()]
    if not lines or len(lines) > MAX_CONVERSATIONS:
        raise UsageError(f"{name} has {len(lines):,} conversations", hint=f"give 1 to {MAX_CONVERSATIONS:,}")
    return [_conversation(line, f"{name}, line {number}") for number, line in lines]


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        messages = parse_json(line, where).get("messages")
    except CheckpointError as error:  # not JSON
        raise UsageError(error.message, hint="a line is one JSON object") from error
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: no messages", hint='{"messages": [{"role": "user", "content": "…"}]}')
    return [_message(message, where) for message in messages]


def _message(message: Any, where: str) -> Mapping[str, str]:
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if role not in ROLES or not isinstance(content, str):
        raise UsageError(f"{where}: a message without a role and a content", hint=f"roles are {', '.join(ROLES)}")
    return {"role": role, "content": content}


def answered_text(tokenizer: Any, messages: Conversation, reasoning_effort: str, where: str) -> Text:
    """Write a conversation that ends with the assistant; that last message is scored. Raises UsageError."""
    prompt = encode(tokenizer, [*map(dict, messages[:-1])], reasoning_effort, answer=True)[0].tolist()
    whole = encode(tokenizer, [*map(dict, messages)], reasoning_effort, answer=False)[0].tolist()
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise UsageError(f"{where}: the template does not begin it as the prompt before its answer")
    return Text(tuple(whole), len(prompt))


def windows(tokenizer: Any, raw: bytes, window: int, name: str) -> list[Text]:
    """Cut a plain text into windows; of each the second half is scored, as llama-perplexity does, what is left is not.

    Raises UsageError for a text that is shorter than a window, or not UTF-8.
    """
    try:
        token_ids = tokenizer(raw.decode(), add_special_tokens=False)["input_ids"]
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8: byte {error.start}", hint="convert it first") from error
    if len(token_ids) < window:
        raise UsageError(f"{name} has {len(token_ids)} tokens, a window {window}", hint="a longer text, or --window")
    return [Text(tuple(piece), window // 2 + 1) for piece in _windows(token_ids, window)]


def _windows(token_ids: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    for begin in range(0, len(token_ids) - window + 1, window):
        yield token_ids[begin : begin + window]


def vocabulary(tokenizer: Any) -> dict[int, str]:
    """Every token of a tokenizer by its id."""
    return {number: token for token, number in tokenizer.get_vocab().items()}
