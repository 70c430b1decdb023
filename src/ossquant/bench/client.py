"""Client: sends requests to an endpoint and stamps what comes back. It parses nothing while streams run.

Weighed against the openai SDK and others, aiohttp adds the least: 68 ms to the median TTFT at 128 streams where the
SDK adds 478 (2026-11).
"""

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ossquant.bench.endpoint import Endpoint
from ossquant.bench.sse import Piece
from ossquant.bench.trace import Raw, Trace, error_text, now
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
    """A pool of connections to one endpoint; use it as an async context."""

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self.endpoint = endpoint
        self.pieces = 0  # received so far, for whoever shows progress
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=CONNECT_TIMEOUT)

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=self._timeout, headers=self.endpoint.headers, auto_decompress=False
        )
        return self

    async def __aexit__(self, *caught: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> tuple[int, Mapping[str, str], bytes]:
        """Fetch a small page: status, headers, body. Raises EndpointError where no server answers."""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                return response.status, response.headers, await response.content.read(MAX_ANSWER)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise EndpointError(f"{self.endpoint.base}: {failure(error)}", hint=_cure(error)) from error

    async def ask(self, body: Mapping[str, Any], index: int, intended: float | None = None, turn: int = 0) -> Raw:
        """Send one request now and stamp every piece of its answer. A failure is the answer's, and not raised."""
        data = json.dumps(body).encode()
        sent = now()
        blank = Trace(index, sent if intended is None else intended, sent, sent, turn=turn)
        pieces: list[Piece] = []
        status, error = None, None
        try:
            async with self._session.post(
                f"{self.endpoint.base}/chat/completions", data=data, allow_redirects=False
            ) as response:
                status = response.status
                error = await self._receive(response, pieces)
        except (aiohttp.ClientError, OSError, TimeoutError, asyncio.IncompleteReadError) as caught:
            # what was said before the connection broke is kept: it is an answer that was cut short
            error = None if pieces and not isinstance(caught, TimeoutError) else failure(caught)
        return Raw(replace(blank, ended=now(), status=status, error=error), pieces)

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
        return f"no server there: {error.os_error.strerror or error.os_error}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientPayloadError | ConnectionResetError):
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
        return error_text(json.loads(page))[:300]
    except (ValueError, RecursionError):
        return page[:200].decode("utf-8", "replace").strip() or "no reason given"
