"""Server: what an endpoint turned out to be and to understand; probed before anything is timed."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ossquant.bench.client import Client
from ossquant.bench.engine import find_engine, served_models
from ossquant.bench.prompts import Message, filler
from ossquant.bench.trace import Trace, Usage
from ossquant.errors import EndpointError, UsageError

# what we would like to send, in the order in which it is given up if a refusal does not name the culprit
OPTIONAL = (
    "timings_per_token", "continuous_usage_stats", "min_tokens", "ignore_eos", "reasoning_effort", "seed",
    "stream_options",
)  # fmt: skip
SAMPLE_WORDS = 200
NO_VISIBLE = 64  # tokens to the end of a short answer, hidden ones included
_REFUSALS = (400, 422)


@dataclass(frozen=True)
class Wanted:
    """What a run will ask of the server; output_tokens of every answer, None of an optional thing leaves it out."""

    model: str | None
    output_tokens: int
    reasoning_effort: str | None = None
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True)
class Server:
    """A probed server. accepted are the OPTIONAL ones that it takes; notes say what was adapted to it.

    preamble is the prompt's tokens beside the text that is sent, tokens_per_word of the corpus, None if not counted.
    fields are the names of its reasoning; splits whether harmony's channels come apart; details what it says of
    itself.
    """

    model: str
    engine: str
    accepted: tuple[str, ...]
    usage: bool
    continuous_usage: bool
    fields: tuple[str, ...]
    splits: bool
    preamble: int | None
    tokens_per_word: float | None
    notes: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    def body(self, messages: Sequence[Message], wanted: Wanted) -> dict[str, Any]:
        """Make a request of all that the server takes."""
        return request_body(self.model, messages, wanted, self.accepted)


def request_body(model: str, messages: Sequence[Message], wanted: Wanted, accepted: Sequence[str]) -> dict[str, Any]:
    """Make a request with the accepted ones of OPTIONAL."""
    optional: dict[str, Any] = {
        "timings_per_token": True,
        "min_tokens": wanted.output_tokens,
        "ignore_eos": True,
        "reasoning_effort": wanted.reasoning_effort,
        "seed": wanted.seed,
        "stream_options": {"include_usage": True}
        | ({"continuous_usage_stats": True} if "continuous_usage_stats" in accepted else {}),
    }
    return {
        "model": model,
        "messages": list(messages),
        "stream": True,
        "max_tokens": wanted.output_tokens,
        **{name: value for name, value in optional.items() if name in accepted},
    }


async def probe(client: Client, wanted: Wanted) -> Server:
    """Ask the server what it is, then two questions. Raises EndpointError; UsageError where a model is to be named."""
    listed = await served_models(client, named=wanted.model is not None)
    model = wanted.model or _only(listed)
    engine, details = await find_engine(client, listed)
    accepted = [name for name in OPTIONAL if _is_wanted(name, wanted, engine)]
    short = replace(wanted, output_tokens=NO_VISIBLE)
    first, accepted, refused = await _negotiate(client, model, listed, short, accepted)
    words = filler(SAMPLE_WORDS)
    sample, accepted, also_refused = await _negotiate(client, model, listed, wanted, accepted, words)
    return Server(
        model=model,
        engine=engine,
        accepted=tuple(accepted),
        usage=sample.usage.completion is not None,
        continuous_usage=sample.first_tokens is not None,
        fields=tuple(sorted(first.fields | sample.fields)),
        splits=_splits(first) and _splits(sample),
        preamble=first.usage.prompt,
        tokens_per_word=_tokens_per_word(first.usage, sample.usage),
        notes=tuple(_notes(engine, [*refused, *also_refused], first, sample)),
        details=details,
    )


def _is_wanted(name: str, wanted: Wanted, engine: str) -> bool:
    if name == "timings_per_token":  # how llama.cpp tells its tokens with each chunk
        return engine == "llama.cpp"
    if name == "reasoning_effort":
        return wanted.reasoning_effort is not None
    return wanted.ignore_eos or name not in ("ignore_eos", "min_tokens")


async def _negotiate(
    client: Client, model: str, listed: Iterable[str], wanted: Wanted, accepted: list[str], text: str = "Hello."
) -> tuple[Trace, list[str], list[str]]:
    """Ask with less and less until it is answered: the answer, what was accepted, what was not."""
    messages: list[Message] = [{"role": "user", "content": text}]
    refused: list[str] = []
    while True:
        trace = (await client.ask(request_body(model, messages, wanted, accepted), 0)).trace()
        if trace.error is None:
            return trace, accepted, refused
        culprits = _culprits(trace, accepted)
        if not culprits:
            raise _failed(client, model, listed, trace)
        refused += culprits
        accepted = [name for name in accepted if name not in culprits]


def _culprits(trace: Trace, accepted: Sequence[str]) -> list[str]:
    """Which of the optional ones a refusal is about: those that it names, else the first to be given up."""
    if trace.status not in _REFUSALS and not (trace.error or "").startswith("an error in the stream"):
        return []
    named = [name for name in accepted if re.search(rf"\b{name}\b", trace.error or "")]
    return named or list(accepted[:1])


def _failed(client: Client, model: str, listed: Iterable[str], trace: Trace) -> EndpointError:
    base = client.endpoint.base
    if trace.status in (401, 403):
        return EndpointError(f"{base} refuses the key: {trace.error}", hint="--api-key-env NAME gives it one")
    if trace.status == 404:
        served = f"it serves {', '.join(list(listed)[:5])}" if listed else "does the URL end before /chat/completions?"
        return EndpointError(f"{base} does not serve '{model}': {trace.error}", hint=served)
    return EndpointError(f"{base} answers with {trace.error}", hint="what does its log say?")


def _only(listed: Mapping[str, str]) -> str:
    if len(listed) == 1:
        return next(iter(listed))
    served = f"it serves {', '.join(list(listed)[:5])}" if listed else "it lists none"
    raise UsageError("which model is to be measured is not clear", hint=f"say --model; {served}")


def _splits(trace: Trace) -> bool:
    """Whether what is said to be final is not a whole reply with its channels' names in it."""
    text = trace.text("final")
    return not text.startswith(("analysis", "commentary")) and "<|channel|>" not in text


def _tokens_per_word(first: Usage, sample: Usage) -> float | None:
    if first.prompt is None or sample.prompt is None or sample.prompt <= first.prompt:
        return None
    return (sample.prompt - first.prompt) / SAMPLE_WORDS


def _notes(engine: str, refused: Sequence[str], first: Trace, sample: Trace) -> list[str]:
    usage = sample.usage
    notes = [f"refuses {', '.join(refused)}: left out"] if refused else []
    names = sorted(first.fields | sample.fields)
    notes.append(f"streams its reasoning as {' and '.join(names)}" if names else "no reasoning seen in its streams")
    if not (_splits(first) and _splits(sample)):
        notes.append("does not take harmony's channels apart: TTFA is not known")
    if usage.completion is None:
        notes.append("gives no usage in streams: tokens are not known without --tokenizer")
    elif sample.went_on_unseen:
        notes.append("writes on unseen past harmony's end: --ignore-eos makes no result here")
    if usage.completion is not None and sample.first_tokens is None:
        notes.append("gives usage at the end of streams: the first chunk is taken for 1 token")
    if usage.prompt is not None and usage.cached is None:
        notes.append("does not say how much of a prompt was cached: a warm cache would not be seen")
    return notes
