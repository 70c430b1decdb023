"""Records: one JSON line a request, and result.json beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ossquant.bench.asked import Measured
from ossquant.bench.trace import Trace
from ossquant.errors import UsageError
from ossquant.files import write_whole

RESULT, REQUESTS = "result.json", "requests.jsonl"


def write_output(folder: Path, measured: Measured, *, text: bool) -> None:
    """Write both files into a folder; each is there whole or not at all. Raises UsageError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / REQUESTS, _lines(measured.traces, text))
        write_whole(folder / RESULT, json.dumps(measured.result.to_json(), indent=1).encode() + b"\n")
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}", hint="--output takes a folder you may write to") from error


def _lines(traces: Mapping[str, Sequence[Trace]], text: bool) -> bytes:
    rows = (json.dumps(record(name, trace, each[0].intended, text)) for name, each in traces.items() for trace in each)
    return "".join(f"{row}\n" for row in rows).encode()


def record(scenario: str, trace: Trace, began: float, text: bool) -> dict[str, Any]:
    """Describe a request; times are seconds since began. text adds what was asked and answered."""
    said = {"messages": list(trace.messages), "reasoning": trace.text("reasoning"), "final": trace.text("final")}
    return {
        "scenario": scenario,
        "index": trace.index,
        "turn": trace.turn,
        "status": "ok" if trace.ok else "failed" if trace.error is not None else "truncated",
        "http_status": trace.status,
        "error": trace.error,
        "finish_reason": trace.finish_reason,
        "intended": trace.intended - began,
        "sent": trace.sent - began,
        "ended": trace.ended - began,
        "ttft": trace.ttft if trace.chunks else None,
        "ttfa": trace.ttfa,
        "e2e": trace.e2e if trace.chunks else None,
        "input_tokens": trace.usage.prompt,
        "cached_tokens": trace.usage.cached,
        "output_tokens": trace.usage.completion,
        "reasoning_tokens": trace.usage.reasoning,
        "chunks": [
            {"at": chunk.at - began, "channel": chunk.channel, "characters": len(chunk.text), "tokens": chunk.tokens}
            for chunk in trace.chunks
        ],
        **(said if text else {}),
    }
