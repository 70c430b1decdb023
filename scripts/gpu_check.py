#!/usr/bin/env python3
"""Check ossquant on this machine's CUDA GPU, and write what came out as one JSON.

    scripts/gpu_check                                     9 minutes: tiny, placement, decode, 20b, then 120b
    scripts/gpu_check --parts tiny,placement,decode       the small trained model, every mode
    scripts/gpu_check --parts 20b --scratch /mnt/fast     16 GB of disk
    scripts/gpu_check --parts 120b --minutes 30           67 GB of disk
    scripts/gpu_check --device cpu --output dry.json      no GPU: tests the script alone, on tiny models

tiny: logits, decoding and greedy tokens of every mode, dtype and source against transformers' fp32 modules and the
CPU. placement: experts on the host, streamed or in the files, and several GPUs, against one device. decode: Triton's
kernels and CUDA graphs against computing the plain way. 20b and 120b:
random models of the published shapes; memory against fit's prediction, loading beside `cat`, rates, offload.
Each check runs under a limit of its own in a process that may die; the next ones run all the same. When the minutes
are over, what is left is "not run". A checkpoint that was not finished goes on at the next call with --scratch.

Exits 0 if nothing failed and all was run, 1 if not, 2 where there is no CUDA GPU. A GPU machine without a network:
scripts/gpu_wheels.py --help.
"""

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NoReturn

from gpu_check_case import HOST, ROOT, TRAINED

PARTS = ("tiny", "placement", "decode", "20b", "120b")
RESULTS = ROOT / "tests/gpu/results"
STATUSES = ("passed", "failed", "skipped", "not run")
STARTING = 90.0  # seconds to import torch and the rest, on a cold disk
NO_GPU = "gpu_check: no CUDA GPU that torch can use is on this machine, so nothing was checked"


@dataclass(frozen=True)
class Limits:
    """When everything must be over, by time.monotonic, and the minutes that were given."""

    deadline: float
    minutes: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def over(self) -> str:
        """Why something was not run."""
        return f"the {self.minutes:g} minutes were over"


class Worker:
    """A process that runs checks one after the other; what it says on stderr is kept."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._errors = TemporaryFile("w+")  # noqa: SIM115, closed in close
        command = [sys.executable, str(ROOT / "scripts/gpu_check_worker.py"), *arguments]
        path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path}
        if HOST in arguments:  # threads that wait for each other on a busy CPU make tiny models 10 times slower
            environment |= {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def next(self, timeout: float) -> dict[str, Any] | None:
        """The next line it says; None when it has ended. Raises queue.Empty after so many seconds."""
        line = self._lines.get(timeout=max(timeout, 0.01))
        return json.loads(line) if line is not None else None

    def close(self) -> str:
        """End it; gives the error that it ended with, or the last that it said on stderr."""
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()
        self._errors.close()
        _, traceback, last = said.rpartition("Traceback (most recent call last):\n")
        lines = [line.strip() for line in last.splitlines() if line.strip() and not (traceback and line[0] == " ")]
        if not lines:
            return f"it ended with {code}"
        return lines[0] if traceback else lines[-1]


def run_checks(cases: Iterable[dict[str, Any]], options: Sequence[str], limits: Limits) -> Iterator[dict[str, Any]]:
    """Run the checks, a process for those that belong together; one that dies is started again for what is left."""
    for _, members in groupby(cases, key=lambda case: case["worker"]):
        waiting = list(members)
        while waiting and limits.left > 0:
            worker = Worker([*options, *(case["name"] for case in waiting)])
            yield from _until_it_ends(worker, waiting, limits)
        for case in waiting:
            yield {"name": case["name"], "status": "not run", "seconds": 0.0, "reason": limits.over}


def _until_it_ends(worker: Worker, waiting: list[dict[str, Any]], limits: Limits) -> Iterator[dict[str, Any]]:
    """Take the results of waiting checks, removing them, until the process ends or a check ends it."""
    starting = STARTING
    while waiting:
        case, begun = waiting[0], time.monotonic()
        limit = starting + case["limit"]
        try:
            result = worker.next(min(limit, limits.left))
        except queue.Empty:
            worker.close()
            late = limits.left > 0
            reason = f"not finished in {limit:.0f} s" if late else limits.over
            yield _ended(waiting.pop(0), "failed" if late else "not run", begun, reason)
            return
        if result is None:
            yield _ended(waiting.pop(0), "failed", begun, worker.close())
            return
        starting = 0.0
        waiting.pop(0)
        yield result
    worker.close()


def _ended(case: dict[str, Any], status: str, begun: float, reason: str) -> dict[str, Any]:
    return {"name": case["name"], "status": status, "seconds": time.monotonic() - begun, "reason": reason}


def look() -> dict[str, Any]:
    """What the machine has and which checks there are. Exits with a sentence where that cannot be said."""
    worker = Worker([])
    try:
        found = worker.next(2 * STARTING)
    except queue.Empty:
        found = None
    said = worker.close()
    if found is None:
        _stop(f"gpu_check: nothing could be checked: {said}; see scripts/gpu_wheels.py --help")
    return found


def _stop(sentence: str) -> NoReturn:
    print(sentence, file=sys.stderr)
    sys.exit(2)


def _commit(given: str | None) -> str | None:
    """The commit of this checkout, "+" after it if files differ; as given where there is no git."""
    if given:
        return given
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def write_report(path: Path, head: dict[str, Any], checks: list[dict[str, Any]], seconds: float) -> None:
    """Write the JSON anew, so that a run that is killed leaves what it had."""
    counts = {status: sum(check["status"] == status for check in checks) for status in STATUSES}
    text = json.dumps(head | {"seconds": seconds, "summary": counts, "checks": checks}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


def _default_output(cuda: list[dict[str, Any]], arguments: argparse.Namespace, date: datetime) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", cuda[0]["name"].lower()).strip("-")
    count = f"{len(cuda)}x-" if len(cuda) > 1 else ""
    some = "" if tuple(arguments.parts) == PARTS else "-" + "-".join(arguments.parts)
    only = "-some" if arguments.only else ""
    return RESULTS / f"{count}{device}-{date:%Y-%m-%d}{some}{only}.json"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--only", metavar="PATTERN", help="of these parts, such as 'tiny/nf4/*'")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop (default 9)")
    parser.add_argument("--output", type=Path, help="the JSON (default tests/gpu/results/<device>-<date>.json)")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints, kept; else a temporary one")
    parser.add_argument("--device", choices=("cuda", HOST), default="cuda", help="cpu: a dry run on tiny models")
    parser.add_argument("--tiny", type=Path, default=TRAINED, help="another copy of tests/data/tiny to check")
    parser.add_argument("--commit", help="ossquant's commit, where the checkout has no git")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"there is no part '{unknown[0]}': {', '.join(PARTS)}")
    if arguments.device == HOST:
        if arguments.output is None:
            parser.error("a dry run needs --output")
        if arguments.output.resolve().is_relative_to(RESULTS):
            parser.error("a dry run is no result of a GPU: give an --output elsewhere")
    return arguments


def main() -> None:
    """Check, print a line for each check, and write the report."""
    arguments, date = _arguments(), datetime.now(UTC)
    started = time.monotonic()
    limits = Limits(started + 60 * arguments.minutes, arguments.minutes)
    found = look()
    if arguments.device == "cuda" and not found["cuda"]:
        _stop(NO_GPU)
    head = {
        "made_by": "scripts/gpu_check",
        "device": arguments.device,
        "dry_run": arguments.device == HOST,
        "date": date.isoformat(timespec="seconds"),
        "commit": _commit(arguments.commit),
        "parts": arguments.parts,
        "only": arguments.only,
        "minutes": arguments.minutes,
        "gpus": found["cuda"],
        "host": found["host"],
        "versions": found["versions"],
    }
    output = arguments.output or _default_output(found["cuda"], arguments, date)
    pattern = arguments.only or "*"
    cases = [case for case in found["cases"] if case["part"] in arguments.parts and fnmatch(case["name"], pattern)]
    if not cases:
        _stop(f"gpu_check: no check of {', '.join(arguments.parts)} is named '{pattern}'")
    checks: list[dict[str, Any]] = []
    with ExitStack() as stack:
        scratch = arguments.scratch or Path(stack.enter_context(TemporaryDirectory(prefix="gpu_check-")))
        scratch.mkdir(parents=True, exist_ok=True)
        options = ["--device", arguments.device, "--tiny", str(arguments.tiny), "--scratch", str(scratch)]
        for check in run_checks(cases, options, limits):
            checks.append(check)
            print(f"{check['status']:8} {check['name']:38} {check['seconds']:6.1f} s  {check.get('reason', '')}",
                  flush=True)  # fmt: skip
            write_report(output, head, checks, time.monotonic() - started)
    counts = ", ".join(f"{sum(check['status'] == status for check in checks)} {status}" for status in STATUSES)
    print(f"{counts}: {output}")
    sys.exit(any(check["status"] in ("failed", "not run") for check in checks))


if __name__ == "__main__":
    main()
