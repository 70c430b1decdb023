#!/usr/bin/env python3
"""Time `ossquant quantize` beside `cp` of the same files, in turns, and its codec beside bitsandbytes.

    scripts/make_checkpoint.py 20b 20b
    scripts/make_checkpoint.py 20b-bf16 20b --layers 4 --form bf16
    scripts/bench_quantize.py 20b --bf16 20b-bf16 --rounds 3

The second checkpoint, a slice in bf16, is what the way back to MXFP4 is timed on.
Before each command the page cache is dropped, where the system lets us, so that all read from the disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.codec.recode import Mxfp4Matrix, recode
from ossquant.layout import Role
from ossquant.quantize import read_matrix
from ossquant.scheme import Scheme

OSSQUANT = str(Path(sys.executable).parent / "ossquant")
SCHEMES = ("hybrid", "nf4", "int4")


def time_command(command: list[str]) -> dict[str, float]:
    """Run a command: wall and CPU seconds, peak resident bytes."""
    dropped = drop_page_cache()
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": wall, "cpu": cpu, "peak_rss": usage.ru_maxrss * 1024, "cold": float(dropped)}


def drop_page_cache() -> bool:
    """Have the next command read from the disk; only root may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def time_codec(checkpoint: Checkpoint) -> dict[str, float]:
    """Million weights a second of one expert to NF4: our table on one thread, bitsandbytes as it comes."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    entry = next(entry for entry in checkpoint.plan.tensors if entry.tensor.role is Role.EXPERTS)
    matrix = read_matrix(checkpoint, entry, 0)
    assert isinstance(matrix, Mxfp4Matrix)
    rows = recode(matrix, Scheme("bf16"), "w")["w"]
    weight = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    numel = weight.numel()
    candidates: dict[str, Any] = {
        "ossquant MXFP4 to NF4": lambda: recode(matrix, Scheme("nf4"), "w"),
        "ossquant bf16 to NF4": lambda: recode(rows, Scheme("nf4"), "w"),
        "ossquant bf16 to INT4": lambda: recode(rows, Scheme("int4"), "w"),
        "ossquant bf16 to MXFP4": lambda: recode(rows, Scheme("mxfp4"), "w"),
        "bitsandbytes bf16 to NF4": lambda: quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
    }
    for run in candidates.values():
        run()  # compile
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(5):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: numel / statistics.median(taken) / 1e6 for name, taken in seconds.items()}


def time_jobs(
    source: Path, schemes: tuple[str, ...], rounds: int, suffix: str = ""
) -> dict[str, list[dict[str, float]]]:
    """Copy and quantize a checkpoint in turns; each run by what it was."""
    output = source.with_name(f"{source.name}.timed")
    commands = {"cp": ["sh", "-c", 'cp -r "$0" "$1" && sync', str(source), str(output)]} | {
        scheme: [OSSQUANT, "quantize", str(source), str(output), "--scheme", scheme] for scheme in schemes
    }
    runs: dict[str, list[dict[str, float]]] = {name + suffix: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            runs[name + suffix].append(time_command(command))
            shutil.rmtree(output)
    return runs


def main() -> None:
    """Time, and print a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bf16", type=Path, help="a checkpoint in bf16, for the way back to MXFP4")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source: Path = arguments.checkpoint
    runs = time_jobs(source, SCHEMES, arguments.rounds)
    if arguments.bf16:
        runs |= time_jobs(arguments.bf16, ("mxfp4",), arguments.rounds, suffix=" of the bf16 slice")
    with open_checkpoint(source) as checkpoint:
        codec = time_codec(checkpoint)
    print(f"{'':24}{'wall s':>10}{'beside cp':>12}{'CPU s':>8}{'peak RSS MB':>13}   all walls")
    for name, measured in runs.items():
        beside = runs["cp of the bf16 slice" if name.endswith("slice") else "cp"]
        wall = statistics.median(run["wall"] for run in measured)
        ratio = statistics.median(run["wall"] / base["wall"] for run, base in zip(measured, beside, strict=True))
        cpu = statistics.median(run["cpu"] for run in measured)
        peak = max(run["peak_rss"] for run in measured) / 1e6
        walls = " ".join(f"{run['wall']:.1f}" for run in measured)
        print(f"{name:24}{wall:10.1f}{ratio:12.2f}{cpu:8.1f}{peak:13.0f}   {walls}")
    for name, rate in codec.items():
        print(f"{name}: {rate:.0f} M weights/s")
    print(json.dumps({"runs": runs, "codec_mweights_per_second": codec, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
