"""A and B in turns: run two commands A B, B A, …, until it is decided or the budget ends."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import IO

from ossquant.bench.compare import compare
from ossquant.bench.comparison import Comparison
from ossquant.bench.documents import measured_from_json
from ossquant.bench.gate import Gate
from ossquant.bench.paired import looks, spend
from ossquant.bench.result import Result
from ossquant.bench.runs import Runs, require_valid
from ossquant.bench.strict import MAX_BYTES
from ossquant.errors import CommandError, UsageError

LONGEST = 3600.0  # seconds that one command may take
GRACE = 10.0  # seconds that an interrupted command has to end
INVALID_RUN = 5  # the exit code of `ossquant bench` for a run that it prints, and says is no result
SIDES = ("base", "head")

# side, pair from 0, and what the command printed
OnRun = Callable[[str, int, Result], None]


@dataclass(frozen=True)
class Budget:
    """pairs up to the first look, max_pairs in all, seconds after which no further pair begins; None is no limit."""

    pairs: int = 5
    max_pairs: int = 12
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.pairs <= self.max_pairs <= 1000:
            raise UsageError(f"{self.pairs} to {self.max_pairs} pairs are no plan", hint="2 <= --pairs <= --max-pairs")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise UsageError("a budget is seconds above 0")


def compare_commands(base: str, head: str, gate: Gate, budget: Budget, on_run: OnRun) -> Comparison:
    """Run both commands in turns and judge at each look.

    Raises CommandError for a command that prints no result, InvalidRunError for a result that is none.
    """
    commands = {"base": base, "head": head}
    return compare_in_turns(lambda side: run_command(commands[side], side), commands, gate, budget, on_run)


def compare_in_turns(
    measure: Callable[[str], Result], sources: Mapping[str, str], gate: Gate, budget: Budget, on_run: OnRun
) -> Comparison:
    """Measure "base" and "head" in turns until a look decides, or the budget ends. Raises InvalidRunError."""
    results: dict[str, list[Result]] = {side: [] for side in SIDES}
    planned = looks(budget.pairs, budget.max_pairs)
    clock = _Clock(budget.seconds)
    for upto, alpha in zip(planned, spend(len(planned)), strict=True):
        while len(results["head"]) < upto and clock.allows_another():
            _measure_pair(measure, results, on_run)
            clock.tick()
        base, head = (Runs(side, sources[side], tuple(results[side])) for side in SIDES)
        comparison = compare(base, head, gate, in_turns=True, alpha=alpha, looks=planned)
        if comparison.verdict != "inconclusive":
            return comparison
        if not clock.allows_another():
            note = f"the budget of {budget.seconds:g} s ended after {comparison.pairs} pairs of {budget.max_pairs}"
            return replace(comparison, notes=(note, *comparison.notes))
    return comparison


class _Clock:
    """Whether the longest pair so far would still end within the budget; the first pair always may."""

    def __init__(self, seconds: float | None) -> None:
        self._started = self._last = time.monotonic()
        self._seconds, self._longest = seconds, 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self._longest, self._last = max(self._longest, now - self._last), now

    def allows_another(self) -> bool:
        if self._seconds is None or not self._longest:
            return True
        return time.monotonic() - self._started + self._longest <= self._seconds


def _measure_pair(measure: Callable[[str], Result], results: dict[str, list[Result]], on_run: OnRun) -> None:
    pair = len(results["head"])
    for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
        result = measure(side)
        on_run(side, pair, result)
        require_valid(result, f"{side}, run {pair + 1}")
        results[side].append(result)


def run_command(command: str, name: str) -> Result:
    """Run a command, without a shell, and read the result that it prints last. Its stderr is ours. Raises CommandError.

    Whatever it started ends with it.
    """
    try:
        arguments = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"{name}: '{command}' is no command: {error}") from error
    if not arguments:
        raise UsageError(f"{name}: the command is empty")
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True)
        except OSError as error:
            raise CommandError(f"{name}: '{arguments[0]}' cannot be run: {error.strerror}") from error
        code = _wait(process, name)
        return _read(output, code, name)


def _wait(process: "subprocess.Popen[bytes]", name: str) -> int:
    try:
        return process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        raise CommandError(f"{name}: the command took longer than {LONGEST:g} s") from None
    except KeyboardInterrupt:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of its group have ended
        os.killpg(process.pid, number)


def _read(output: IO[bytes], code: int, name: str) -> Result:
    """The object that stands last in what a command printed; an invalid run is printed, too."""
    if code not in (0, INVALID_RUN):
        ended = f"died of signal {-code}" if code < 0 else f"ended with {code}"
        raise CommandError(f"{name}: the command {ended}", hint="its own words are above")
    if output.seek(0, os.SEEK_END) > MAX_BYTES:
        raise CommandError(f"{name}: the command printed more than a result can be")
    output.seek(0)
    printed = output.read().decode("utf-8", "replace")
    begins = printed.rfind("\n{") + 1  # ours is indented, so only its first brace begins a line
    try:
        raw = json.loads(printed[begins:])
    except (ValueError, RecursionError):
        raise CommandError(
            f"{name}: the command printed no result (exit code {code})", hint="let it end with ossquant bench … --json"
        ) from None
    return measured_from_json(raw, f"what {name} printed")
