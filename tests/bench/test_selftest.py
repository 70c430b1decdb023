"""The meter, held against a server whose times are known."""

import json

import pytest

from conftest import run_cli
from ossquant.bench.selftest import Check, selftest
from ossquant.bench.trace import Trace
from ossquant.bench.truth import CASES

METRICS = {
    "ttft", "ttfa", "tpot", "icl", "e2e", "tokens_per_second_per_user", "requests_per_second",
    "output_tokens_per_second",
}  # fmt: skip
OF_PROMPTS = {"input_tokens_per_second", "total_tokens_per_second"}


def run(streams: list[int], cases: list[str]) -> dict[tuple[str, int, str], Check]:
    """Measure, and find checks by case, streams and metric."""
    checks = selftest(streams, cases=cases, on_progress=lambda *counts: None)
    return {(check.case, check.streams, check.metric): check for check in checks}


def wrong(checks: dict[tuple[str, int, str], Check]) -> list[Check]:
    """The checks that are off."""
    return [check for check in checks.values() if not check.right]


def test_every_metric_is_right_at_1_and_16_streams() -> None:
    """Either reasoning field, a stall, chunks of four tokens, no usage: within 2 % or 2 ms of what the server did.

    Through the command, as a user asks it.
    """
    done = run_cli("bench", "selftest", "--concurrency", "1,16", "--json")
    told = json.loads(done.stdout)
    checks = [Check(**{key: value for key, value in row.items() if key != "right"}) for row in told["checks"]]
    assert [check for check in checks if not check.right] == []
    assert (done.returncode, told["right"]) == (0, True)
    assert {(check.case, check.streams, check.metric) for check in checks} == {
        (case, streams, metric)
        for case in CASES
        for streams in (1, 16)
        for metric in (METRICS | OF_PROMPTS if CASES[case].usage else METRICS)
    }
    for check in checks:
        if check.nominal is not None and check.unit == "s":  # the server is what it says, as far as the machine lets it
            assert check.true == pytest.approx(check.nominal, rel=0.1, abs=0.02)


@pytest.mark.slow
def test_every_metric_is_right_at_128_streams() -> None:
    """The same at 128 streams, 12,800 tokens a second."""
    assert not wrong(run([128], list(CASES)))


def test_a_meter_that_knows_one_field_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were `reasoning` not read, TTFT would be that of the final channel, and the selftest would say so."""
    monkeypatch.setattr("ossquant.bench.reading.REASONING_FIELDS", ("reasoning_content",))
    monkeypatch.setattr("ossquant.bench.selftest.TRIES", 1)
    ttft = run([1], ["reasoning"])["reasoning", 1, "ttft"]
    assert ttft.measured > 2 * ttft.true
    assert not ttft.right


def test_a_meter_that_takes_a_chunk_for_a_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the first chunk of four taken for one token, TPOT would be too short, and the selftest would say so."""
    monkeypatch.setattr(Trace, "first_tokens", None)
    monkeypatch.setattr("ossquant.bench.selftest.TRIES", 1)
    tpot = run([1], ["four-tokens-a-chunk"])["four-tokens-a-chunk", 1, "tokens_per_second_per_user"]
    assert tpot.measured > 1.03 * tpot.true
    assert not tpot.right


def test_what_is_right() -> None:
    """A time may be off by 2 % or 2 ms, a rate by 2 %."""
    assert Check("", 1, "ttft", "s", 0.102, 0.1, None).right
    assert not Check("", 1, "ttft", "s", 0.1021, 0.1, None).right
    assert Check("", 1, "e2e", "s", 1.0199, 1.0, None).right
    assert not Check("", 1, "e2e", "s", 0.979, 1.0, None).right
    assert not Check("", 1, "requests_per_second", "1/s", 1.0201, 1.0, None).right
