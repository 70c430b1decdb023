"""Compare runs of head with runs of base, pair by pair, and judge by a gate."""

import importlib.metadata
import math
import statistics
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

from ossquant.bench.changes import Question, gated_changes, other_changes, present
from ossquant.bench.comparison import Comparison, Limit, Verdict, overall
from ossquant.bench.gate import Gate, Rule
from ossquant.bench.paired import ALPHA
from ossquant.bench.runs import Runs, require_valid
from ossquant.errors import InvalidRunError, UsageError

# standard deviations of throughput that scripts/gate_power.py simulates with: of a run, of a host
RUN_NOISE, HOST_NOISE = 0.02, 0.04
DIFFERENCES_SHOWN = 6
CHANGING = {"nonce", "sm_clock_mhz", "memory_clock_mhz"}  # what differs from run to run and need not be said
IN_TURNS = "the runs were not taken in turns"
version = cache(importlib.metadata.version)


def compare(
    base: Runs, head: Runs, gate: Gate, *, in_turns: bool, alpha: float = ALPHA, looks: tuple[int, ...] = ()
) -> Comparison:
    """Judge head against base. Raises UsageError for runs that make no pairs, InvalidRunError for what is no result.

    in_turns says that the two runs of each pair were taken next to each other: without it no change is judged. alpha
    is what this one of the looks may spend.
    """
    if len(base.results) != len(head.results) or not base.results:
        raise UsageError(
            f"{len(base.results)} runs of {base.name} and {len(head.results)} of {head.name} make no pairs",
            hint="give as many of each",
        )
    for runs in (base, head):
        for result in runs.results:
            require_valid(result, runs.name)
    asked = [question for rule in gate.rules for question in _asked(base, head, rule, gate)]
    gated = gated_changes(base, head, asked, alpha, _obstacle(len(base.results), in_turns))
    limits = tuple(_limit(head, scenario, rule) for scenario, rule in asked if rule.bound is not None)
    verdicts: list[Verdict] = [
        *(change.verdict for change in gated if change.verdict),
        *(each.verdict for each in limits),
    ]
    return Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ossquant=version("ossquant"),
        gate=gate.name,
        base=base.side(),
        head=head.side(),
        pairs=len(base.results),
        looks=looks or (len(base.results),),
        alpha=alpha,
        verdict=overall(verdicts),
        changes=(*gated, *other_changes(base, head, gated, alpha)),
        limits=limits,
        notes=tuple(_notes(base, head, in_turns, bool(verdicts))),
    )


def check_limits(runs: Runs, gate: Gate) -> tuple[Limit, ...]:
    """Hold one side against the absolute limits of a gate alone. Raises InvalidRunError as compare does."""
    for result in runs.results:
        require_valid(result, runs.name)
    return tuple(
        _limit(runs, scenario, rule)
        for rule in gate.rules
        if rule.bound is not None
        for scenario, _ in _asked(runs, runs, rule, gate)
    )


def _asked(base: Runs, head: Runs, rule: Rule, gate: Gate) -> Iterator[Question]:
    """Each scenario that a rule speaks of; what the gate names and was not measured raises InvalidRunError."""
    sides = (head,) if rule.max_regression is None else (base, head)
    anywhere = dict.fromkeys(name for runs in sides for name in runs.scenarios() if runs.has(name, rule))
    wanted = rule.scenarios or tuple(anywhere)
    for name in wanted:
        for runs in sides:
            if not runs.has(name, rule):
                raise _unmeasured(runs, name, rule, gate)
    if not wanted and not gate.optional:
        raise _unmeasured(head, None, rule, gate)
    yield from ((name, rule) for name in wanted)


def _unmeasured(runs: Runs, scenario: str | None, rule: Rule, gate: Gate) -> InvalidRunError:
    where = "any scenario" if scenario is None else f"'{scenario}'"
    why = runs.why_unmeasured(scenario, rule.metric)
    return InvalidRunError(
        f"{gate.name}: {runs.name} has no {rule.name} in {where}{f': {why}' if why else ''}",
        hint="measure it, or leave it out of the gate",
    )


def _obstacle(pairs: int, in_turns: bool) -> str:
    return "one run a side" if pairs < 2 else "" if in_turns else IN_TURNS


def _limit(runs: Runs, scenario: str, rule: Rule) -> Limit:
    kind, bound = rule.kind, rule.bound or 0.0
    value = statistics.median(present(runs.values(scenario, rule)))
    verdict: Verdict = "ok" if (value <= bound if kind.better == "lower" else value >= bound) else "failed"
    return Limit(scenario, rule.metric, rule.statistic, kind.unit, kind.better, bound, value, verdict)


def _notes(base: Runs, head: Runs, in_turns: bool, gated: bool) -> Iterator[str]:
    if len(base.results) == 1:
        yield _noise()
    elif not in_turns:
        yield (
            f"{IN_TURNS} (A B, B A, …), so a change of the machine in between cannot be told from a change of what was "
            "measured: no change is judged"
        )
    if not gated:
        yield "nothing was gated; --gate says what matters"
    before, after = base.results[0], head.results[0]
    pairs = (("settings", before.settings, after.settings), ("environment", before.environment, after.environment))
    for what, one, other in pairs:
        if different := _differences(one, other):
            rest = len(different) - DIFFERENCES_SHOWN
            yield f"{what} differ: {', '.join(different[:DIFFERENCES_SHOWN])}{f' and {rest} more' if rest > 0 else ''}"


def _noise() -> str:
    same, other = (math.expm1(1.96 * math.sqrt(2 * square)) for square in (RUN_NOISE**2, RUN_NOISE**2 + HOST_NOISE**2))
    return (
        "one run a side: no test of a change is possible. Where runs vary by 2 % and hosts by 4 %, two runs of the "
        f"same thing differ by more than {100 * same:.0f} % on one host, by more than {100 * other:.0f} % on two, once "
        "in twenty times; `ossquant bench --ab` takes runs in turns until it is decided"
    )


def _differences(before: Mapping[Any, Any], after: Mapping[Any, Any], prefix: str = "", depth: int = 4) -> list[str]:
    """The keys, dotted, under which two objects differ; what lies deeper counts as its parent."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *after]):
        one, other = (_listed(each.get(key)) for each in (before, after))
        if depth and isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _differences(one, other, f"{prefix}{key}.", depth - 1)
        elif one != other and key not in CHANGING:
            found.append(f"{prefix}{key}")
    return found


def _listed(value: Any) -> Any:
    return dict(enumerate(value)) if isinstance(value, list) else value
