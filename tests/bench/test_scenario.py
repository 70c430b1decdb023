"""Metrics and verdicts of requests with known times."""

from dataclasses import replace
from typing import Any

import pytest

from ossquant.bench.devices import Drawn
from ossquant.bench.facts import Facts
from ossquant.bench.result import Scenario
from ossquant.bench.scenario import make_scenario
from ossquant.bench.trace import Chunk, Trace, Usage
from ossquant.bench.watch import ClientLoad

USAGE = Usage(prompt=100, completion=5, cached=0)


def request(index: int, ttft: float = 0.2, step: float = 0.01, **changed: Any) -> Trace:
    """A request sent at second `index`: 2 tokens of reasoning, then 3 final ones, a step apart."""
    at = index + ttft
    chunks = tuple(Chunk(at + place * step, "reasoning" if place < 2 else "final", " word") for place in range(5))
    made = Trace(index, float(index), float(index), chunks[-1].at, chunks, USAGE, "stop", status=200)
    return replace(made, **changed)


def scenario(traces: list[Trace], **known: Any) -> Scenario:
    """Sum up requests that took ten seconds."""
    return make_scenario("single", traces, Facts(**{"shape": {"kind": "single"}, "seconds": 10.0, **known}))


def test_every_metric_has_its_definition() -> None:
    """Known times give known metrics, of the right unit, direction, count and source."""
    made = scenario(
        [request(index, ttft=0.1 * (index + 1)) for index in range(5)],
        usd_per_hour=3.6, roof_tokens_per_second=200.0, drawn=Drawn(50.0, 10**9, 2 * 10**9),
        slo={"ttft": 0.3, "tpot": 0.02},
    )  # fmt: skip
    values = {name: metric.value for name, metric in made.metrics.items()}
    assert values == pytest.approx({
        "ttft": 0.3, "ttfa": 0.32, "tpot": 0.01, "icl": 0.01, "e2e": 0.34, "tokens_per_second_per_user": 100.0,
        "requests_per_second": 0.5, "output_tokens_per_second": 2.5, "input_tokens_per_second": 50.0,
        "total_tokens_per_second": 52.5, "goodput": 0.3, "power_watts": 50.0, "joules_per_token": 20.0,
        "peak_device_bytes": 10**9, "peak_host_bytes": 2 * 10**9, "usd_per_million_tokens": 400.0,
        "roofline_share": 0.5,
    })  # fmt: skip
    ttft = made.metrics["ttft"]
    assert (ttft.unit, ttft.better, ttft.count, ttft.source) == ("s", "lower", 5, "client")
    assert (ttft.mean, ttft.p50, ttft.p90, ttft.p95) == pytest.approx((0.3, 0.3, 0.46, 0.48))
    assert made.metrics["tpot"].source == made.metrics["output_tokens_per_second"].source == "usage"
    assert made.metrics["icl"].count == 20
    assert made.valid
    assert made.counts["reasoning"] == {"share": 0.4, "source": "characters"}
    assert made.counts["first_chunk_tokens"] == {"source": "taken for 1", "median": 1}


@pytest.mark.parametrize(("number", "there"), [(299, False), (300, True)])
def test_p99_takes_300_requests(number: int, there: bool) -> None:
    """Below 300 requests there is no p99, of gaps neither, however many there are."""
    made = scenario([request(index) for index in range(number)])
    assert (made.metrics["ttft"].p99 is not None) == there
    assert (made.metrics["icl"].p99 is not None) == there


def test_latency_counts_from_the_intended_time() -> None:
    """What a request waited to be sent is part of its latencies, and its own figure."""
    made = scenario([request(index, sent=index + 0.15) for index in range(3)])
    assert made.metrics["queue_delay"].value == pytest.approx(0.15)
    assert made.metrics["ttft"].value == pytest.approx(0.2)
    assert "queue_delay" not in scenario([request(0)]).metrics


@pytest.mark.parametrize(
    ("traces", "known", "said"),
    [
        ([request(0), request(1, error="HTTP 500: no", chunks=())], {}, "1 of 2 requests failed: HTTP 500: no"),
        ([request(0), request(1, truncated=True)], {}, "1 of 2 answers were cut short"),
        ([request(0), request(1, finish_reason="length")], {"output_tokens": 64}, "1 of 2 answers were cut short"),
        ([request(0, error="x", chunks=())], {"given_up": True}, "given up, as one request after the other failed"),
        ([request(0, error="x", chunks=())], {}, "no request was answered"),
        ([request(0), request(1, usage=Usage(100))], {}, "1 of 2 answers came without usage"),
        ([request(0, usage=Usage(100, 90))], {"tokenizer": lambda text: len(text.split())},
         "counts disagree in 1 of 1 answers: usage says 90, the tokenizer 5"),
        ([request(0, usage=Usage(100, 2))], {"tokenizer": lambda text: len(text.split())},
         "counts disagree in 1 of 1 answers: usage says 2, the tokenizer 5"),
        ([request(0, messages=({"role": "user", "content": "a " * 101},))], {},
         "the server cut 1 of 1 prompts: 100 tokens of 101 words"),
        ([request(0, usage=Usage(100, 5, cached=80))], {"preamble": 60},
         "the cache was warm: 80 tokens of a prompt were cached, of which 60 are common to all"),
        ([request(0), request(1, finished=2.0)], {},
         "1 of 2 answers went on unseen, past their end: their tokens are no text"),
        ([request(0)], {"client": ClientLoad(lag=0.001, cpu_share=0.95)}, "the client is saturated: 95% of a core"),
        ([request(0)], {"client": ClientLoad(lag=0.02, cpu_share=0.1)},
         "the client is saturated, or this machine busy: its clock reads 20 ms late"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_makes_a_run_invalid_is_named(traces: list[Trace], known: dict[str, Any], said: str) -> None:
    """Failures, cut answers and prompts, counts that disagree, a warm cache and a late client: each is said."""
    made = scenario(traces, **known)
    assert not made.valid
    assert said in made.invalid


def test_what_is_common_to_all_may_be_cached() -> None:
    """The chat template's own tokens, to a block of the cache, are no warm cache; nor are a dialogue's later turns."""
    assert scenario([request(0, usage=Usage(100, 5, cached=64))], preamble=60).valid
    assert scenario([request(0, usage=Usage(900, 5, cached=800), turn=1)], preamble=60).valid


def test_hidden_tokens_are_counted() -> None:
    """What the server counts and nobody sees, harmony's own tokens, is told; some of them are no disagreement."""
    made = scenario([request(0, usage=Usage(100, 15))], tokenizer=lambda text: len(text.split()))
    assert made.valid
    assert made.counts["hidden_tokens"] == {"total": 10, "min": 10, "median": 10, "max": 10}


def test_one_odd_answer_among_many_is_none() -> None:
    """Two answers in twenty may count otherwise, as those in a channel that is not shown do; three may not."""
    odd, tokenizer = Usage(100, 90), lambda text: len(text.split())
    traces = [request(index, usage=odd if index < 2 else USAGE) for index in range(20)]
    assert scenario(traces, tokenizer=tokenizer).valid
    assert not scenario([*traces[1:], *traces[:2]], tokenizer=tokenizer).valid


def test_a_tokenizer_counts_where_the_server_does_not() -> None:
    """Without usage a tokenizer's count is taken, and said to be one; without either there is none, and why."""
    unknown = [request(0, usage=Usage())]
    made = scenario(unknown, tokenizer=lambda text: len(text.split()))
    assert made.metrics["tpot"].value == pytest.approx(0.01)
    assert made.metrics["tpot"].source == made.counts["output"] == "tokenizer"
    bare = scenario(unknown)
    assert {"tpot", "output_tokens_per_second"} & set(bare.metrics) == set()
    assert bare.unmeasured["tpot"] == "the server gives no usage, and there is no --tokenizer"
    assert bare.metrics["ttft"].value == pytest.approx(0.2)


def test_nothing_is_invented() -> None:
    """Without a device, a price or a roof their metrics are not there, and the reason is."""
    why = {"power_watts": "no device"}
    made = scenario([request(0)], drawn=Drawn(None, None, None, why), why={"usd_per_million_tokens": "no price"})
    absent = ("power_watts", "joules_per_token", "usd_per_million_tokens", "peak_device_bytes", "roofline_share")
    assert not set(absent) & set(made.metrics)
    names = ("joules_per_token", "usd_per_million_tokens")
    assert [made.unmeasured[name] for name in names] == ["no device", "no price"]


def test_channels_that_do_not_come_apart_have_no_ttfa() -> None:
    """Where the server streams harmony's channels as one text, TTFA is not known."""
    made = scenario([request(0)], splits=False)
    assert "ttfa" not in made.metrics
    assert made.unmeasured["ttfa"] == "the server does not take channels apart"


def test_turns_are_told_apart() -> None:
    """Dialogues have TTFT and prompts by turn."""
    traces = [request(0), request(1, ttft=0.5, turn=1, usage=Usage(300, 5, cached=100))]
    made = scenario(traces, shape={"kind": "multi-turn", "turns": 2, "concurrency": 1})
    assert [row["turn"] for row in made.counts["turns"]] == [1, 2]
    assert [row["ttft"] for row in made.counts["turns"]] == pytest.approx([0.2, 0.5])
    assert [row["input_tokens"] for row in made.counts["turns"]] == [100, 300]
