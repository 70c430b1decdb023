"""Whether a load is a result: the reasons why it is none."""

from collections import Counter
from collections.abc import Sequence

from ossquant.bench.facts import Facts
from ossquant.bench.tokens import Counted
from ossquant.bench.trace import Trace

CACHE_BLOCK = 16  # prompts are cached in blocks of so many tokens, in vLLM by default


def ran_out(trace: Trace, facts: Facts) -> bool:
    """Whether the context ended before the answer that was asked for did."""
    got, asked = trace.usage.completion, facts.output_tokens
    return trace.finish_reason == "length" and got is not None and asked is not None and got < asked


def invalid_reasons(
    traces: Sequence[Trace], answered: Sequence[Trace], truncated: Sequence[Trace], counted: Counted, facts: Facts
) -> list[str]:
    """Why this is no result."""
    said = []
    if errors := [trace.error for trace in traces if trace.error is not None]:
        said.append(f"{len(errors)} of {len(traces)} requests failed: {Counter(errors).most_common(1)[0][0]}")
    if facts.given_up:
        said.append("given up, as one request after the other failed")
    if truncated:
        said.append(f"{len(truncated)} of {len(traces)} answers were cut short")
    if not answered:
        said.append("no request was answered")
    said += counted.problems
    if warm := _warm(answered, facts):
        said.append(warm)
    if facts.client and facts.client.saturated:
        said.append(facts.client.saturated)
    return said


def _warm(answered: Sequence[Trace], facts: Facts) -> str | None:
    """Whether prompts were cached that were to be new: more of them than all prompts share."""
    if facts.preamble is None:
        return None
    spare = facts.preamble + CACHE_BLOCK
    warm = [trace.usage.cached for trace in answered if trace.turn == 0 and (trace.usage.cached or 0) > spare]
    if not warm:
        return None
    return f"the cache was warm: {warm[0]} tokens of a prompt were cached, of which {facts.preamble} are common to all"
