"""Server-sent events, cut out of what a socket brought, each with the time at which its last byte came."""

from collections.abc import Iterable
from dataclasses import dataclass

# time of receipt and the bytes that came
Piece = tuple[float, bytes]


@dataclass(frozen=True)
class Event:
    """The data of one event, and when it was whole."""

    at: float
    data: bytes


def events(pieces: Iterable[Piece]) -> list[Event]:
    """Cut pieces into events. Lines end with LF or CRLF; comments and other fields are skipped.

    What a cut connection leaves without its empty line is an event, too, if it has data: some servers end that way.
    Source: the HTML standard's event streams.
    """
    found: list[Event] = []
    lines: list[bytes] = []
    rest, at = b"", 0.0
    for at, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            line = line.removesuffix(b"\r")
            if line:
                lines.append(line)
            else:
                _close(found, lines, at)
    if rest:
        lines.append(rest)
    _close(found, lines, at)
    return found


def _close(found: list[Event], lines: list[bytes], at: float) -> None:
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    lines.clear()
    if data:
        found.append(Event(at, b"\n".join(data)))
