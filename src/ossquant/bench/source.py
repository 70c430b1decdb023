"""Source: the checkpoint that candidates are held against, and how its reference run is made or found again."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossquant.bench.candidate import CheckpointCandidate, Sampling
from ossquant.bench.hidden import Progress
from ossquant.bench.reference import Reference, Request, load_reference, save_reference
from ossquant.bench.text import (
    PROMPTS,
    Text,
    answered_text,
    conversations,
    packaged_prompts,
    read_text,
    vocabulary,
    windows,
)
from ossquant.checkpoint.fingerprint import fingerprint
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import UsageError
from ossquant.runtime.generate import encode, stop_tokens
from ossquant.runtime.load import DEFAULT_CONTEXT, load_tokenizer

FEWEST_TOKENS = 100  # scored; llama-perplexity gives no statistics on fewer

# what is being done, and a callback for how far it has come
Watch = Callable[[str], Progress]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How to compare. text None takes the packaged prompts; reference None keeps the run in the user's cache."""

    text: Path | None = None
    reference: Path | None = None
    prompts: int = 48
    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 0
    reasoning_effort: str = "medium"
    window: int = 512
    answers: int = 16
    speed: bool = True


class Source:
    """The checkpoint to hold against, opened; its model is loaded only where no reference run is kept."""

    def __init__(self, name: str, settings: Settings, options: Mapping[str, Any]) -> None:
        self.candidate = CheckpointCandidate(name, options)
        self.settings = settings
        self.tokenizer = load_tokenizer(self.candidate.folder)
        self.raw = packaged_prompts() if settings.text is None else read_text(settings.text)
        dtype = str(options.get("dtype", "auto"))
        with open_checkpoint(self.candidate.folder) as checkpoint:
            self.hidden_size = checkpoint.spec.hidden_size
            self.request = self._request(fingerprint(checkpoint), "bfloat16" if dtype == "auto" else dtype)

    def _request(self, checkpoint: str, dtype: str) -> Request:
        settings, text = self.settings, self.settings.text
        kind = "plain" if text is not None and text.suffix != ".jsonl" else "conversations"
        plain = kind == "plain"
        return Request(
            checkpoint=checkpoint,
            tokenizer=_tokenizer_hash(self.tokenizer),
            dtype=dtype,
            kind=kind,
            text=hashlib.sha256(self.raw).hexdigest(),
            prompts=0 if plain else settings.prompts,
            max_new_tokens=0 if plain else settings.max_new_tokens,
            temperature=0.0 if plain else settings.temperature,
            seed=0 if plain or not settings.temperature else settings.seed,
            reasoning_effort="" if plain else settings.reasoning_effort,
            window=settings.window if plain else 0,
        )

    @property
    def folder(self) -> Path:
        """Where the reference run is kept: where it was asked for, or in the user's cache by what it depends on."""
        if self.settings.reference is not None:
            return self.settings.reference
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "ossquant" / "references" / hashlib.sha256(repr(self.request).encode()).hexdigest()[:20]

    def reference(self, say: Say, watch: Watch) -> Reference:
        """Read the reference run, or make it and keep it. Raises UsageError, CheckpointError."""
        facts = self.candidate.facts
        kept = load_reference(self.folder, self.request, facts.vocab_size, self.hidden_size)
        if kept is not None:
            say(f"reference: kept in {self.folder}, made on {kept.device}")
            return kept
        say(f"reference: {facts.name} runs; what it says is kept in {self.folder}")
        made = self._run(watch)
        save_reference(self.folder, made)
        return made

    def _run(self, watch: Watch) -> Reference:
        plain = windows(self.tokenizer, self.raw, self.settings.window, self._text_name) if self._plain else None
        self.candidate.load(self._context(plain))
        model = self.candidate.model
        stops = stop_tokens(model, self.tokenizer)
        texts = plain or self._conversations(stops, watch("the reference answers"))
        _check_length(texts)
        hidden = self.candidate.hidden(texts, watch("the reference's hidden states"))
        device = model.device.type
        self.candidate.close()
        return Reference(self.request, self.candidate.facts.name, device, tuple(stops), tuple(texts), hidden)

    @property
    def _plain(self) -> bool:
        return self.request.kind == "plain"

    @property
    def _text_name(self) -> str:
        return PROMPTS if self.settings.text is None else str(self.settings.text)

    def _context(self, plain: Sequence[Text] | None) -> int:
        return context(plain) if plain else DEFAULT_CONTEXT

    def _conversations(self, stops: Sequence[int], progress: Progress) -> list[Text]:
        """Conversations that end with the assistant as they are, the others with an answer of the reference's."""
        settings = self.settings
        texts = []
        asked = conversations(self.raw, self._text_name)[: settings.prompts]
        for number, messages in enumerate(asked, 1):
            where = f"{self._text_name}, conversation {number}"
            if messages[-1]["role"] == "assistant":
                texts.append(answered_text(self.tokenizer, messages, settings.reasoning_effort, where))
            else:
                ids = encode(self.tokenizer, [*map(dict, messages)], settings.reasoning_effort, answer=True)
                prompt = ids[0].tolist()
                answer = self.candidate.answer(prompt, sampling_of(self.request, stops, number - 1))
                texts.append(Text((*prompt, *answer), len(prompt), answered=True))
            progress(number, len(asked))
        return texts


def sampling_of(request: Request, stops: Sequence[int], number: int) -> Sampling:
    """How the prompt of a number is answered, by the reference and by candidates."""
    return Sampling(request.max_new_tokens, request.temperature, request.seed + number, stops)


def context(texts: Sequence[Text], new_tokens: int = 0) -> int:
    """How many tokens a model must have room for."""
    return max(len(text.token_ids) for text in texts) + new_tokens


def _check_length(texts: Sequence[Text]) -> None:
    scored = sum(text.scored for text in texts)
    if scored < FEWEST_TOKENS:
        raise UsageError(
            f"{scored} scored tokens are too few for statistics, which take {FEWEST_TOKENS}",
            hint="more or longer texts; more --prompts or --max-new-tokens",
        )


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and chat template."""
    table = sorted(vocabulary(tokenizer).items())
    return hashlib.sha256(repr((table, tokenizer.chat_template)).encode()).hexdigest()
