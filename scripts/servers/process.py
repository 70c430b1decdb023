"""A server in a process of its own on loopback: started on a free port, waited for, asked, and stopped."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import psutil

from servers.case import Fault, environment

LOOPBACK = "127.0.0.1"
STARTING = 120.0  # seconds
ANSWER = 120.0  # seconds for one request
ENDING = 15.0  # seconds to end when asked to
LOG_LINES = 25

_direct = build_opener(ProxyHandler({}))  # a proxy has no business between this machine and itself


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def get(self, path: str) -> int:
        """The HTTP status of a page, 0 if nobody listens."""
        try:
            with _direct.open(self.url + path, timeout=ANSWER) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except (URLError, ConnectionError, TimeoutError):
            return 0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask and take the whole answer."""
        answer: dict[str, Any] = json.loads(b"".join(self._lines(path, body)))
        return answer

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Ask and take the answer event by event; [DONE] is an empty one."""
        for line in self._lines(path, body | {"stream": True, "stream_options": {"include_usage": True}}):
            kind, _, data = line.strip().decode().partition(": ")
            if kind == "error":
                raise Fault(f"{path}: {data}")
            if kind == "data":
                yield {} if data == "[DONE]" else json.loads(data)

    def _lines(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
        try:
            with _direct.open(request, timeout=ANSWER) as answer:
                yield from answer
        except HTTPError as error:
            raise Fault(f"{path}: {error.code} {error.read().decode(errors='replace')[:500]}") from error
        except (URLError, ConnectionError, TimeoutError) as error:
            raise Fault(f"{path}: {error}") from error


@contextmanager
def serving(
    command: Callable[[int], Sequence[object]], log: Path, ready: str = "/health", limit: float = STARTING,
    **variables: str,
) -> Iterator[Server]:  # fmt: skip
    """Start a server and yield it once it is ready; a Fault carries the last lines of its log."""
    port = free_port()
    with log.open("w") as said:
        process = subprocess.Popen(
            [str(word) for word in command(port)], stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            env=environment(**variables), cwd=log.parent, start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://{LOOPBACK}:{port}", log)
    try:
        _wait(server, process, ready, limit)
        _only_loopback(process)
        yield server
    except Fault as fault:
        raise Fault(f"{fault}\n{_tail(log)}") from fault
    finally:
        _stop(process)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _wait(server: Server, process: subprocess.Popen[bytes], ready: str, limit: float) -> None:
    deadline = time.monotonic() + limit
    while server.get(ready) != 200:
        if process.poll() is not None:
            raise Fault(f"it ended with {process.returncode} before it was ready")
        if time.monotonic() > deadline:
            raise Fault(f"not ready in {limit:.0f} s")
        time.sleep(0.2)


def _only_loopback(process: subprocess.Popen[bytes]) -> None:
    """A server that listens beyond this machine is a fault."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    sockets = [connection for member in family for connection in member.net_connections("tcp")]
    addresses = {connection.laddr.ip for connection in sockets if connection.status == psutil.CONN_LISTEN}
    if beyond := addresses - {LOOPBACK, "::1"}:
        raise Fault(f"it listens on {', '.join(sorted(beyond))}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # its session is named after it, and may be over
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *(f"  | {line[:300]}" for line in lines[-LOG_LINES:])])
