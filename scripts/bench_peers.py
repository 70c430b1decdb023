#!/usr/bin/env python3
"""Measure the selftest's server with `ossquant bench` and with NVIDIA's AIPerf, in turns, and hold both against it.

    scripts/bench_peers.py                   needs PyPI and 1.2 GB for AIPerf's environment; some minutes
    scripts/bench_peers.py --venv FOLDER     keeps that environment, or uses it again

Each figure is the median over requests, of the round that is the median of its rounds by TTFT's error; beside it, how
far it is from what the server did in the same requests, by the server's clock. That begins when the server's program
has read a request: what waited in a socket before, as when a client sends all at once, is part of the error. CPU s is
what the client took of the processor, its start included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

from ossquant.bench.selftest import true_metrics, truth_server
from ossquant.bench.truth import CASES, Served

AIPERF = "0.13.0"
TINY = Path(__file__).parent.parent / "tests/data/tiny"  # for AIPerf's tokenizer, which makes its prompts
TOKENS = 60
METRICS = {"ttft": "TTFT ms", "ttfa": "TTFA ms", "tpot": "TPOT ms", "e2e": "E2E ms",
           "output_tokens_per_second": "out tokens/s"}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One client's figures, what was true while it measured, and the seconds of CPU and of the clock that it took."""

    client: str
    case: str
    streams: int
    figures: dict[str, float]
    true: dict[str, float]
    cpu: float
    wall: float

    def error(self, metric: str) -> float:
        """How far a figure is off, as a share of the truth."""
        return self.figures[metric] / self.true[metric] - 1


def ossquant(url: str, case: str, streams: int, requests: int, folder: Path) -> dict[str, float]:
    """Measure with ossquant bench."""
    command = [str(Path(sys.executable).parent / "ossquant"), "bench", url, "--model", case, "--json",
               "--concurrency", str(streams), "--requests", str(requests), "--new-tokens", str(TOKENS)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    (scenario,) = json.loads(done.stdout)["scenarios"]
    return {name: scenario["metrics"][name]["value"] for name in METRICS}


def aiperf(venv: Path) -> Callable[[str, str, int, int, Path], dict[str, float]]:
    """Measure with AIPerf, told to count as the server does, chunk by chunk where the server says so."""

    def measure(url: str, case: str, streams: int, requests: int, folder: Path) -> dict[str, float]:
        command = [str(venv / "bin/aiperf"), "profile", "-m", case, "--url", url, "--endpoint-type", "chat",
                   "--streaming", "--concurrency", str(streams), "--request-count", str(requests),
                   "--warmup-request-count", str(streams), "--use-server-token-count", "--use-legacy-max-tokens",
                   *(["--per-chunk-usage"] if CASES[case].continuous else []),
                   "--osl", str(TOKENS), "--isl", "100", "--tokenizer", str(TINY),
                   "--artifact-dir", str(folder / "aiperf"), "--ui", "none"]  # fmt: skip
        subprocess.run(command, capture_output=True, text=True, check=True, env=_local(folder))
        told = json.loads((folder / "aiperf/profile_export_aiperf.json").read_text())
        return {
            "ttft": told["time_to_first_token"]["p50"] / 1000,
            "ttfa": told["time_to_first_output_token"]["p50"] / 1000,
            "tpot": told["inter_token_latency"]["p50"] / 1000,
            "e2e": told["request_latency"]["p50"] / 1000,
            "output_tokens_per_second": told["output_token_throughput"]["avg"],
        }

    return measure


def _local(folder: Path) -> dict[str, str]:
    return os.environ | {"HOME": str(folder), "HF_HOME": str(folder)}


def take_turn(name: str, measure: Any, url: str, case: str, streams: int, requests: int) -> Turn:
    """Run one client, and ask the server what it did in the counted requests, which are the last."""
    before, began = os.times(), time.perf_counter()
    with TemporaryDirectory() as folder:
        figures = measure(url, case, streams, requests, Path(folder))
    after, wall = os.times(), time.perf_counter() - began
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    with urlopen(f"{url}/truth", timeout=30) as page:  # noqa: S310  our own server
        served = [Served(**row) for row in json.load(page)][-requests:]
    return Turn(name, case, streams, figures, true_metrics(served), cpu, wall)


def install(venv: Path) -> None:
    """Install AIPerf into an environment of its own, unless it is there."""
    if not (venv / "bin/aiperf").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(venv / "bin/pip"), "install", "--quiet", f"aiperf=={AIPERF}"], check=True)


def print_turns(turns: Sequence[Turn]) -> None:
    """Print a table a case, a row a client and number of streams: each figure, and how far it is off."""
    for case in dict.fromkeys(turn.case for turn in turns):
        print(f"{case}: median, off by")
        print(f"{'streams':>7} {'':8}" + "".join(f"{name:>15}" for name in METRICS.values()) + f"{'CPU s':>7}")
        for turn in (turn for turn in turns if turn.case == case):
            cells = [f"{turn.figures[name] * _scale(name):.1f} {turn.error(name):+5.1%}" for name in METRICS]
            row = "".join(f"{cell:>15}" for cell in cells)
            print(f"{turn.streams:7} {turn.client:8}{row}{turn.cpu:7.1f}")


def _scale(name: str) -> int:
    return 1 if name == "output_tokens_per_second" else 1000


def main() -> None:
    """Take turns, print the median round of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, help="where AIPerf's environment is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["reasoning_content", "four-tokens-a-chunk"])
    asked = parser.parse_args()
    with TemporaryDirectory() as folder, truth_server() as url:
        venv = asked.venv or Path(folder) / "aiperf"
        install(venv)
        clients = {"ossquant": ossquant, "aiperf": aiperf(venv)}
        turns = []
        for case in asked.cases:
            for streams in asked.streams:
                rounds = [
                    take_turn(name, measure, url, case, streams, max(4, 2 * streams))
                    for _ in range(asked.rounds)
                    for name, measure in clients.items()
                ]
                for name in clients:
                    own = sorted((turn for turn in rounds if turn.client == name), key=lambda turn: turn.error("ttft"))
                    turns.append(own[len(own) // 2])
        print_turns(turns)
        spent = {name: statistics.median(turn.cpu for turn in turns if turn.client == name) for name in clients}
        print("CPU s, median: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items()))


if __name__ == "__main__":
    main()
