#!/usr/bin/env python3
"""Kill `ossquant quantize` at random moments, run it again, and compare what it made, byte for byte.

    scripts/kill_quantize.py
    scripts/kill_quantize.py --times 100 --layers 4 --seed 1

Each round starts the job, sends SIGKILL at a moment drawn evenly from an undisturbed run's duration, and runs the
same command to its end. A file that was finished when the kill came must be kept as it was, and not written again.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from make_checkpoint import make_checkpoint
from ossquant.checkpoint.reader import JOB, open_checkpoint
from ossquant.errors import OssquantError
from ossquant.spec import ModelSpec, alternating_layer_types

OSSQUANT = str(Path(sys.executable).parent / "ossquant")
VOCAB = 4096  # the published 201,088 rows are 1.2 GB, and are only copied


@dataclass(frozen=True)
class Round:
    """One kill: when, how many files were finished then, and what the second run made of it."""

    moment: float
    finished: int
    kept: int
    different: list[str]
    looked_whole: bool

    @property
    def good(self) -> bool:
        """Whether nothing was lost, redone or wrongly taken for a checkpoint."""
        return not self.different and self.kept == self.finished and not self.looked_whole


def small_20b(layers: int) -> ModelSpec:
    """Some layers of the 20b's shape, with a small vocabulary."""
    spec = ModelSpec.published("20b")
    return replace(spec, num_hidden_layers=layers, vocab_size=VOCAB, layer_types=alternating_layer_types(layers))


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def finished_files(output: Path) -> dict[str, tuple[int, int]]:
    """The files that the journal calls done, each with its inode and time of change."""
    job = output / JOB
    names = json.loads(job.read_bytes())["done"] if job.exists() else {}
    found = {}
    for name in names:
        partial = output / f"{name}.partial"  # until all are done
        found[name] = _state(partial if partial.exists() else output / name)
    return found


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def is_checkpoint(folder: Path) -> bool:
    """Whether a reader takes the folder for a checkpoint."""
    try:
        with open_checkpoint(folder) as checkpoint:
            return bool(checkpoint.plan)
    except OssquantError:
        return False


def kill_and_resume(command: list[str], output: Path, expected: dict[str, str], moment: float) -> Round | None:
    """Kill a run after moment seconds and run it again; None if all was done before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    looked_whole = is_checkpoint(output)
    if looked_whole and hashes(output) == expected:
        return None  # it was about to exit
    before = finished_files(output)
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    if again.returncode:
        raise SystemExit(f"killed at {moment:.2f} s, the second run failed:\n{again.stderr}")
    kept = sum(_state(output / name) == state for name, state in before.items())
    found = hashes(output)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return Round(moment, len(before), kept, different, looked_whole)


def kill_often(folder: Path, arguments: argparse.Namespace) -> list[Round]:
    """Make a checkpoint and an undisturbed result in folder, then kill as often as asked for."""
    source, output = folder / "source", folder / "output"
    plan = make_checkpoint(source, small_20b(arguments.layers))
    command = [OSSQUANT, "quantize", str(source), str(output), "--scheme", arguments.scheme,
               "--max-shard-size", arguments.max_shard_size]  # fmt: skip
    subprocess.run([*command, "--dry-run"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    duration = time.monotonic() - started
    expected = hashes(output)
    files = sum(name.endswith(".safetensors") for name in expected)
    print(
        f"{plan.nbytes / 1e6:.0f} MB to {arguments.scheme} in {files} files; undisturbed: {duration:.1f} s", flush=True
    )
    rng, rounds = random.Random(arguments.seed), []  # noqa: S311  not a secret
    while len(rounds) < arguments.times:
        rmtree(output, ignore_errors=True)
        done = kill_and_resume(command, output, expected, rng.uniform(0, duration))
        if done is None:
            continue
        rounds.append(done)
        print(
            f"{len(rounds):3}  killed at {done.moment:5.2f} s  {done.finished:3} of {files} files finished, "
            f"{done.kept:3} kept  {'DIFFERENT: ' + ' '.join(done.different) if done.different else 'identical'}"
            f"{'  TAKEN FOR A CHECKPOINT' if done.looked_whole else ''}",
            flush=True,
        )
    return rounds


def main() -> None:
    """Kill, resume, compare; exit 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--layers", type=int, default=2, help="0.42 GB each")
    parser.add_argument("--scheme", default="nf4")
    parser.add_argument("--max-shard-size", default="20MB")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="a disk to work on; the system's temporary folder if not given")
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder) as folder:
        rounds = kill_often(Path(folder), arguments)
    print(
        f"{len(rounds)} resumed, {sum(not done.different for done in rounds)} bit-identical, "
        f"{sum(not done.finished for done in rounds)} began with nothing finished, "
        f"{sum(done.finished - done.kept for done in rounds)} finished files written again"
    )
    sys.exit(not all(done.good for done in rounds))


if __name__ == "__main__":
    main()
