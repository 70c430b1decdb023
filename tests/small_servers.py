"""Little servers that answer as they are told, each in a thread of the test's process."""

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
MODEL = "gpt-oss-20b"


@contextmanager
def serving(
    answer: Answer, models: Sequence[str] | None = (MODEL,), tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Serve chat completions by a function of the request and its body; models None lists none. Yields the URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", lambda request: _answered(request, answer))
    if models is not None:
        app.router.add_get("/v1/models", lambda request: _models(models))
    with running(app, tls) as url:
        yield url


@contextmanager
def running(app: web.Application, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run an application on a free port of 127.0.0.1."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    started = threading.Event()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        started.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _answered(request: web.Request, answer: Answer) -> web.StreamResponse:
    return await answer(request, await request.json())


async def _models(models: Sequence[str]) -> web.Response:
    return web.json_response({"data": [{"id": name, "owned_by": "tests"} for name in models]})


def delta(finish: str | None = None, usage: dict[str, Any] | None = None, **said: str) -> dict[str, Any]:
    """One event of a stream."""
    body: dict[str, Any] = {"choices": [{"index": 0, "delta": said, "finish_reason": finish}]}
    return body | ({"usage": usage} if usage else {})


def usage(prompt: int, completion: int, **details: Any) -> dict[str, Any]:
    """A count as servers give it."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


async def stream(
    request: web.Request, events: Sequence[dict[str, Any] | bytes], pause: float = 0.0, done: bool = True
) -> web.StreamResponse:
    """Send events, each after a pause; bytes as they are."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await asyncio.sleep(pause)
        await response.write(event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n")
    if done:
        await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def words(number: int, prompt: int = 100, **details: Any) -> list[dict[str, Any]]:
    """A whole answer: half reasoning, half final, a token each, and usage at its end."""
    half = number // 2
    said = [delta(reasoning_content=" a") for _ in range(half)] + [delta(content=" b") for _ in range(number - half)]
    return [*said, delta(finish="length", usage=usage(prompt, number, **details))]


async def plain(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A server without quirks: as many tokens as are asked for, 2 ms each."""
    return await stream(request, words(body["max_tokens"]), pause=0.002)
