import json
from dataclasses import replace
from typing import Any

import pytest

from ossquant.bench.reading import read_trace
from ossquant.bench.trace import Trace, Usage
from small_servers import delta, usage

BLANK = Trace(index=0, intended=10.0, sent=10.5, ended=20.0)


def read(*timed: tuple[float, dict[str, Any] | bytes]) -> Trace:
    """Read events that came at given times."""
    lines = [(at, event if isinstance(event, bytes) else json.dumps(event).encode()) for at, event in timed]
    return read_trace(BLANK, [(at, b"data: " + line + b"\n\n") for at, line in lines])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_times_of_a_recorded_stream(name: str) -> None:
    """TTFT is to the first reasoning in either field, TTFA to the first final text, TPOT by usage, gaps raw."""
    trace = read(
        (10.6, delta(role="assistant", content="")),
        (11.0, delta(**{name: "Let"})),
        (11.5, delta(**{name: " me see."})),
        (12.0, delta(content="Paris")),
        (12.2, delta(content=".")),
        (12.2, delta(finish="stop")),
        (12.3, {"choices": [], "usage": usage(30, 9)}),
        (12.3, b"[DONE]"),
    )
    assert trace.ok
    assert trace.ttft == pytest.approx(1.0)  # from the intended time, not from when it was sent
    assert trace.ttfa == pytest.approx(2.0)
    assert trace.e2e == pytest.approx(2.2)
    assert trace.gaps == pytest.approx([0.5, 0.5, 0.2])
    assert trace.tpot(9) == pytest.approx(1.2 / 8)  # the first chunk is taken for one token
    assert trace.usage == Usage(prompt=30, completion=9)
    assert (trace.text("reasoning"), trace.text("final")) == ("Let me see.", "Paris.")
    assert trace.fields == {name}


def test_tokens_of_the_first_chunk_are_left_out() -> None:
    """Where usage comes with every chunk, TPOT leaves out as many tokens as the first one brought."""
    trace = read(
        (11.0, delta(content="a b c d", usage=usage(30, 4))),
        (12.0, delta(content="e f g h", usage=usage(30, 8))),
        (12.0, delta(finish="length", usage=usage(30, 8))),
    )
    assert trace.first_tokens == 4
    assert trace.tpot(8) == pytest.approx(0.25)


def test_llama_cpps_timings_count_too() -> None:
    """llama.cpp tells its tokens in timings: hidden ones before the first and after the last text are left out."""
    trace = read(
        (11.0, delta(reasoning_content="a") | {"timings": {"predicted_n": 4}}),
        (13.0, delta(content="b") | {"timings": {"predicted_n": 24}}),
        (13.1, delta(finish="stop")),
        (13.1, {"choices": [], "usage": usage(48, 26), "timings": {"predicted_n": 26}}),
    )
    assert trace.first_tokens == 4
    assert trace.tpot(26) == pytest.approx(0.1)


@pytest.mark.parametrize(("silence", "unseen"), [(0.1, False), (1.5, False), (1.7, True)])
def test_an_answer_that_goes_on_unseen_is_noticed(silence: float, unseen: bool) -> None:
    """A silence before the end that is long beside the gaps and the answer: the server wrote what it does not show."""
    said = [(11.0 + 0.1 * place, delta(content="a")) for place in range(50)]
    assert read(*said, (15.9 + silence, delta(finish="length"))).went_on_unseen == unseen


def test_tokens_tell_what_went_on_unseen() -> None:
    """Where tokens are told with each chunk, those after the last one count, however fast they came."""

    def unseen(total: int) -> bool:
        said = [(11.0 + 0.1 * place, delta(content="a", usage=usage(9, place + 1))) for place in range(50)]
        return read(*said, (15.9, delta(finish="length", usage=usage(9, total)))).went_on_unseen

    assert not unseen(60)
    assert unseen(80)


def test_both_fields_at_once_are_one_chunk() -> None:
    """A server that sends the same reasoning under both names has said it once."""
    trace = read((11.0, delta(reasoning="a", reasoning_content="a")), (11.1, delta(content="b", finish="stop")))
    assert [chunk.text for chunk in trace.chunks] == ["a", "b"]


def test_details_of_usage() -> None:
    """Cached and reasoning tokens are read where the server tells them; what is no count is not known."""
    told = usage(30, 2, prompt_tokens_details={"cached_tokens": 16}, completion_tokens_details={"reasoning_tokens": 1})
    assert read((11.0, delta(content="a", finish="stop", usage=told))).usage == Usage(30, 2, 16, 1)
    odd = {"prompt_tokens": -1, "completion_tokens": True, "prompt_tokens_details": [], "completion_tokens_details": 3}
    assert read((11.0, delta(content="a", finish="stop", usage=odd))).usage == Usage()


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], "an empty stream"),
        ([b"[DONE]"], "no text in the stream"),
        ([delta(role="assistant", content=""), delta(finish="stop")], "no text in the stream"),
        ([delta(content="a"), {"error": {"message": "out of memory", "code": 500}}],
         "an error in the stream: out of memory"),
        ([delta(content="a"), {"error": "worker died"}], "an error in the stream: worker died"),
        ([b"<html>"], "an event that is not JSON"),
        ([b"[" * 100_000], "an event that is not JSON"),
        ([b"[1, 2]"], "an event that is no object"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(events: list[dict[str, Any] | bytes], said: str) -> None:
    """A stream without text, and one that tells of an error, are failures and say which."""
    trace = read(*((11.0, event) for event in events))
    assert trace.error == said
    assert not trace.ok


@pytest.mark.parametrize(
    "event", [{"choices": None}, {"choices": [3]}, {"choices": [{"delta": "x"}]}, {}, {"usage": 3}]
)
def test_odd_events_say_nothing(event: dict[str, Any]) -> None:
    """An object that is no chunk changes nothing."""
    assert read((10.9, event), (11.0, delta(content="a", finish="stop"))).ttft == pytest.approx(1.0)


def test_a_stream_without_an_end_is_truncated() -> None:
    """Neither a finish_reason nor [DONE]: the connection was cut."""
    assert read((11.0, delta(content="a"))).truncated
    assert not read((11.0, delta(content="a")), (11.0, b"[DONE]")).truncated


def test_one_chunk_has_no_tpot() -> None:
    """An answer that came at once has no time a token."""
    trace = read((11.0, delta(content="a b c", finish="stop")))
    assert trace.tpot(3) is None
    assert replace(trace, chunks=trace.chunks * 2).tpot(1) is None
