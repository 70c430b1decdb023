"""Prompts: what is asked; from the packaged corpus, made up by a seed, or out of a file."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ossquant.errors import UsageError

Message = dict[str, str]
Source = Literal["corpus", "synthetic"]
NONCE_TOKENS = 10  # that a nonce takes, or so; the length of a prompt leaves room for it
MAX_LINE = 2**20  # bytes of a data set's line
MAX_LINES = 100_000
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """What stands before a dialogue, and what the user says in each turn."""

    lead: tuple[Message, ...]
    turns: tuple[str, ...]

    def with_nonce(self, nonce: str) -> "Prompt":
        """Begin it in a way that no other begins, so that no server finds it in its prefix cache."""
        if self.lead:
            first, *rest = self.lead
            return replace(self, lead=({**first, "content": f"[{nonce}] {first['content']}"}, *rest))
        return replace(self, turns=(f"[{nonce}] {self.turns[0]}", *self.turns[1:]))


def make_prompts(source: Source, number: int, *, words: int, turns: int, seed: int) -> list[Prompt]:
    """Make prompts of so many words a turn; the same for the same seed."""
    make = {"corpus": _from_corpus, "synthetic": _synthetic}[source]
    return [make(random.Random(f"{seed}/{index}"), words, turns) for index in range(number)]  # noqa: S311  no secret


def filler(words: int) -> str:
    """Text of the corpus, always the same."""
    return _notes(random.Random(0), words)  # noqa: S311  no secret


def read_dataset(path: Path, *, multi_turn: bool) -> list[Prompt]:
    """Read JSON lines, each {"prompt": text} or {"messages": [{"role", "content"}, …]}.

    In a single turn the last message is asked, after the others; in several the user's, one after the other.
    Raises UsageError naming the line that is broken.
    """
    try:
        with path.open("rb") as file:
            prompts = [_line(path, number, line, multi_turn) for number, line in _lines(path, file)]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="--dataset takes a file of JSON lines") from error
    if not prompts:
        raise UsageError(f"{path} holds no prompt", hint='write one a line: {"prompt": "…"}')
    return prompts


def _from_corpus(chance: random.Random, words: int, turns: int) -> Prompt:
    """A passage and a question about it, each turn another."""
    questions = chance.sample(_corpus()["questions"], k=min(turns, len(_corpus()["questions"])))
    texts = (questions[turn % len(questions)] for turn in range(turns))
    return Prompt((), tuple(f"{text}\n\n{_notes(chance, words - len(text.split()))}".strip() for text in texts))


def _synthetic(chance: random.Random, words: int, turns: int) -> Prompt:
    """A dialogue as harmony has it, of random words: instructions, an exchange, then the turns."""
    first, *others = (words // 4, words // 4, words // 4, words - 3 * (words // 4))
    lead: tuple[Message, ...] = ()
    if first >= 2:
        roles = ("system", "user", "assistant")
        lengths = (first, others[0], others[1])
        lead = tuple({"role": role, "content": _random(chance, n)} for role, n in zip(roles, lengths, strict=True))
    asked = [others[2] if lead else words, *[words] * (turns - 1)]
    return Prompt(lead, tuple(_random(chance, n) for n in asked))


def _random(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(_corpus()["words"], k=max(1, words)))


def _notes(chance: random.Random, words: int) -> str:
    """Sentences in random order, cut at so many words."""
    taken: list[str] = []
    while len(taken) < words:
        for sentence in chance.sample(_corpus()["sentences"], k=len(_corpus()["sentences"])):
            taken += sentence.split()
    return " ".join(taken[: max(0, words)])


@cache
def _corpus() -> dict[str, list[str]]:
    raw: dict[str, list[str]] = json.loads(Path(__file__).with_name("corpus.json").read_text("utf-8"))
    return raw


def _lines(path: Path, file: Any) -> Iterator[tuple[int, bytes]]:
    for number in range(1, MAX_LINES + 1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise _broken(path, number, f"more than {MAX_LINE} bytes")
        if line.strip():
            yield number, line
    if file.read(1):
        raise UsageError(f"{path} has more than {MAX_LINES:,} lines", hint="split it")


def _line(path: Path, number: int, line: bytes, multi_turn: bool) -> Prompt:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _broken(path, number, "not JSON") from error
    if isinstance(raw, dict) and isinstance(raw.get("prompt"), str) and raw["prompt"].strip():
        return Prompt((), (raw["prompt"],))
    messages = raw.get("messages") if isinstance(raw, dict) else None
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise _broken(path, number, "neither a 'prompt' nor 'messages' with 'role' and 'content'")
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return _dialogue(path, number, plain, multi_turn)


def _dialogue(path: Path, number: int, messages: Sequence[Message], multi_turn: bool) -> Prompt:
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked or (not multi_turn and asked[-1] != len(messages) - 1):
        raise _broken(path, number, "the last message is not the user's")
    if not multi_turn:
        return Prompt(tuple(messages[:-1]), (messages[-1]["content"],))
    return Prompt(tuple(messages[: asked[0]]), tuple(messages[place]["content"] for place in asked))


def _is_message(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("role") in _ROLES and isinstance(raw.get("content"), str)


def _broken(path: Path, number: int, what: str) -> UsageError:
    return UsageError(f"{path} line {number}: {what}", hint='a line is {"prompt": "…"} or {"messages": […]}')
