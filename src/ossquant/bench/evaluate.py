"""Hold candidates against a reference: each runs over the same tokens, and what it makes likely is compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ossquant.bench.candidate import Candidate, CheckpointCandidate, Facts, not_finite
from ossquant.bench.gguf_candidate import GgufCandidate, gguf_file
from ossquant.bench.hidden import Logits, Progress
from ossquant.bench.quality import Estimate, Scores, join, ratio, score, summarize
from ossquant.bench.reference import Reference
from ossquant.bench.source import Source, Watch, context, sampling_of
from ossquant.bench.text import vocabulary
from ossquant.errors import UsageError
from ossquant.runtime.load import DEFAULT_CONTEXT

_SAME_MODEL = "--against takes another checkpoint of the same model"


@dataclass(frozen=True)
class Answers:
    """What a candidate answered by itself: its mean length over the reference's, and how many were cut off."""

    ratio: Estimate
    count: int
    cut: int


@dataclass(frozen=True)
class Evaluation:
    """A candidate beside the reference; decode_rate in tokens a second, None where it was not asked for."""

    facts: Facts
    quality: Mapping[str, Estimate]
    tokens: int
    texts: int
    answers: Answers | None
    decode_rate: float | None


def open_candidate(name: str, source: Source, options: Mapping[str, Any]) -> Candidate:
    """Open a checkpoint or GGUF file and check that it speaks the reference's tokens. Raises OssquantError."""
    path = gguf_file(name)
    candidate: Candidate
    if path is None:
        candidate = CheckpointCandidate(name, options)
    else:
        candidate = GgufCandidate(name, path, on_host=options.get("device_map") == "cpu")
    expected = source.candidate.facts
    if candidate.facts.vocab_size != expected.vocab_size:
        raise UsageError(
            f"{name} has a vocabulary of {candidate.facts.vocab_size:,}, {expected.name} one of "
            f"{expected.vocab_size:,}", hint=_SAME_MODEL,
        )  # fmt: skip
    _check_vocabulary(name, candidate.vocabulary(), expected.name, vocabulary(source.tokenizer))
    return candidate


def _check_vocabulary(name: str, found: Mapping[int, str], against: str, expected: Mapping[int, str]) -> None:
    for number, token in sorted(expected.items()):
        if found.get(number) != token:
            raise UsageError(
                f"the tokenizers differ: token {number} is {found.get(number)!r} in {name}, {token!r} in {against}",
                hint=_SAME_MODEL,
            )


def evaluate(
    candidates: Sequence[Candidate], source: Source, reference: Reference, watch: Watch
) -> Iterator[Evaluation]:
    """Hold opened candidates against the reference, one after the other; gives each when it is done."""
    settings, texts = source.settings, reference.texts
    units = np.repeat(np.arange(len(texts)), [text.scored for text in texts])
    for candidate in candidates:
        name = candidate.facts.name
        candidate.load(max(DEFAULT_CONTEXT, context(texts, settings.max_new_tokens)))
        try:
            rate = candidate.decode_rate() if settings.speed else None
            answers = _answers(candidate, reference, settings.answers, watch(f"{name} answers"))
            blocks = candidate.logits(texts, watch(f"{name} runs over the texts"))
            scores = _compare(name, blocks, source, reference)
        finally:
            candidate.close()
        yield Evaluation(candidate.facts, summarize(scores, units), len(units), len(texts), answers, rate)


def _compare(name: str, blocks: Iterator[torch.Tensor], source: Source, reference: Reference) -> Scores:
    """Score blocks of logits, as they come, beside the reference's own."""
    scored, base, parts, at = reference.scored, None, [], 0
    for block in blocks:
        if base is None:  # only now, for the candidate's model may have had to go first
            base = Logits(reference.hidden, source.candidate.head(reference.hidden.dtype, block.device))
        end = at + len(block)
        parts.append(
            _score((source.candidate.facts.name, name), base.rows(at, end), block, scored[at:end].to(block.device))
        )
        at = end
    return join(parts)


def _score(names: Sequence[str], reference: torch.Tensor, candidate: torch.Tensor, tokens: torch.Tensor) -> Scores:
    for whose, logits in zip(names, (reference, candidate), strict=True):
        if not logits.isfinite().all():
            raise not_finite(whose)
    return score(reference, candidate, tokens)


def _answers(candidate: Candidate, reference: Reference, most: int, progress: Progress) -> Answers | None:
    """Have a candidate answer the first prompts that the reference answered."""
    asked = reference.answered[:most]
    if not asked:
        return None
    lengths, cut = [], 0
    for number, text in enumerate(asked):
        answer = candidate.answer(text.prompt, sampling_of(reference.request, reference.stops, number))
        lengths.append(float(len(answer)))
        cut += answer[-1] not in reference.stops
        progress(number + 1, len(asked))
    own = np.array([text.scored for text in asked], np.float64)
    return Answers(ratio(np.array(lengths), own), len(asked), cut)
