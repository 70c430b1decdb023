import json
from dataclasses import replace
from typing import Any

import pytest

from made_results import result, scenario, throughputs, with_settings
from ossquant.bench.compare import check_limits, compare
from ossquant.bench.comparison import Comparison
from ossquant.bench.comparison_reader import comparison_from_json
from ossquant.bench.gate import DEFAULT, Gate, Rule, parse_gate
from ossquant.bench.runs import Runs, taken_in_turns
from ossquant.errors import InvalidRunError, OssquantError, UsageError

BASE = throughputs("base", [100.0, 102.0, 99.0, 101.0, 100.5])
SLOWER = throughputs("head", [92.0, 93.5, 91.0, 93.0, 92.0])
SAME = throughputs("head", [100.2, 101.9, 99.1, 101.0, 100.4])
UNSURE = throughputs("head", [97.0, 101.0, 98.0, 96.0, 100.0])


def runs(name: str, *values: dict[str, float]) -> Runs:
    return Runs(name, name, tuple(result(scenario(**each)) for each in values))


def judged(base: Runs, head: Runs, gate: Gate = DEFAULT) -> Comparison:
    return compare(base, head, gate, in_turns=True)


@pytest.mark.parametrize(("head", "verdict"), [(SLOWER, "regressed"), (SAME, "ok"), (UNSURE, "inconclusive")])
def test_verdicts(head: Runs, verdict: str) -> None:
    """8 % slower is a regression, the same is ok, and what the noise hides is neither."""
    comparison = judged(BASE, head)
    assert comparison.verdict == verdict
    assert [change.verdict for change in comparison.gated] == [verdict]


def test_the_interval_and_the_verdict_agree() -> None:
    """A single gated metric has regressed where its interval lies below the limit, and is ok where it lies above."""
    for head in (SLOWER, SAME, UNSURE):
        (change,) = judged(BASE, head).gated
        assert change.low is not None
        assert change.high is not None
        assert change.low < (change.ratio or 0) < change.high
        expected = "regressed" if change.high < 0.98 else "ok" if change.low > 0.98 else "inconclusive"
        assert change.verdict == expected


def test_lower_is_better() -> None:
    """A TTFT that rises is a regression, one that falls is not."""
    before = runs("base", *({"ttft": each} for each in (0.200, 0.204, 0.199)))
    after = runs("head", *({"ttft": each} for each in (0.230, 0.236, 0.229)))
    assert judged(before, after).verdict == "regressed"
    assert judged(after, before).verdict == "ok"


def test_one_of_several_metrics() -> None:
    """Each metric has its verdict; one that regressed decides, and all are needed for ok."""
    before = runs("base", *({"ttft": 0.2, "output_tokens_per_second": each} for each in (100.0, 101.0, 99.0, 100.0)))
    after = runs("head", *({"ttft": 0.2, "output_tokens_per_second": each} for each in (80.0, 81.0, 79.0, 80.5)))
    comparison = judged(before, after)
    assert {change.metric: change.verdict for change in comparison.gated} == {
        "output_tokens_per_second": "regressed", "ttft": "ok"
    }  # fmt: skip
    assert comparison.verdict == "regressed"


def test_holm_over_the_gated_metrics() -> None:
    """The p of a metric is higher beside another that is gated; what is not gated costs nothing."""
    values = zip((100.0, 102.0, 99.0), (95.0, 98.0, 94.5), strict=True)
    before, after = zip(*values, strict=True)
    base = runs("base", *({"output_tokens_per_second": each, "ttft": 0.2, "e2e": 1.0} for each in before))
    head = runs("head", *({"output_tokens_per_second": each, "ttft": 0.2, "e2e": 1.0} for each in after))
    alone = judged(base, head, parse_gate({"output_tokens_per_second": {"max_regression": 0.02}}, "g"))
    both = judged(base, head)
    assert both.gated[0].p == pytest.approx(2 * (alone.gated[0].p or 0))
    assert [change.metric for change in alone.changes] == ["output_tokens_per_second", "ttft", "e2e"]
    assert alone.changes[2].verdict is None


def test_limits() -> None:
    """Absolute limits hold for the median of head's runs, in their unit and direction."""
    head = runs("head", *({"ttft": each, "output_tokens_per_second": 50.0} for each in (0.3, 0.9, 0.4)))
    gate = parse_gate({"ttft": {"max": 0.5, "p99": {"max": 0.5}}, "output_tokens_per_second": {"min": 40}}, "gate.toml")
    comparison = judged(head, head, gate)
    assert [(each.metric, each.statistic, each.value, each.verdict) for each in comparison.limits] == [
        ("ttft", "value", 0.4, "ok"), ("ttft", "p99", pytest.approx(0.6), "failed"),
        ("output_tokens_per_second", "value", 50.0, "ok"),
    ]  # fmt: skip
    assert comparison.verdict == "failed"
    assert check_limits(head, gate) == comparison.limits


def test_one_run_a_side() -> None:
    """Two single runs, however different, decide nothing; the differences and the reason are there."""
    comparison = judged(throughputs("base", [100.0]), throughputs("head", [50.0]))
    assert comparison.verdict == "inconclusive"
    assert comparison.changes[0].ratio == pytest.approx(0.5)
    assert comparison.changes[0].low is None
    assert comparison.notes[0].startswith("one run a side: no test of a change is possible.")
    assert "more than 6 % on one host, by more than 13 % on two" in comparison.notes[0]


def test_one_run_a_side_fails_a_limit() -> None:
    """An absolute limit needs no pairs."""
    gate = parse_gate({"output_tokens_per_second": {"min": 60}}, "gate.toml")
    one = throughputs("head", [50.0])
    assert judged(throughputs("base", [100.0]), one, gate).verdict == "failed"
    assert judged(throughputs("base", [100.0]), throughputs("head", [61.0]), gate).verdict == "ok"


def test_not_in_turns() -> None:
    """Runs that were stored and not taken in turns decide nothing, and it says why."""
    comparison = compare(BASE, SLOWER, DEFAULT, in_turns=False)
    assert comparison.verdict == "inconclusive"
    assert comparison.gated[0].why == "the runs were not taken in turns"
    assert "not taken in turns" in comparison.notes[0]


@pytest.mark.parametrize(
    ("base", "head", "expected"),
    [
        ([0, 3, 4], [1, 2, 5], True),
        ([0, 2, 4], [1, 3, 5], True),
        ([0, 1, 2], [3, 4, 5], False),
        ([0, 3, 4], [1, 5, 2], False),
    ],
)
def test_turns_by_the_clock(base: list[int], head: list[int], expected: bool) -> None:
    """A B, B A and A B, A B are turns, A A A, B B B is none."""
    one, other = throughputs("base", [1.0] * 3, base), throughputs("head", [1.0] * 3, head)
    assert taken_in_turns(one.results, other.results) is expected


def test_a_wrong_time_is_no_turn() -> None:
    """A result whose time is no time was not taken in turns."""
    wrong = [replace(each, created="yesterday") for each in BASE.results]
    assert not taken_in_turns(wrong, SAME.results)


def test_what_differs_is_said() -> None:
    """Settings and machines that differ are named."""
    head = with_settings(SAME, seed=1, prompt={"tokens": 128})
    assert judged(BASE, head).notes == ("settings differ: seed, prompt",)
    assert judged(BASE, with_settings(SAME, nonce="a1b2")).notes == ()
    devices = [{"name": "A", "sm_clock_mhz": 1980}], [{"name": "A", "sm_clock_mhz": 300}], [{"name": "B"}]
    one, cooler, another = (
        replace(BASE, results=tuple(replace(each, environment={"devices": made}) for each in BASE.results))
        for made in devices
    )
    assert judged(one, cooler).notes == ()
    assert judged(one, another).notes == ("environment differ: devices.0.name",)


@pytest.mark.parametrize(
    ("base", "head", "gate", "kind", "words"),
    [
        (BASE, throughputs("head", [1.0]), DEFAULT, UsageError, "5 runs of base and 1 of head make no pairs"),
        (BASE, throughputs("head", [1.0, 1, 1, 1, 0]), DEFAULT, UsageError,
         "'single' has a output_tokens_per_second of 0, and a ratio takes values above 0"),
        (BASE, SAME, Gate("g.toml", (Rule("ttft", bound=1.0),)), InvalidRunError,
         "g.toml: head has no ttft in any scenario"),
        (BASE, SAME, Gate("g", (Rule("goodput", max_regression=0.1),)), InvalidRunError, "head has no goodput in any"),
        (BASE, SAME, Gate("g", (Rule("output_tokens_per_second", bound=1.0, scenarios=("rate=4",)),)), InvalidRunError,
         "head has no output_tokens_per_second in 'rate=4'"),
        (runs("base", {"ttft": 0.2}), runs("head", {"tpot": 0.1}), Gate("g", (Rule("ttft", max_regression=0.1),)),
         InvalidRunError, "head has no ttft in 'single'"),
    ],
)  # fmt: skip
def test_refused(base: Runs, head: Runs, gate: Gate, kind: type[OssquantError], words: str) -> None:
    """What cannot be judged is an error that says which metric, side and scenario: no gate passes by a gap."""
    with pytest.raises(kind) as caught:
        judged(base, head, gate)
    assert words in caught.value.message


def test_why_it_was_not_measured() -> None:
    """The reason that a run gives for a missing metric is in the error."""
    one = scenario(output_tokens_per_second=1.0)
    made = Runs("head", "head", (result(replace(one, unmeasured={"power_watts": "no NVIDIA device"})),))
    with pytest.raises(InvalidRunError, match="head has no power_watts in any scenario: no NVIDIA device"):
        check_limits(made, Gate("g", (Rule("power_watts", bound=1.0),)))


def test_invalid_and_partial_runs() -> None:
    """A run with errors, and one that was interrupted, are refused by side and scenario."""
    invalid = Runs("head", "", (result(scenario(invalid="8 of 8 requests failed", ttft=0.1)),))
    with pytest.raises(InvalidRunError, match="head: 'single' is no valid run: 8 of 8 requests failed"):
        judged(throughputs("base", [1.0]), invalid)
    partial = Runs("base", "", (replace(BASE.results[0], partial=True),))
    with pytest.raises(InvalidRunError, match="base: the run was interrupted"):
        judged(partial, throughputs("head", [1.0]))
    with pytest.raises(InvalidRunError, match="interrupted"):
        judged(Runs("base", "", (result(),)), throughputs("head", [1.0]))


def test_a_zero_that_is_not_gated() -> None:
    """A metric of 0 that is not gated has no ratio, and is no error."""
    before = runs("base", {"ttft": 0.2, "queue_delay": 0.0}, {"ttft": 0.2, "queue_delay": 0.0})
    changes = judged(before, before).changes
    assert [(change.metric, change.ratio) for change in changes] == [("ttft", 1.0), ("queue_delay", None)]


def test_json() -> None:
    """A comparison comes back equal from its JSON."""
    for head in (SLOWER, UNSURE):
        comparison = judged(
            BASE, head, parse_gate({"output_tokens_per_second": {"min": 1, "max_regression": 0.02}}, "g")
        )
        raw: Any = json.loads(json.dumps(comparison.to_json()))
        assert raw["schema_version"] == 1
        assert comparison_from_json(raw, "c.json") == comparison


def test_other_json_is_refused() -> None:
    """Another version, and a verdict that is none, are named."""
    raw: Any = json.loads(json.dumps(judged(BASE, SAME).to_json()))
    with pytest.raises(UsageError, match=r"c\.json has schema version 9, this ossquant reads 1"):
        comparison_from_json(raw | {"schema_version": 9}, "c.json")
    with pytest.raises(UsageError, match=r"c\.json: verdict is none of ok, regressed"):
        comparison_from_json(raw | {"verdict": "fine"}, "c.json")
