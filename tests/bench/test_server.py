"""Probing, against real servers with the quirks of real ones."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from ossquant.bench.client import Client
from ossquant.bench.endpoint import find_endpoint
from ossquant.bench.server import OPTIONAL, Server, Wanted, probe
from ossquant.errors import EndpointError, UsageError
from small_servers import MODEL, Answer, delta, plain, serving, stream, usage, words

WANTED = Wanted(None, 8, reasoning_effort="low", ignore_eos=True)


def probed(url: str, wanted: Wanted = WANTED) -> Server:
    """Probe a URL."""

    async def run() -> Server:
        async with Client(find_endpoint(url), timeout=10) as client:
            return await probe(client, wanted)

    return asyncio.run(run())


def refusing(status: int, names: set[str], say: Callable[[str], Any]) -> Answer:
    """A server that refuses bodies with some keys."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        sent = set(body) | set(body.get("stream_options", {}))
        if refused := sorted(names & sent):
            return web.json_response(say(refused[0]), status=status)
        return await plain(request, body)

    return answer


def test_a_server_without_quirks() -> None:
    """Everything is accepted, the only model is taken, and what the server tells is known."""
    with serving(plain) as url:
        server = probed(url)
    assert server.model == MODEL
    assert set(server.accepted) == set(OPTIONAL) - {"timings_per_token"}  # that is llama.cpp's
    assert server.fields == ("reasoning_content",)
    assert server.usage
    assert not server.continuous_usage
    assert server.splits
    assert server.preamble == 100
    assert not any("refuses" in note for note in server.notes)


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize(
    "say",
    [lambda name: {"detail": f"Unexpected fields in the request: {{'{name}'}}"},
     lambda name: {"error": {"message": f"{name} is not permitted", "type": "invalid_request_error"}},
     lambda name: {"error": "bad request"}],
    ids=["detail", "message", "unnamed"],
)  # fmt: skip
def test_refused_parameters_are_left_out(status: int, say: Callable[[str], Any]) -> None:
    """Named or not, what a server refuses is found and left out, and a note says so; usage is still asked for."""
    refused = {"ignore_eos", "min_tokens"}
    with serving(refusing(status, refused, say)) as url:
        server = probed(url)
    assert not refused & set(server.accepted)
    assert "stream_options" in server.accepted
    assert any("refuses" in note and "min_tokens" in note and "ignore_eos" in note for note in server.notes)
    body = server.body([{"role": "user", "content": "Hi"}], WANTED)
    assert not refused & set(body)
    assert body["max_tokens"] == 8


def test_an_error_in_the_stream_is_a_refusal_too() -> None:
    """A server that accepts ignore_eos and then fails on it is asked without it."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if "ignore_eos" in body:
            return await stream(request, [delta(content="a"), {"error": {"message": "bad ignore_eos"}}])
        return await plain(request, body)

    with serving(answer) as url:
        assert "ignore_eos" not in probed(url).accepted


def test_what_a_stream_tells_is_noticed() -> None:
    """The other reasoning field, usage in every chunk, channels that do not come apart, no usage at all."""

    async def vllm(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        said = [delta(reasoning="a", usage=usage(9, 1)), delta(content="b", usage=usage(9, 2), finish="stop")]
        return await stream(request, said)

    async def whole(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(
            request, [delta(content="analysis"), delta(content="Hm.assistantfinal"), delta(finish="stop")]
        )

    with serving(vllm) as url:
        server = probed(url)
    assert (server.fields, server.continuous_usage, server.splits) == (("reasoning",), True, True)
    with serving(whole) as url:
        server = probed(url)
    assert (server.fields, server.usage, server.splits) == ((), False, False)
    assert any("--tokenizer" in note for note in server.notes)


def test_lengths_are_calibrated_by_usage() -> None:
    """Tokens a word, and what stands around the text, follow from two prompts."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, words(8, prompt=60 + 2 * len(body["messages"][0]["content"].split())))

    with serving(answer) as url:
        server = probed(url)
    assert server.preamble == 62
    assert server.tokens_per_word == pytest.approx(2.0, rel=0.01)


def test_engines_are_told_apart() -> None:
    """By who owns the model, llama.cpp and its like are recognized."""

    async def props(request: web.Request) -> web.Response:
        return web.json_response({"build_info": "b1", "total_slots": 4, "chat_template": "x" * 1000,
                                  "default_generation_settings": {"n_ctx": 4096}})  # fmt: skip

    app = web.Application()
    app.router.add_get("/props", props)
    app.router.add_get("/v1/models", lambda request: _listed())
    app.router.add_post("/v1/chat/completions", _plain)
    from small_servers import running

    with running(app) as url:
        server = probed(url, Wanted(None, 8))
    assert server.engine == "llama.cpp"
    assert "timings_per_token" in server.accepted
    assert "ignore_eos" not in server.accepted  # which was not asked for
    assert server.details == {"build_info": "b1", "total_slots": 4, "n_ctx": 4096}


async def _listed() -> web.Response:
    return web.json_response({"data": [{"id": "m", "owned_by": "llamacpp"}]})


async def _plain(request: web.Request) -> web.StreamResponse:
    return await plain(request, await request.json())


def test_a_model_must_be_named_among_several() -> None:
    """Of two models none is guessed; the error names them. A server without a list takes any name."""
    with serving(plain, ("one", "two")) as url:
        with pytest.raises(UsageError, match="say --model; it serves one, two"):
            probed(url)
        assert probed(url, Wanted("two", 8)).model == "two"
    with serving(plain, None) as url:
        with pytest.raises(UsageError, match="it lists none"):
            probed(url)
        assert probed(url, Wanted("any", 8)).model == "any"


def test_the_last_refusal_is_the_answer() -> None:
    """A server that refuses even the plainest request has failed; its reason is told, and asking ends."""
    with (
        serving(refusing(400, {"model"}, lambda name: {"error": "out of order"})) as url,
        pytest.raises(EndpointError, match="HTTP 400: out of order"),
    ):
        probed(url)
