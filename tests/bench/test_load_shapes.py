"""Load shapes, against a server that answers one request after the other."""

import asyncio
import statistics
from typing import Any

import pytest
from aiohttp import web

from ossquant.bench.asked import Asked
from ossquant.bench.endpoint import find_endpoint
from ossquant.bench.load import GIVE_UP, arrivals
from ossquant.bench.run import measure_endpoint
from ossquant.bench.shape import Shape, make_shapes
from ossquant.bench.spread import quantile
from ossquant.errors import UsageError
from small_servers import Answer, plain, serving, stream, words

SERVICE = 0.01
STALL = 1.0


def measure(url: str, **asked: Any) -> Any:
    """Measure without a word."""
    settings = {"output_tokens": 4, "warm_up": 0, **asked}
    return measure_endpoint(
        find_endpoint(url), Asked(**settings), announce=lambda note: None, on_progress=lambda *counts: None
    )


def one_at_a_time(stall_at: int) -> Answer:
    """A server with one seat, which stands still once."""
    seat = asyncio.Lock()
    served = 0

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal served
        async with seat:
            served += 1
            await asyncio.sleep(STALL if served == stall_at else SERVICE)
        return await stream(request, words(body["max_tokens"]))

    return answer


def test_open_loops_see_a_stall_that_closed_ones_hide() -> None:
    """One stall of a second is one slow request of a closed loop; by the clock all that were due in it waited."""
    with serving(one_at_a_time(stall_at=20)) as url:
        closed = measure(url, shapes=[Shape("single")], requests=80).traces["single"]
    with serving(one_at_a_time(stall_at=20)) as url:
        opened = measure(url, shapes=[Shape("open", rate=40.0)], requests=80).traces["rate=40"]
    hidden, seen = ([trace.ttft for trace in traces] for traces in (closed, opened))
    assert quantile(hidden, 0.95) < 0.2 * STALL
    assert quantile(seen, 0.95) > 0.7 * STALL
    late = [trace.sent - trace.intended for trace in opened]
    assert statistics.median(late) < 0.05  # the wait was the server's, not ours


def test_arrivals_are_a_seeded_poisson_process() -> None:
    """The gaps are exponential: mean and deviation are one over the rate; the same seed is the same process."""
    times = arrivals(5.0, 20_000, seed=3)
    gaps = [later - sooner for sooner, later in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)
    assert times == arrivals(5.0, 20_000, seed=3)
    assert times != arrivals(5.0, 20_000, seed=4)


def test_closed_loops_keep_so_many_in_flight() -> None:
    """The server sees as many requests at once as were asked for, and each prompt once."""
    at_once = most = 0
    prompts: list[str] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal at_once, most
        prompts.append(body["messages"][0]["content"])
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.1)
        at_once -= 1
        return await stream(request, words(body["max_tokens"]))

    with serving(answer) as url:
        measured = measure(url, shapes=[Shape("closed", concurrency=5)], requests=20, warm_up=1)
    assert most == 5
    scenario = measured.result.scenario("concurrency=5")
    assert scenario.requests.succeeded == 20
    counted = prompts[2:]  # behind the probe's two
    assert len(counted) == 25
    assert len({prompt.split("]")[0] for prompt in counted}) == 25


def test_dialogues_carry_what_was_final() -> None:
    """Each turn sends the turns before it with their final answers, and nothing of their reasoning."""
    bodies: list[Any] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        bodies.append(body["messages"])
        return await stream(request, words(body["max_tokens"]))

    with serving(answer) as url:
        measured = measure(url, shapes=make_shapes([2], [], 3), requests=4)
    scenario = measured.result.scenario("turns=3 concurrency=2")
    assert scenario.requests.succeeded == 12
    assert [row["turn"] for row in scenario.counts["turns"]] == [1, 2, 3]
    last = max(bodies, key=len)
    assert [message["role"] for message in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == " b b"


def test_a_server_that_is_gone_is_given_up() -> None:
    """After so many failures in a row no more are sent, and the run is no result."""
    probes = 2

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal probes
        probes -= 1
        return await plain(request, body) if probes >= 0 else web.json_response({"error": "gone"}, status=500)

    with serving(answer) as url:
        scenario = measure(url, shapes=[Shape("closed", concurrency=4)], requests=500).result.scenarios[0]
    assert scenario.requests.sent < GIVE_UP + 4
    assert not scenario.valid
    assert not scenario.partial
    assert "given up, as one request after the other failed" in scenario.invalid


def test_time_ends_a_scenario() -> None:
    """Past its seconds a scenario sends no more, and ends what it has sent."""
    with serving(one_at_a_time(stall_at=-1)) as url:
        scenario = measure(url, shapes=[Shape("single")], requests=10_000, seconds=0.5).result.scenarios[0]
    assert 5 < scenario.requests.succeeded < 100
    assert not scenario.partial


@pytest.mark.parametrize(
    ("concurrencies", "rates", "turns"), [([0], [], 1), ([5000], [], 1), ([], [0.0], 1), ([], [1e9], 1), ([], [1.0], 3)]
)
def test_impossible_loads_are_refused(concurrencies: list[int], rates: list[float], turns: int) -> None:
    """No stream, too many, no rate, too high a one, and dialogues by the clock are UsageErrors."""
    with pytest.raises(UsageError):
        make_shapes(concurrencies, rates, turns)


def test_shapes_have_names() -> None:
    """A scenario is called by its load."""
    assert [shape.name for shape in make_shapes([1, 16], [0.5], 1)] == ["single", "concurrency=16", "rate=0.5"]
    assert [shape.name for shape in make_shapes([], [], 1)] == ["single"]
