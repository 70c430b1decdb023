import os
import pty
import re
import select
import signal
import sys
from pathlib import Path

import pytest
from endless import make_endless

from conftest import run_cli
from ossquant import load_model
from ossquant.cli.chat import COMMANDS, Chat, _answer
from ossquant.cli.speech import Speech, conversation

PATIENCE = 40  # seconds without a sign of life
AGAIN = 2  # seconds until a key is pressed again
TURNS = """\
What is the capital of France?
/no-such
/effort high
/analysis
And of Spain?
/reset

/exit
Who are you?
"""


def test_chat_in_lines(trained: Path) -> None:
    """Each line of stdin is a turn or a command; answers alone are on stdout, and /exit ends at once."""
    done = run_cli("chat", trained, "--temperature", "0", "--reasoning-effort", "low", input=TURNS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\nThe capital of Spain is Madrid.\n"
    plan, attention, loaded, placed, *told = done.stderr.splitlines()
    assert (plan[:6], attention, loaded[:10]) == ("plan: ", "eager attention: no CUDA GPU", "loaded in ")
    assert "parameters in 4 bits" in placed
    speed = re.compile(r"\d+ tokens, \d+\.\d tokens/s, first after \d+\.\d\d s")
    spoken = [line for line in told if not line.startswith("  /")]
    assert [bool(speed.fullmatch(line)) for line in spoken] == [False, True, False, False, False, True, False]
    assert spoken[0].endswith("Paris.")  # the analysis of the first answer; that of the second is hidden
    assert [spoken[index] for index in (2, 3, 4, 6)] == [
        "'/no-such' is not a command:", "reasoning effort: high", "analysis is hidden", "forgotten",
    ]  # fmt: skip


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *command: str) -> None:
        self.process, self.terminal = pty.fork()
        if not self.process:
            os.execvpe(command[0], command, os.environ | {"TERM": "xterm"})
        self.shown = ""

    def until(self, text: str, press: str = "") -> str:
        """Read until the terminal shows text; returns all up to it. Presses a key again where nothing comes of it."""
        patience = PATIENCE
        while text not in self.shown:
            if not select.select([self.terminal], [], [], AGAIN if press else patience)[0]:
                self.type(press)
                patience -= AGAIN
                if press and patience > 0:
                    continue
                os.kill(self.process, signal.SIGKILL)
                raise AssertionError(f"no {text!r} in {self.shown!r}")
            self.shown += os.read(self.terminal, 4096).decode("utf-8", "replace")
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self.terminal, keys.encode())

    def end(self) -> int:
        """Wait for the command; returns its exit code."""
        try:
            while os.read(self.terminal, 4096):
                pass
        except OSError:  # Linux says so when the other side has closed
            pass
        status = os.waitpid(self.process, 0)[1]
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(status)


def test_chat_on_a_terminal(trained: Path, tmp_path: Path) -> None:
    """Ctrl-C stops the answer, or takes a typed line back, and the chat goes on; Ctrl-D ends it."""
    endless = make_endless(trained, tmp_path / "endless")
    program = str(Path(sys.executable).parent / "ossquant")
    terminal = Terminal(program, "chat", str(endless), "--max-new-tokens", "100000", "--temperature", "0")
    terminal.until("> ")
    terminal.type("Hi\n")
    terminal.until("is ")  # it says that often
    terminal.type("\x03")
    assert "tokens/s" in terminal.until("stopped by Ctrl-C")
    terminal.until("> ")
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.type("\x03")  # which may be lost while readline draws the prompt
    terminal.until("(Ctrl-D or /exit ends)", press="\x03")
    terminal.type("/help\n")
    assert "/reset" in terminal.until("/exit ")
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_cut_answer_stays_and_none_is_dropped() -> None:
    """What was said of an answer goes back with its question; a question without an answer does not."""
    talk = Chat(system="Be brief.")
    assert talk.keep("One?", "It is o")
    assert not talk.keep("Two?", " \n")
    assert conversation("Three?", talk.system, talk.turns) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "It is o"},
        {"role": "user", "content": "Three?"},
    ]
    talk.command("/reset")
    assert conversation("Four?", talk.system, talk.turns) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Four?"},
    ]


def test_commands() -> None:
    """Commands change what they name, tell what they did, and a wrong one lists them all."""
    talk = Chat()
    assert talk.command("/effort high") == "reasoning effort: high"
    assert talk.effort == "high"
    assert "is high" in talk.command("/effort huge")
    assert talk.effort == "high"
    assert (talk.command("/analysis"), talk.analysis) == ("analysis is hidden", False)
    assert (talk.command("/analysis"), talk.analysis) == ("analysis is shown", True)
    assert all(name in talk.command("/help") and name in talk.command("/wrong") for name in COMMANDS)


def test_only_final_answers_go_back(quantized: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A turn keeps its final answer, not its analysis; one that the context cannot hold is told and not kept."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    talk = Chat(temperature=0.0)
    _answer(model, tokenizer, talk, "What is the capital of France?")
    assert talk.turns == [("What is the capital of France?", "The capital of France is Paris.")]
    model.config.max_position_embeddings = 60
    _answer(model, tokenizer, talk, "And of Spain?")
    assert len(talk.turns) == 1
    assert "the model's context 60; /reset forgets the conversation" in capsys.readouterr().err


def test_a_model_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters in a reply are left out, line breaks and tabs stay, and channels begin on new lines."""
    speech = Speech()
    speech("analysis", "a\x1b]0;b\x07\n")
    speech("final", "\x1b[31mc\x9b\td\r\n")
    speech.end()
    shown = capsys.readouterr()
    assert shown.out == "[31mc\td\n\n"
    assert shown.err == "a]0;b\n\n"


def test_analysis_can_be_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    """Without analysis nothing of it is shown; other channels are."""
    speech = Speech(analysis=False)
    for channel in ("analysis", "commentary", "final"):
        speech(channel, channel)
    speech.end()
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("final\n", "commentary\n")
