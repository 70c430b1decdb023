"""A server whose every answer takes a known time, to measure the meter with.

    python -m ossquant.bench.truth [PORT]

listens on 127.0.0.1 and prints its URL. The model's name chooses how it streams; GET /truth tells, and forgets, when
each request came and each chunk went, by the clock that all processes of this machine share.
"""

import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from aiohttp import web

TTFT = 0.200
TPOT = 0.010
STALL = 0.300  # seconds, once, before the second half of the answer
PROMPT_TOKENS = 100  # of every prompt, as this server counts
MAX_TOKENS = 4096
now = time.perf_counter


@dataclass(frozen=True)
class Case:
    """How a model streams: the field of its reasoning, tokens in a chunk, a stall, and when it gives usage."""

    reasoning: str
    chunk: int = 1
    stall: bool = False
    usage: bool = True
    continuous: bool = False


CASES = {
    "reasoning_content": Case("reasoning_content"),
    "reasoning": Case("reasoning", continuous=True),
    "stall": Case("reasoning_content", stall=True),
    "four-tokens-a-chunk": Case("reasoning", chunk=4, continuous=True),
    "no-usage": Case("reasoning_content", usage=False),
}


@dataclass
class Served:
    """One request as it was served: when it came, when each chunk went, in which channel, with how many tokens."""

    model: str
    came: float
    tokens: int
    went: list[float] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


class Truth:
    """The server's handlers, and what they did."""

    def __init__(self) -> None:
        self.served: list[Served] = []

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "owned_by": "ossquant"} for name in CASES]})

    async def truth(self, request: web.Request) -> web.Response:
        served, self.served = self.served, []
        return web.json_response([asdict(each) for each in served])

    async def answer(self, request: web.Request) -> web.StreamResponse:
        came = now()
        body = await request.json()
        case = CASES.get(body.get("model"))
        if case is None:
            return web.json_response({"error": {"message": f"no model '{body.get('model')}'"}}, status=404)
        served = Served(body["model"], came, min(MAX_TOKENS, int(body["max_tokens"])))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await _stream(response, case, served)
        await response.write_eof()
        self.served.append(served)
        return response


async def _stream(response: web.StreamResponse, case: Case, served: Served) -> None:
    """Send chunk after chunk, each when it is due."""
    half = served.tokens // 2
    sent = 0
    while sent < served.tokens:
        size = min(case.chunk, served.tokens - sent)
        thinking = sent < half
        due = served.came + TTFT + TPOT * sent + (STALL if case.stall and not thinking else 0.0)
        sent += size
        data = _chunk(case, served.model, case.reasoning if thinking else "content", size, sent)
        await asyncio.sleep(max(0.0, due - now()))
        served.went.append(now())
        served.channels.append("reasoning" if thinking else "final")
        served.sizes.append(size)
        await response.write(data)
    await response.write(_last(case, served))


def _chunk(case: Case, model: str, name: str, size: int, sent: int) -> bytes:
    body: dict[str, Any] = {
        "object": "chat.completion.chunk",
        "model": model,
        "choices": [{"index": 0, "delta": {name: " a" * size}, "finish_reason": None}],
    }
    if case.continuous:
        body["usage"] = _usage(sent)
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _last(case: Case, served: Served) -> bytes:
    body: dict[str, Any] = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    if case.usage:
        body["usage"] = _usage(served.tokens)
    return b"data: " + json.dumps(body).encode() + b"\n\ndata: [DONE]\n\n"


def _usage(completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completion,
        "total_tokens": PROMPT_TOKENS + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def serve(port: int) -> None:
    """Serve until SIGTERM, or until whoever started it closes stdin."""
    truth = Truth()
    app = web.Application()
    app.router.add_get("/v1/models", truth.models)
    app.router.add_get("/truth", truth.truth)
    app.router.add_post("/v1/chat/completions", truth.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024)
    await site.start()
    host, listening = runner.addresses[0][:2]
    sys.stdout.write(f"http://{host}:{listening}\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
