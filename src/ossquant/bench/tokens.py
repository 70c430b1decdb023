"""Counts: how many tokens requests took, who counted them, and whether two who counted agree."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossquant.bench.result import Source
from ossquant.bench.trace import HIDDEN, Trace
from ossquant.errors import MissingExtraError, UsageError

CountTokens = Callable[[str], int]
HIDDEN_SHARE = 0.10
# share of answers that may be odd: a model may write in a channel that is not shown, a server stand still at the end
ODD_ANSWERS = 0.10


@dataclass(frozen=True)
class Counted:
    """The tokens of answered requests, in their order; None where nobody knows."""

    output: tuple[int, ...] | None
    input: tuple[int, ...] | None
    source: Source
    visible: tuple[int, ...] | None  # by our tokenizer
    problems: tuple[str, ...]


def count_tokens(traces: Sequence[Trace], tokenizer: CountTokens | None) -> Counted:
    """Count by the server's usage; by a tokenizer where it gives none, and beside it to see whether both agree."""
    used = [trace.usage.completion for trace in traces]
    known = [count for count in used if count is not None]
    visible = None if tokenizer is None else tuple(_visible(trace, tokenizer) for trace in traces)
    prompts = [trace.usage.prompt for trace in traces]
    told = tuple(count for count in prompts if count is not None)
    return Counted(
        output=tuple(known) if len(known) == len(traces) else visible,
        input=told if len(told) == len(traces) else None,
        source="usage" if len(known) == len(traces) else "tokenizer",
        visible=visible,
        problems=tuple(_problems(traces, len(known), visible)),
    )


def load_tokenizer(path: str) -> CountTokens:
    """Load tokenizer.json, or the one in a folder. Raises UsageError, MissingExtraError."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--tokenizer needs '{error.name}', which is not installed", hint="pip install 'ossquant[run]'"
        ) from error
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"{file} is not there", hint="--tokenizer takes a tokenizer.json, or its folder")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(f"{file} is no tokenizer: {error}", hint="--tokenizer takes a tokenizer.json") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _visible(trace: Trace, tokenizer: CountTokens) -> int:
    return tokenizer(trace.text("reasoning")) + tokenizer(trace.text("final"))


def _problems(traces: Sequence[Trace], known: int, visible: Sequence[int] | None) -> list[str]:
    problems = []
    if 0 < known < len(traces):
        problems.append(f"{len(traces) - known} of {len(traces)} answers came without usage")
    if visible is not None:
        pairs = [(trace.usage.completion, seen) for trace, seen in zip(traces, visible, strict=True)]
        off = [(used, seen) for used, seen in pairs if used is not None and not _agree(used, seen)]
        if len(off) > ODD_ANSWERS * len(traces):
            used, seen = off[0]
            problems.append(
                f"counts disagree in {len(off)} of {len(traces)} answers: usage says {used}, the tokenizer {seen}"
            )
    unseen = sum(trace.went_on_unseen for trace in traces)
    if unseen > ODD_ANSWERS * len(traces):
        problems.append(f"{unseen} of {len(traces)} answers went on unseen, past their end: their tokens are no text")
    cut = [trace for trace in traces if trace.usage.prompt is not None and trace.usage.prompt < trace.sent_words]
    if cut:
        problems.append(
            f"the server cut {len(cut)} of {len(traces)} prompts: {cut[0].usage.prompt} tokens of "
            f"{cut[0].sent_words} words"
        )
    return problems


def _agree(used: int, visible: int) -> bool:
    """Whether what is visible, with the tokens of harmony that are not, makes up what the server counts."""
    spare = max(HIDDEN, HIDDEN_SHARE * used)
    return -HIDDEN_SHARE * used - 1 <= used - visible <= spare


def describe_counts(traces: Sequence[Trace], counted: Counted, splits: bool) -> dict[str, Any]:
    """Say where the counts come from, and what hides in them."""
    cached = [trace.usage.cached for trace in traces if trace.usage.cached is not None]
    at_first = [trace.first_tokens for trace in traces if trace.first_tokens is not None]
    reasons = [trace.finish_reason or "none" for trace in traces]
    return {
        "output": counted.source if counted.output else None,
        "input": "usage" if counted.input else None,
        "input_tokens": _range(counted.input),
        "output_tokens": _range(counted.output),
        "first_chunk_tokens": {"source": "usage" if at_first else "taken for 1", "median": _median(at_first or [1])},
        "chunks": sum(len(trace.chunks) for trace in traces),
        "hidden_tokens": _hidden(counted),
        "reasoning": _reasoning(traces, counted) if splits else None,
        "cached_tokens": _range(cached),
        "finish_reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


def _hidden(counted: Counted) -> dict[str, Any] | None:
    """Harmony's tokens, which are written but not seen."""
    if counted.visible is None or counted.output is None or counted.source != "usage":
        return None
    return _range([used - seen for used, seen in zip(counted.output, counted.visible, strict=True)])


def _reasoning(traces: Sequence[Trace], counted: Counted) -> dict[str, Any]:
    """The share of reasoning in what was written: by usage, or else by characters."""
    told = [trace.usage.reasoning for trace in traces if trace.usage.reasoning is not None]
    if told and len(told) == len(traces) and counted.output and counted.source == "usage":
        return {"share": sum(told) / max(1, sum(counted.output)), "source": "usage"}
    thought = sum(len(trace.text("reasoning")) for trace in traces)
    said = sum(len(trace.text("final")) for trace in traces)
    return {"share": thought / max(1, thought + said), "source": "characters"}


def _range(counts: Sequence[int] | None) -> dict[str, Any] | None:
    if not counts:
        return None
    return {"total": sum(counts), "min": min(counts), "median": _median(counts), "max": max(counts)}


def _median(counts: Sequence[int]) -> float:
    return statistics.median(counts)
