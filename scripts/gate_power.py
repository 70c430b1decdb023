#!/usr/bin/env python
"""How often the gate of `ossquant bench --ab` is wrong, by simulation: prints the table in docs/compare.md.

    scripts/gate_power.py [--experiments 10000]

Every experiment goes through the code of --ab itself; only the runs are made up: a throughput that varies from run to
run by 2 % and from host to host by 4 %, and, in one row, that falls while the machine warms up.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ossquant.bench.ab import Budget, compare_in_turns
from ossquant.bench.compare import HOST_NOISE, RUN_NOISE
from ossquant.bench.gate import Gate, Rule
from ossquant.bench.result import Metric, Requests, Result, Scenario, Target

METRIC = "output_tokens_per_second"
DRIFT = 0.005  # a run
CHANGES = (0.0, 0.02, 0.05, 0.10)


@dataclass(frozen=True)
class Case:
    """A plan, how many scenarios are gated (all slow down alike), and how much slower head may be."""

    name: str
    budget: Budget
    scenarios: int = 1
    max_regression: float = 0.02
    drift: float = 0.0


CASES = (
    Case("5 pairs", Budget(5, 5)),
    Case("8 pairs", Budget(8, 8)),
    Case("5 to 12 pairs, the default", Budget()),
    Case("the same, 3 metrics", Budget(), scenarios=3),
    Case("the same, 0.5 % slower each run", Budget(), drift=DRIFT),
    Case("the same, max_regression 0.05", Budget(), max_regression=0.05),
)


def result(values: list[float]) -> Result:
    """A run with a throughput a scenario."""
    scenarios = tuple(
        Scenario(f"s{index}", {"kind": "single"}, True, (), False, Requests(1, 1, 0, 0), 1.0,
                 {METRIC: Metric(value, "tokens/s", "higher", 1, "client")})
        for index, value in enumerate(values)
    )  # fmt: skip
    return Result("2026-01-01T00:00:00+00:00", "0", False, Target("endpoint", "", "", ""), {}, {}, scenarios)


def runs(rng: random.Random, case: Case, slowdown: float) -> Callable[[str], Result]:
    """What measures, on one host that lies somewhere: base, or head, which is slower by a share."""
    host = [rng.gauss(0, HOST_NOISE) for _ in range(case.scenarios)]
    order = iter(range(10**6))

    def measure(side: str) -> Result:
        moved = case.drift * next(order) + (0.0 if side == "base" else -math.log1p(-slowdown))
        return result([100 * math.exp(each - moved + rng.gauss(0, RUN_NOISE)) for each in host])

    return measure


def simulate(case: Case, slowdown: float, experiments: int, seed: int = 0) -> tuple[Counter[str], float]:
    """How often each verdict was given, and the mean number of pairs it took."""
    rng = random.Random(seed)  # noqa: S311  a simulation
    gate = Gate("simulated", (Rule(METRIC, max_regression=case.max_regression),))
    verdicts: Counter[str] = Counter()
    pairs = 0
    for _ in range(experiments):
        measure = runs(rng, case, slowdown)
        comparison = compare_in_turns(measure, {"base": "", "head": ""}, gate, case.budget, lambda *_: None)
        verdicts[comparison.verdict] += 1
        pairs += comparison.pairs
    return verdicts, pairs / experiments


def stored_baseline(slowdown: float, experiments: int, seed: int = 0) -> float:
    """How often a run on one host is more than 5 % below one that was stored, from another."""
    rng = random.Random(seed)  # noqa: S311  a simulation
    noise = math.sqrt(2) * math.hypot(RUN_NOISE, HOST_NOISE)
    return sum(rng.gauss(math.log1p(-slowdown), noise) < math.log(0.95) for _ in range(experiments)) / experiments


def rows(experiments: int) -> Iterator[list[str]]:
    """The table: how often a regression was called, and how often a head that did not change was called ok."""
    yield [
        "",
        "no change",
        *(f"{100 * change:.0f} % slower" for change in CHANGES[1:]),
        "ok if no change",
        "pairs taken",
    ]
    stored = [stored_baseline(change, experiments) for change in CHANGES]
    yield ["stored baseline, > 5 %", *map(percent, stored), "", "1"]
    for case in CASES:
        found = [simulate(case, change, experiments) for change in CHANGES]
        called = [percent(verdicts["regressed"] / experiments) for verdicts, _ in found]
        pairs = [mean for _, mean in found]
        taken = f"{pairs[0]:.0f}" if min(pairs) == max(pairs) else f"{pairs[0]:.1f}; {pairs[-1]:.1f} if 10 % slower"
        yield [case.name, *called, percent(found[0][0]["ok"] / experiments), taken]


def percent(share: float) -> str:
    """A share with one digit where it is small."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--experiments", type=int, default=10_000)
    head, *body = rows(parser.parse_args().experiments)
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in body:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
