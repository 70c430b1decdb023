"""What is said to a model, and how its reply sounds: final on stdout, all else dim on stderr."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ossquant.runtime.generate import Reply

# a model may say ESC, and a terminal would obey
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Speech:
    """Says (channel, text) pieces; analysis False hides that channel."""

    def __init__(self, analysis: bool = True) -> None:
        self._analysis = analysis
        self._last = ""

    def __call__(self, channel: str, text: str) -> None:
        from ossquant.cli import render

        if channel == "analysis" and not self._analysis:
            return
        if self._last and channel != self._last:
            self.end()
        self._last = channel
        plain = text.translate(_CONTROLS)
        if channel == "final":
            typer.echo(plain, nl=False)
        else:
            render.err.print(plain, end="", style="dim", markup=False, soft_wrap=True)

    def end(self) -> None:
        """Break the line that is being said, where it is being said."""
        if self._last:
            typer.echo(err=self._last != "final")
        self._last = ""


def summary(reply: "Reply") -> str:
    """One line: how many tokens, how fast, and why it ended if not by itself."""
    ended = {
        "stop": "",
        "length": f"; cut off after {len(reply.token_ids)} tokens (--max-new-tokens, or the model's context)",
        "interrupted": "; stopped by Ctrl-C",
    }[reply.finish_reason]
    return (
        f"{len(reply.token_ids)} tokens, {reply.tokens_per_second:.1f} tokens/s, first after {reply.ttft:.2f} s{ended}"
    )


def conversation(
    question: str, system: str | None = None, turns: Sequence[tuple[str, str]] = ()
) -> list[dict[str, str]]:
    """Messages for the chat template: instructions, earlier questions with their final answers, the question."""
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]
