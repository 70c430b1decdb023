"""What the client makes of servers that do not answer as they should; each is a real one."""

import asyncio
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from aiohttp import web

from ossquant.bench.client import Client
from ossquant.bench.endpoint import find_endpoint
from ossquant.bench.trace import Trace
from small_servers import plain, serving, stream, words

BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}


def asked(url: str, timeout: float = 10, times: int = 1) -> Trace:
    """Ask, several times over the same client; the last answer."""

    async def run() -> Trace:
        async with Client(find_endpoint(url), timeout) as client:
            for index in range(times):
                raw = await client.ask(BODY, index)
            return raw.trace()

    return asyncio.run(run())


@contextmanager
def raw_server(answers: Sequence[bytes], lingering: bool = False) -> Iterator[str]:
    """A server that reads what comes, says some bytes and closes, one connection after the other.

    A lingering one closes only when the next request has come.
    """
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(1)

        def serve() -> None:
            for answer in answers:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
                    if lingering:
                        connection.settimeout(1)
                        with suppress(TimeoutError):
                            connection.recv(65536)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.close()
        thread.join(5)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(data: bytes) -> bytes:
    """One piece of a chunked body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_a_plain_answer() -> None:
    """All chunks are there, in order, after they were sent for."""
    with serving(plain) as url:
        trace = asked(url)
    assert trace.ok
    assert len(trace.chunks) == 8
    assert trace.sent < trace.chunks[0].at <= trace.chunks[-1].at <= trace.ended
    assert trace.intended == trace.sent


def test_a_server_that_is_down() -> None:
    """Nobody listens: a failure, and no exception."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    assert asked(f"http://127.0.0.1:{port}").error == "no server there: Connection refused"


@pytest.mark.parametrize(
    ("page", "kind", "status", "said"),
    [
        ('{"error": {"message": "no such key"}}', "application/json", 401, "HTTP 401: no such key"),
        ('{"detail": "gone"}', "application/json", 404, "HTTP 404: gone"),
        ("<html>nginx</html>", "text/html", 502, "HTTP 502: a page of HTML"),
        ("", "text/plain", 503, "HTTP 503: no reason given"),
        ("<html>a portal</html>", "text/html", 200, "an answer of type text/html in place of a stream"),
        ('{"choices": []}', "application/json", 200, "an answer of type application/json in place of a stream"),
        ("", "text/plain", 302, "HTTP 302: no reason given"),
    ],
)
def test_answers_that_are_no_streams(page: str, kind: str, status: int, said: str) -> None:
    """Errors, pages of HTML, whole answers and redirections are failures that say what came instead."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        headers = {"Location": "http://127.0.0.1:1/"} if status == 302 else {}
        return web.Response(text=page, content_type=kind, status=status, headers=headers)

    with serving(answer) as url:
        assert asked(url).error == said


def test_what_a_server_says_steers_no_terminal() -> None:
    """Control characters of an error are spelled out, and a long one is cut."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "\x1b[2Jgone" + "x" * 10_000}}, status=500)

    with serving(answer) as url:
        error = asked(url).error or ""
    assert error.startswith("HTTP 500: \\x1b[2Jgone")
    assert len(error) < 300


def test_an_empty_stream() -> None:
    """A stream without an event is a failure."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, [], done=False)

    with serving(answer) as url:
        assert asked(url).error == "an empty stream"


def test_a_server_that_takes_too_long() -> None:
    """A stream that stands still past the timeout has failed, whatever it said before."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, words(8), pause=0.4)

    with serving(answer) as url:
        assert asked(url, timeout=0.6).error == "no answer in time"


def test_a_connection_that_breaks() -> None:
    """Cut within the answer it is truncated; cut before a word of it, a failure, after one new try."""
    said = chunked(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
    with raw_server([HEAD + said]) as url:
        trace = asked(url)
    assert trace.truncated
    assert trace.error is None
    with raw_server([b"", b""]) as url:
        assert asked(url).error == "the server closed the connection"


def test_a_kept_connection_that_was_closed() -> None:
    """A server that closes connections it said it would keep, as llama.cpp does, loses no request."""
    end = chunked(b'data: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n') + b"0\r\n\r\n"
    with raw_server([HEAD + end] * 2, lingering=True) as url:
        assert asked(url, times=2).ok
    with raw_server([HEAD + end] * 8) as url:
        assert asked(url, times=5).ok


def test_a_server_that_never_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer past the bound is a failure, and is not read on."""
    monkeypatch.setattr("ossquant.bench.client.MAX_ANSWER", 10_000)

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, words(100_000))

    with serving(answer) as url:
        assert asked(url).error == "an answer of more than 10000 bytes"
