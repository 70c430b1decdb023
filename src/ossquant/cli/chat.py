"""ossquant chat: talk to a checkpoint in the terminal."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import typer

from ossquant.cli.options import (
    DEFAULT_MODEL_LEN,
    AnalysisOption,
    AttentionOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    Effort,
    EffortOption,
    KernelsOption,
    MaxMemoryOption,
    MaxModelLenOption,
    MaxNewTokensOption,
    SchemeOption,
    SystemOption,
    WarmupOption,
)
from ossquant.cli.speech import Speech, conversation, summary
from ossquant.errors import UsageError

COMMANDS = {
    "/effort": "low, medium or high: how long it thinks",
    "/analysis": "show or hide the analysis channel",
    "/reset": "forget the conversation; the system message stays",
    "/help": "this list; a line that begins with a blank is never a command",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass
class Chat:
    """A conversation and how it goes on. Turns are (question, final answer)."""

    system: str | None = None
    max_new_tokens: int = 4096
    temperature: float = 1.0
    effort: str = "medium"
    analysis: bool = True
    turns: list[tuple[str, str]] = field(default_factory=list)

    def keep(self, question: str, final: str) -> bool:
        """Keep a turn as far as it was said. Without a final answer it is dropped, so that turns alternate."""
        if final.strip():
            self.turns.append((question, final))
        return bool(final.strip())

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; returns what to say about it."""
        name, _, value = line.partition(" ")
        if name == "/effort" and value.strip() in get_args(Effort):
            self.effort = value.strip()
            return f"reasoning effort: {self.effort}"
        if name == "/effort":
            return f"reasoning effort is {self.effort}; /effort {'|'.join(get_args(Effort))} sets it"
        if name == "/analysis":
            self.analysis = not self.analysis
            return f"analysis is {'shown' if self.analysis else 'hidden'}"
        if name == "/reset":
            self.turns.clear()
            return "forgotten"
        listed = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
        return listed if name == "/help" else f"'{name}' is not a command:\n{listed}"


def chat(
    checkpoint: CheckpointArgument,
    scheme: SchemeOption = None,
    device_map: DeviceOption = "auto",
    max_memory: MaxMemoryOption = None,
    max_model_len: MaxModelLenOption = DEFAULT_MODEL_LEN,
    dtype: DtypeOption = "auto",
    attn_implementation: AttentionOption = "auto",
    kernels: KernelsOption = "auto",
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 4096,
    temperature: Annotated[float, typer.Option(min=0, help="1 as gpt-oss is sampled; 0: the likeliest token.")] = 1.0,
    reasoning_effort: EffortOption = "medium",
    analysis: AnalysisOption = True,
    warmup: WarmupOption = False,
) -> None:
    """Talk to a checkpoint. /help lists what can be said beside questions; Ctrl-D ends.

    Ctrl-C stops an answer: what it said stays in the conversation, and if it had not begun, the question goes too.
    Where stdin is not a terminal, each line is a turn.
    """
    from ossquant.cli import render
    from ossquant.cli.loading import load

    talk = Chat(system, max_new_tokens, temperature, reasoning_effort, analysis)
    loaded = load(checkpoint, warmup=warmup, max_memory=max_memory, max_model_len=max_model_len, scheme=scheme,
                  device_map=device_map, dtype=dtype, attn_implementation=attn_implementation,
                  kernels=kernels)  # fmt: skip
    for line in _lines():
        if line.split()[:1] == ["/exit"] and line.startswith("/"):
            return
        if line.startswith("/"):
            render.note(talk.command(line.rstrip()))
        elif line.strip():
            _answer(loaded.model, loaded.tokenizer, talk, line.strip())


def _lines() -> Iterator[str]:
    """The lines of stdin to its end. At a terminal's prompt Ctrl-C takes back what was typed."""
    if not sys.stdin.isatty():
        yield from (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
        return
    _edit_lines()
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo(err=True)
            return
        except KeyboardInterrupt:
            typer.echo("\n(Ctrl-D or /exit ends)", err=True)


def _edit_lines() -> None:
    """Let input() edit lines and remember them, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _answer(model: Any, tokenizer: Any, talk: Chat, question: str) -> None:
    from ossquant.cli import render
    from ossquant.runtime.generate import Interrupted, generate

    speech = Speech(talk.analysis)
    try:
        reply = generate(
            model,
            tokenizer,
            conversation(question, talk.system, talk.turns),
            max_new_tokens=talk.max_new_tokens,
            temperature=talk.temperature,
            reasoning_effort=talk.effort,
            on_text=speech,
        )
    except Interrupted as interrupted:
        reply = interrupted.reply
    except UsageError as error:  # too long by now
        render.note(f"{error.message}; /reset forgets the conversation")
        return
    speech.end()
    kept = talk.keep(question, reply.final)
    render.note(summary(reply) + ("" if kept else "; nothing was answered, the question is taken back"))
