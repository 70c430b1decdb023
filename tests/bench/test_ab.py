import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from made_results import result, scenario
from ossquant.bench import ab
from ossquant.bench.ab import Budget, compare_commands, run_command
from ossquant.bench.gate import DEFAULT
from ossquant.bench.result import Result
from ossquant.errors import CommandError, InvalidRunError, UsageError

# what a bench command is to us: a log line, then a result on stdout; its throughput is given, and the calls counted
SCRIPT = """
import json, pathlib, sys
calls, values = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
side = sys.argv[3]
done = calls.read_text() if calls.exists() else ""
calls.write_text(done + side)
raw = json.loads(pathlib.Path(sys.argv[4]).read_text())
raw["scenarios"][0]["metrics"]["output_tokens_per_second"]["value"] = float(values[done.count(side) % len(values)])
print("a log line { of the command")
print(json.dumps(raw, indent=2))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script and a result to print."""
    (tmp_path / "bench.py").write_text(SCRIPT)
    (tmp_path / "result.json").write_text(json.dumps(result(scenario(output_tokens_per_second=1.0)).to_json()))
    return tmp_path


def command(folder: Path, side: str, values: str) -> str:
    return f"{sys.executable} {folder}/bench.py {folder}/calls {values} {side} {folder}/result.json"


def quiet(side: str, pair: int, made: Result) -> None:
    pass


def test_in_turns_until_decided(folder: Path) -> None:
    """The commands run A B, B A, …; a clear regression ends after the first look, and every run is reported."""
    seen: list[tuple[str, int]] = []
    comparison = compare_commands(
        command(folder, "A", "100,101,99"), command(folder, "B", "80,81,79.5"), DEFAULT, Budget(4, 9),
        lambda side, pair, made: seen.append((side, pair)),
    )  # fmt: skip
    assert comparison.verdict == "regressed"
    assert (folder / "calls").read_text() == "ABBAABBA"
    assert seen[:4] == [("base", 0), ("head", 0), ("head", 1), ("base", 1)]
    assert (comparison.pairs, comparison.looks, comparison.alpha) == (4, (4, 6, 9), 0.025)
    assert comparison.base.source == command(folder, "A", "100,101,99")
    assert comparison.changes[0].base == (100.0, 101.0, 99.0, 100.0)


def test_more_pairs_until_the_last_look(folder: Path) -> None:
    """What stays unclear takes all the pairs it may, and is inconclusive."""
    base, head = command(folder, "A", "100,108,95,103"), command(folder, "B", "104,97,101,92")
    comparison = compare_commands(base, head, DEFAULT, Budget(2, 4), quiet)
    assert comparison.verdict == "inconclusive"
    assert comparison.pairs == 4
    assert (folder / "calls").read_text() == "ABBAABBA"


def test_a_budget_ends_it(folder: Path) -> None:
    """No pair begins that would not end within the budget; it says how far it came."""
    base, head = command(folder, "A", "100,108,95,103"), command(folder, "B", "104,97,101,92")
    comparison = compare_commands(base, head, DEFAULT, Budget(2, 500, seconds=0.6), quiet)
    assert comparison.verdict == "inconclusive"
    assert comparison.pairs < 15
    assert comparison.notes[0] == f"the budget of 0.6 s ended after {comparison.pairs} pairs of 500"


@pytest.mark.parametrize("plan", [(1, 5, None), (5, 4, None), (5, 10**6, None), (5, 5, 0.0), (5, 5, float("nan"))])
def test_impossible_budgets(plan: tuple[int, int, float | None]) -> None:
    """A plan without two pairs, without an end, or without time is refused."""
    with pytest.raises(UsageError):
        Budget(*plan)


def test_the_result_is_what_stands_last(folder: Path) -> None:
    """Lines before the result are not read."""
    assert run_command(command(folder, "A", "7"), "base").scenarios[0].metrics["output_tokens_per_second"].value == 7


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ossquant-that-is-not-there --json", "base: 'ossquant-that-is-not-there' cannot be run: No such file"),
        ("false", "base: the command ended with 1"),
        ("bash -c 'kill -9 $$'", "base: the command died of signal 9"),
        ("echo hello", r"base: the command printed no result .exit code 0"),
        ("true", "base: the command printed no result"),
        ("echo '{\"a\": '", "base: the command printed no result"),
    ],
)
def test_a_command_that_fails(line: str, words: str) -> None:
    """One that cannot be run, fails, dies or prints no result is named by its side."""
    with pytest.raises(CommandError, match=words):
        run_command(line, "base")


@pytest.mark.parametrize("line", ["", "echo 'unclosed"])
def test_no_command(line: str) -> None:
    """What is no command line is a usage error."""
    with pytest.raises(UsageError):
        run_command(line, "base")


def test_other_json() -> None:
    """An object that is no result, or one of another version, is a usage error that says whose it is."""
    with pytest.raises(UsageError, match="what head printed is no result of ossquant bench"):
        run_command("echo '{}'", "head")
    with pytest.raises(UsageError, match="what head printed has schema version 2"):
        run_command("""echo '{"kind": "bench", "schema_version": 2}'""", "head")


def test_an_invalid_run_stops_it(folder: Path) -> None:
    """A result that calls itself invalid ends it, with the side and the run."""
    raw = result(scenario(invalid="the prefix cache was warm", output_tokens_per_second=1.0)).to_json()
    (folder / "result.json").write_text(json.dumps(raw))
    with pytest.raises(InvalidRunError, match="base, run 1: 'single' is no valid run: the prefix cache was warm"):
        compare_commands(command(folder, "A", "1"), command(folder, "B", "1"), DEFAULT, Budget(), quiet)
    assert (folder / "calls").read_text() == "A"


def test_an_exit_of_5_may_carry_a_result(folder: Path) -> None:
    """`ossquant bench` prints an invalid run and exits with 5: its reason is said, not the code."""
    raw = json.dumps(result(scenario(invalid="requests failed")).to_json())
    (folder / "invalid.json").write_text(raw)
    made = run_command(f"bash -c 'cat {folder}/invalid.json; exit 5'", "head")
    assert made.scenarios[0].invalid == ("requests failed",)


def test_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that does not end is ended, with what it started."""
    monkeypatch.setattr(ab, "LONGEST", 0.5)
    started = time.monotonic()
    with pytest.raises(CommandError, match=r"base: the command took longer than 0\.5 s"):
        run_command("bash -c 'sleep 600 & sleep 600'", "base")
    assert time.monotonic() - started < 5


def test_what_a_command_leaves_behind_is_ended(folder: Path) -> None:
    """A server that a command started and forgot is gone when the next command runs."""
    line = f"bash -c 'sleep 600 & echo $! > {folder}/pid; cat {folder}/result.json'"
    run_command(line, "base")
    left = int((folder / "pid").read_text())
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(left)], capture_output=True, text=True, check=False)
        if not state.stdout.strip() or state.stdout.startswith("Z"):
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


def test_ctrl_c_reaches_the_command(folder: Path) -> None:
    """Ctrl-C interrupts the command, which may end cleanly, and then us."""
    line = f"bash -c 'trap \"echo > {folder}/cleaned; exit 1\" INT; while true; do sleep 0.05; done'"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_command(line, "base")
    assert (folder / "cleaned").exists()
