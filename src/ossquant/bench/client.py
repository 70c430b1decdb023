"""Client: sends requests to an endpoint and stamps what comes back. It parses nothing while streams run.

Weighed against the openai SDK and others, aiohttp adds the least: 68 ms to the median TTFT at 128 streams where the
SDK adds 478 (2026-11).
"""

import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ossquant.bench.endpoint import Endpoint
from ossquant.bench.reading import Raw, error_text
from ossquant.bench.sse import Piece
from ossquant.bench.trace import Trace, now
from ossquant.errors import EndpointError, MissingExtraError

try:
    import aiohttp
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"measuring a server needs '{error.name}', which is not installed", hint="pip install 'ossquant[bench]'"
    ) from error

MAX_ANSWER = 64 * 2**20  # bytes of one answer
MAX_ERROR = 64 * 2**10  # bytes that are read of an error's page
CONNECT_TIMEOUT = 10.0
KEEP_ALIVE = 4.0  # uvicorn closes after 5 s, and a request on a closing connection would fail


class Client:
    """Connections to one endpoint, which are kept and used again; use it as an async context.

    fresh is set when a kept one turns out to be closed, as llama.cpp does: from then on each request opens its own.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self.endpoint = endpoint
        self.pieces = 0  # received so far, for whoever shows progress
        self.fresh = False
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT)

    async def __aenter__(self) -> "Client":
        self._kept = self._session(aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE))
        self._fresh = self._session(aiohttp.TCPConnector(limit=0, force_close=True))
        return self

    async def __aexit__(self, *caught: object) -> None:
        await self._kept.close()
        await self._fresh.close()

    def _session(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self.endpoint.headers, auto_decompress=False
        )

    async def get(self, url: str) -> tuple[int, Mapping[str, str], bytes]:
        """Fetch a small page: status, headers, body. Raises EndpointError where no server answers."""
        try:
            async with self._fresh.get(url, allow_redirects=False) as response:
                return response.status, response.headers, await response.content.read(MAX_ANSWER)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EndpointError(f"{self.endpoint.base}: {failure(error)}", hint=_cure(error)) from error

    async def ask(self, body: Mapping[str, Any], index: int, intended: float | None = None, turn: int = 0) -> Raw:
        """Send one request now and stamp every piece of its answer. A failure is the answer's, and not raised."""
        data = json.dumps(body).encode()
        if not self.fresh:
            raw = await self._send(self._kept, data, index, intended, turn)
            if not isinstance(raw, BaseException):
                return raw
            self.fresh = True
        raw = await self._send(self._fresh, data, index, intended, turn)
        return raw if isinstance(raw, Raw) else self._lost(raw, index, intended, turn)

    async def _send(
        self, session: aiohttp.ClientSession, data: bytes, index: int, intended: float | None, turn: int
    ) -> Raw | BaseException:
        """Send; return what broke the connection before the server said a word."""
        sent = now()
        blank = Trace(index, sent if intended is None else intended, sent, sent, turn=turn)
        pieces: list[Piece] = []
        status, error = None, None
        try:
            async with session.post(
                f"{self.endpoint.base}/chat/completions", data=data, allow_redirects=False
            ) as response:
                status = response.status
                error = await self._receive(response, pieces)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError) as caught:
            if status is None and not isinstance(caught, aiohttp.ClientConnectorError):
                return caught
            error = None if pieces else failure(caught)  # an answer that was cut short, if there was some of it
        except (aiohttp.ClientError, OSError, TimeoutError) as caught:
            error = None if pieces and not isinstance(caught, TimeoutError) else failure(caught)
        return Raw(replace(blank, ended=now(), status=status, error=error), pieces)

    def _lost(self, error: BaseException, index: int, intended: float | None, turn: int) -> Raw:
        at = now()
        return Raw(Trace(index, at if intended is None else intended, at, at, error=failure(error), turn=turn), [])

    async def _receive(self, response: aiohttp.ClientResponse, pieces: list[Piece]) -> str | None:
        """Stamp pieces until the stream ends; return what is wrong with the answer."""
        kind = response.content_type
        if response.status != 200:
            return f"HTTP {response.status}: {_said(await response.content.read(MAX_ERROR), kind)}"
        if kind != "text/event-stream":
            return f"an answer of type {kind} in place of a stream"
        total = 0
        while piece := await response.content.readany():
            pieces.append((now(), piece))
            self.pieces += 1
            total += len(piece)
            if total > MAX_ANSWER:
                return f"an answer of more than {MAX_ANSWER} bytes"
        return None


def failure(error: BaseException) -> str:
    """Say in words why a request got no answer."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {_reason(error)}"
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return f"no TLS there: {_reason(error)}"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "no host of that name"
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = os.strerror(error.os_error.errno) if error.os_error.errno else error.os_error
        return f"no server there: {reason}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | aiohttp.ClientOSError):
        return "the server closed the connection"
    return str(error) or type(error).__name__


def _reason(error: BaseException) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return str(getattr(inner, "verify_message", "") or getattr(inner, "reason", "") or inner)


def _cure(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "SSL_CERT_FILE=ca.pem names the authority that signed it"
    if isinstance(error, aiohttp.ClientSSLError):
        return "does the server speak http://?"
    return "is the server running, and the URL its own?"


def _said(page: bytes, kind: str) -> str:
    """The sentence of an error's page; HTML is not repeated."""
    if "html" in kind or page.lstrip()[:1] == b"<":
        return "a page of HTML"
    try:
        return error_text(json.loads(page))
    except (ValueError, RecursionError):
        return error_text(page.decode("utf-8", "replace").strip()) or "no reason given"
