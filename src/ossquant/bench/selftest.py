"""Selftest: measure a server whose times are known, and hold what was measured against what it did."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.request import urlopen

from ossquant.bench.asked import Asked
from ossquant.bench.endpoint import find_endpoint
from ossquant.bench.result import Scenario
from ossquant.bench.run import OnProgress, measure_endpoint
from ossquant.bench.shape import make_shapes
from ossquant.bench.truth import CASES, PROMPT_TOKENS, STALL, TPOT, TTFT, Served
from ossquant.errors import InvalidRunError

STREAMS = (1, 16, 128)
OUTPUT_TOKENS = 60
RELATIVE, ABSOLUTE = 0.02, 0.002  # how far a figure may be off: either, of times; the first, of rates
ROUNDS = 2  # requests of each stream
TRIES = 3  # another program may take the processor away for a moment; a meter that is wrong is wrong each time
START_SECONDS = 30


@dataclass(frozen=True)
class Check:
    """One metric: as it was measured, as the server did it, and as it was meant to be (None of a rate)."""

    case: str
    streams: int
    metric: str
    unit: str
    measured: float
    true: float
    nominal: float | None

    @property
    def right(self) -> bool:
        """Whether it was measured within 2 % or 2 ms."""
        off = abs(self.measured - self.true)
        return off <= RELATIVE * self.true or (self.unit == "s" and off <= ABSOLUTE)


def selftest(
    streams: Sequence[int] = STREAMS, *, cases: Sequence[str] = tuple(CASES), on_progress: OnProgress
) -> list[Check]:
    """Measure every case at every number of streams. Raises InvalidRunError if requests failed."""
    with truth_server() as url:
        return [check for case in cases for check in _case(url, case, streams, on_progress)]


@contextmanager
def truth_server() -> Iterator[str]:
    """Run the server in a process of its own; yields its URL."""
    command = [sys.executable, "-m", "ossquant.bench.truth"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().strip() if server.stdout else ""
            if not url:
                raise InvalidRunError("the selftest's server does not start", hint="may 127.0.0.1 be listened on?")
            yield url
        finally:
            server.terminate()


def _case(url: str, case: str, streams: Sequence[int], on_progress: OnProgress) -> Iterator[Check]:
    for number in streams:
        asked = Asked(
            make_shapes([number], [], 1),
            model=case,
            requests=max(3, ROUNDS * number),
            output_tokens=OUTPUT_TOKENS,
            tokenizer=None if CASES[case].usage else _count,
        )
        for _ in range(TRIES):
            measured = measure_endpoint(find_endpoint(url), asked, announce=lambda note: None, on_progress=on_progress)
            if measured.result.partial:
                raise KeyboardInterrupt
            (scenario,) = measured.result.scenarios
            if scenario.requests.succeeded < scenario.requests.sent:
                raise InvalidRunError(f"{case} at {number} streams: {scenario.invalid[0]}", hint="run it again")
            checks = list(_checks(case, number, scenario, _served(url, scenario.requests.sent)))
            if all(check.right for check in checks):
                break
        yield from checks


def _count(text: str) -> int:
    """The server's tokens are words."""
    return len(text.split())


def _served(url: str, number: int) -> list[Served]:
    """What the server did for the last so many requests, which the probe's are not among."""
    with urlopen(f"{url}/truth", timeout=START_SECONDS) as page:  # noqa: S310  our own server
        return [Served(**row) for row in json.load(page)][-number:]


def _checks(case: str, streams: int, scenario: Scenario, served: Sequence[Served]) -> Iterator[Check]:
    true, nominal = true_metrics(served), _nominal(case)
    for name, value in true.items():
        if name not in scenario.metrics:
            raise InvalidRunError(f"{case} at {streams} streams: {name} was not measured", hint="run it again")
        metric = scenario.metrics[name]
        yield Check(case, streams, name, metric.unit, metric.value, value, nominal.get(name))


def true_metrics(served: Sequence[Served]) -> dict[str, float]:
    """Work the metrics out from what the server knows, by none of the code that measures."""
    wall = max(each.went[-1] for each in served) - min(each.came for each in served)
    output = sum(each.tokens for each in served)
    median: Callable[[Any], float] = statistics.median
    tpot = median((each.went[-1] - each.went[0]) / (each.tokens - each.sizes[0]) for each in served)
    return {
        "ttft": median(each.went[0] - each.came for each in served),
        "ttfa": median(each.went[each.channels.index("final")] - each.came for each in served),
        "tpot": tpot,
        "icl": median(later - sooner for each in served for sooner, later in pairwise(each.went)),
        "e2e": median(each.went[-1] - each.came for each in served),
        "tokens_per_second_per_user": 1 / tpot,
        "requests_per_second": len(served) / wall,
        "output_tokens_per_second": output / wall,
        **(_with_usage(served, wall) if CASES[served[0].model].usage else {}),
    }


def _with_usage(served: Sequence[Served], wall: float) -> dict[str, float]:
    """What is known of prompts, where the server counts them."""
    tokens = PROMPT_TOKENS * len(served)
    output = sum(each.tokens for each in served)
    return {"input_tokens_per_second": tokens / wall, "total_tokens_per_second": (tokens + output) / wall}


def _nominal(name: str) -> dict[str, float]:
    """What a server that is never late would do."""
    case = CASES[name]
    stall = STALL if case.stall else 0.0
    last_chunk = (OUTPUT_TOKENS - 1) // case.chunk * case.chunk
    first_final = -(-(OUTPUT_TOKENS // 2) // case.chunk) * case.chunk
    tpot = (TPOT * last_chunk + stall) / (OUTPUT_TOKENS - case.chunk)
    return {
        "ttft": TTFT,
        "ttfa": TTFT + TPOT * first_final + stall,
        "tpot": tpot,
        "icl": TPOT * case.chunk,
        "e2e": TTFT + TPOT * last_chunk + stall,
        "tokens_per_second_per_user": 1 / tpot,
    }
