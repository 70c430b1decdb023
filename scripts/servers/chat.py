"""Asks a server for what the trained tiny model knows by heart, and compares every word."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from servers.case import demand
from servers.dialogue import Dialogue
from servers.process import Server

CHAT = "/v1/chat/completions"
LONGEST = 400  # tokens of an answer
CUT = 8  # tokens of the answer that is cut off


@dataclass(frozen=True)
class Reply:
    """What a server answered; thought is what it gave as reasoning."""

    content: str
    thought: str
    finish_reason: str | None
    usage: dict[str, Any] | None
    pieces: int = 1
    done: bool = True


@dataclass(frozen=True)
class Manners:
    """How a server words an answer.

    shown makes (reasoning, content) of a dialogue. The others are how a server may differ from what OpenAI's API
    says: whether usage counts the token that ends an answer, whether a stream tells usage and closes with [DONE],
    which role it has for instructions, and which last characters a stream loses.
    """

    shown: Callable[[Dialogue], tuple[str, str]]
    model: str = "tiny"
    counts_end: bool = True
    streams_usage: bool = True
    says_done: bool = True
    developer: str = "developer"
    drops_last: str = ""

    @property
    def oddities(self) -> list[str]:
        """What a client of this server must know, in words."""
        said = {
            "usage does not count the end token": not self.counts_end,
            "a stream tells no usage": not self.streams_usage,
            "a stream closes without [DONE]": not self.says_done,
            f"the role developer must be sent as {self.developer}": self.developer != "developer",
            f"a stream loses a last {self.drops_last}": bool(self.drops_last),
        }
        return [words for words, holds in said.items() if holds]


def ask_all(server: Server, manners: Manners, dialogues: Iterable[Dialogue]) -> dict[str, Any]:
    """Ask each dialogue whole and streamed, and one that is cut off. Raises Fault at the first wrong word."""
    asked = 0
    for dialogue in dialogues:
        body = _body(manners, dialogue)
        _compare(_whole(server, body), manners, dialogue, streamed=False)
        _compare(_streamed(server, body), manners, dialogue, streamed=True)
        asked += 1
    cut = _whole(server, body | {"max_tokens": CUT})
    demand(cut.finish_reason == "length", f"cut off after {CUT} tokens, finish_reason is {cut.finish_reason!r}")
    demand(bool(cut.usage) and cut.usage["completion_tokens"] == CUT, f"cut off after {CUT} tokens: {cut.usage}")
    return {"dialogues": asked, "answers": 2 * asked + 1} | ({"oddities": manners.oddities} if manners.oddities else {})


def _body(manners: Manners, dialogue: Dialogue) -> dict[str, Any]:
    roles = {"developer": manners.developer}
    messages = [message | {"role": roles.get(message["role"], message["role"])} for message in dialogue.messages]
    return {
        "model": manners.model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": LONGEST,
        "reasoning_effort": dialogue.reasoning_effort,
    }


def _whole(server: Server, body: dict[str, Any]) -> Reply:
    answer = server.post(CHAT, body)
    choice = answer["choices"][0]
    content, thought = _said(choice["message"])
    return Reply(content, thought, choice["finish_reason"], answer.get("usage"))


def _streamed(server: Server, body: dict[str, Any]) -> Reply:
    content = thought = ""
    reason, usage, pieces, done = None, None, 0, False
    for event in server.stream(CHAT, body):
        done = not event
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            said, thinking = _said(choice.get("delta") or {})
            content, thought, pieces = content + said, thought + thinking, pieces + bool(said or thinking)
            reason = choice.get("finish_reason") or reason
    return Reply(content, thought, reason, usage, pieces, done)


def _said(message: dict[str, Any]) -> tuple[str, str]:
    """Content and reasoning, under either of the names that servers give it."""
    return message.get("content") or "", message.get("reasoning_content") or message.get("reasoning") or ""


def _compare(reply: Reply, manners: Manners, dialogue: Dialogue, streamed: bool) -> None:
    thought, content = manners.shown(dialogue)
    if streamed and manners.drops_last:
        content = content.rstrip(manners.drops_last)
    question = f"{'streamed: ' * streamed}{dialogue.messages[-1]['content']!r} at {dialogue.reasoning_effort} effort"
    demand(reply.content == content, f"{question}: answered {reply.content!r}, not {content!r}")
    demand(reply.thought == thought, f"{question}: thought {reply.thought!r}, not {thought!r}")
    demand(reply.finish_reason == "stop", f"{question}: finish_reason {reply.finish_reason!r}")
    if not streamed or manners.streams_usage:
        _compare_usage(question, reply.usage or {}, manners, dialogue)
    if streamed:
        demand(reply.pieces > 1, f"{question}: came in {reply.pieces} pieces")
        demand(reply.done == manners.says_done, f"{question}: closed with [DONE]: {reply.done}")
        demand(bool(reply.usage) == manners.streams_usage, f"{question}: usage {reply.usage}")


def _compare_usage(question: str, usage: dict[str, Any], manners: Manners, dialogue: Dialogue) -> None:
    answer = dialogue.answer_tokens - (not manners.counts_end)
    expected = {
        "prompt_tokens": dialogue.prompt_tokens,
        "completion_tokens": answer,
        "total_tokens": dialogue.prompt_tokens + answer,
    }
    told = {key: usage.get(key) for key in expected}
    demand(told == expected, f"{question}: usage {told}, not {expected}")
