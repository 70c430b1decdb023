#!/usr/bin/env python3
"""Time loading a checkpoint and its first token beside reading the same files, in turns, none of them cached.

    scripts/bench_load.py 20b-hybrid --rounds 3
    scripts/bench_load.py 20b --scheme nf4 --rounds 1
    scripts/bench_load.py 20b-hybrid --scheme hybrid --rounds 3 -- --device-map cpu

cat: every file read to its end, which is the disk's own speed. run: `ossquant run` up to one token, with what stands
after `--`. Loading on the CPU maps the files, so what is read is read by the first tokens.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from bench_quantize import OSSQUANT, Run, time_command


def drop(files: list[str]) -> bool:
    """Have these files read from the disk; Python and its libraries stay in memory."""
    os.sync()
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
    return True


def main() -> None:
    """Time, and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scheme")
    parser.add_argument("--rounds", type=int, default=3)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments, options = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    files = sorted(map(str, arguments.checkpoint.glob("*.safetensors")))
    scheme = ["--scheme", arguments.scheme] if arguments.scheme else []
    ask = ["run", str(arguments.checkpoint), "Hi", "--max-new-tokens", "1", "--json"]
    commands = {"cat": ["cat", *files], "run": [OSSQUANT, *ask, *scheme, *options]}
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(arguments.rounds):
        for name, command in commands.items():
            runs[name].append(time_command(command, lambda: drop(files)))
    nbytes = sum(Path(file).stat().st_size for file in files)
    print(f"{nbytes / 1e9:.2f} GB in {len(files)} files")
    print(f"{'':6}{'wall s':>10}{'beside cat':>12}{'CPU s':>8}{'peak RSS GB':>13}   all walls")
    for name, measured in runs.items():
        wall = statistics.median(run["wall"] for run in measured)
        beside = statistics.median(run["wall"] / cat["wall"] for run, cat in zip(measured, runs["cat"], strict=True))
        cpu = statistics.median(run["cpu"] for run in measured)
        peak = max(run["peak_rss"] for run in measured) / 1e9
        walls = " ".join(f"{run['wall']:.1f}" for run in measured)
        print(f"{name:6}{wall:10.1f}{beside:12.2f}{cpu:8.1f}{peak:13.2f}   {walls}")
    print(json.dumps({"bytes": nbytes, "runs": runs}))


if __name__ == "__main__":
    main()
