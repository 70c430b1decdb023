#!/usr/bin/env python3
"""Kill `ossquant quantize` at random moments, run it again, and compare what it made, byte for byte.

    scripts/kill_quantize.py
    scripts/kill_quantize.py --times 100 --layers 4 --seed 1
    scripts/kill_quantize.py --scheme fp4 --scheme bf16

Each round starts the job, sends SIGKILL at a moment drawn evenly from an undisturbed run's duration, and runs the
same command to its end. A file that was finished when the kill came must be kept as it was, and not written again.
The schemes take turns; mxfp4 is made of a bf16 checkpoint in several shards, the others of a published one.
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
SCHEMES = ["nf4", "hybrid", "int4", "mxfp4"]
SOURCE_SHARD = 400 * 10**6


@dataclass(frozen=True)
class Job:
    """A command, its output, and what it makes of that when nobody kills it: hashes, and seconds."""

    scheme: str
    command: list[str]
    output: Path
    expected: dict[str, str]
    duration: float

    @property
    def files(self) -> int:
        """How many files of weights it makes."""
        return sum(name.endswith(".safetensors") for name in self.expected)


@dataclass(frozen=True)
class Round:
    """One kill: of which scheme and when, how many files were finished then, and what the second run made of it."""

    scheme: str
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


def kill_and_resume(job: Job, moment: float) -> Round | None:
    """Kill a run after moment seconds and run it again; None if all was done before."""
    output, expected = job.output, job.expected
    process = subprocess.Popen(job.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    again = subprocess.run(job.command, check=False, capture_output=True, text=True)
    if again.returncode:
        raise SystemExit(f"{job.scheme}, killed at {moment:.2f} s: the second run failed:\n{again.stderr}")
    kept = sum(_state(output / name) == state for name, state in before.items())
    found = hashes(output)
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return Round(job.scheme, moment, len(before), kept, different, looked_whole)


def undisturbed(folder: Path, scheme: str, arguments: argparse.Namespace) -> Job:
    """Make a scheme's source, if it is not there, and its result."""
    form = "bf16" if scheme == "mxfp4" else "mxfp4"
    source, output = folder / f"source-{form}", folder / "output"
    if not source.exists():
        nbytes = make_checkpoint(source, small_20b(arguments.layers), form, max_shard_size=SOURCE_SHARD).nbytes
        print(f"source in {form}: {nbytes / 1e6:.0f} MB in {len(list(source.glob('*.safetensors')))} files", flush=True)
    command = [OSSQUANT, "quantize", str(source), str(output), "--scheme", scheme,
               "--max-shard-size", arguments.max_shard_size]  # fmt: skip
    subprocess.run([*command, "--dry-run"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job = Job(scheme, command, output, hashes(output), time.monotonic() - started)
    rmtree(output)
    print(f"{scheme}: {job.files} files; undisturbed: {job.duration:.1f} s", flush=True)
    return job


def kill_often(folder: Path, arguments: argparse.Namespace) -> list[Round]:
    """Make sources and undisturbed results in folder, then kill the schemes in turns as often as asked for."""
    jobs = [undisturbed(folder, scheme, arguments) for scheme in arguments.scheme]
    rng, rounds = random.Random(arguments.seed), []  # noqa: S311  not a secret
    while len(rounds) < arguments.times:
        job = jobs[len(rounds) % len(jobs)]
        rmtree(job.output, ignore_errors=True)
        done = kill_and_resume(job, rng.uniform(0, job.duration))
        if done is None:
            continue
        rounds.append(done)
        print(
            f"{len(rounds):3} {done.scheme:6} killed at {done.moment:5.2f} s  {done.finished:3} of {job.files} files "
            f"finished, {done.kept:3} kept  "
            f"{'DIFFERENT: ' + ' '.join(done.different) if done.different else 'identical'}"
            f"{'  TAKEN FOR A CHECKPOINT' if done.looked_whole else ''}",
            flush=True,
        )
    return rounds


def summary(rounds: list[Round]) -> str:
    """Say what came of some rounds; one that had finished files and kept none began from zero again."""
    finished, kept = sum(done.finished for done in rounds), sum(done.kept for done in rounds)
    from_zero = sum(done.finished > 0 and not done.kept for done in rounds)
    return (
        f"{len(rounds)} resumed, {sum(not done.different for done in rounds)} bit-identical, {from_zero} redone from "
        f"zero; {finished - kept} of {finished} finished files written again; "
        f"{sum(not done.finished for done in rounds)} killed with none finished"
    )


def main() -> None:
    """Kill, resume, compare; exit 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=25)
    parser.add_argument("--layers", type=int, default=2, help="0.42 GB each")
    parser.add_argument("--scheme", action="append", help=f"may be given several times; {' '.join(SCHEMES)} if not")
    parser.add_argument("--max-shard-size", default="20MB")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="a disk to work on; the system's temporary folder if not given")
    arguments = parser.parse_args()
    arguments.scheme = arguments.scheme or SCHEMES
    with TemporaryDirectory(dir=arguments.folder) as folder:
        rounds = kill_often(Path(folder), arguments)
    for scheme in dict.fromkeys(done.scheme for done in rounds):
        print(f"{scheme:6}", summary([done for done in rounds if done.scheme == scheme]))
    print("all   ", summary(rounds))
    sys.exit(not all(done.good for done in rounds))


if __name__ == "__main__":
    main()
