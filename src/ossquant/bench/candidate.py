"""Candidate: a checkpoint that is held against a reference, in this process."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ossquant.bench.hidden import Logits, Progress, hidden_states, read_head
from ossquant.bench.measure import measure
from ossquant.bench.text import Text, vocabulary
from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.layout import Role
from ossquant.plan import QUANTIZED
from ossquant.recipe import BUILT_IN
from ossquant.runtime.generate import continue_prompt, sampling
from ossquant.runtime.load import load_model, load_tokenizer

SPEED_PROMPT, SPEED_TOKENS, SPEED_RUNS = 128, 32, 3


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: up to max_new_tokens, or one of stops; temperature 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float
    seed: int
    stops: Sequence[int]


@dataclass(frozen=True)
class Facts:
    """What a candidate is, known before it is loaded. nbytes are those of its tensors."""

    name: str
    kind: str  # checkpoint or gguf
    format: str
    nbytes: int
    parameters: int
    vocab_size: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a parameter."""
        return 8 * self.nbytes / self.parameters


class Candidate(Protocol):
    """A model that has been opened; close gives its memory back."""

    @property
    def facts(self) -> Facts:
        """What it is."""

    def vocabulary(self) -> Mapping[int, str]:
        """Its tokens by id."""

    def load(self, context: int) -> None:
        """Get ready to compute texts and answers of up to context tokens."""

    def answer(self, prompt: Sequence[int], sampled: Sampling) -> list[int]:
        """Continue a prompt; gives the new tokens."""

    def decode_rate(self) -> float:
        """Tokens a second of a single stream."""

    def logits(self, texts: Sequence[Text], progress: Progress | None) -> Iterator[torch.Tensor]:
        """The logits (positions, vocab) where scored tokens are predicted, some at a time; the last thing asked."""

    def close(self) -> None:
        """Give its memory back."""


class CheckpointCandidate:
    """A checkpoint folder or hub id, loaded as it is stored; options are load_model's."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        with open_checkpoint(name) as checkpoint:
            plan = checkpoint.plan
            self.folder: Path = checkpoint.folder
            self.facts = Facts(name, "checkpoint", stored_format(checkpoint), plan.nbytes, plan.parameters,
                               plan.spec.vocab_size)  # fmt: skip
            self._scheme = stored_scheme(checkpoint)
        self._options = options
        self.model: Any = None
        self.tokenizer: Any = None

    def vocabulary(self) -> Mapping[int, str]:
        return vocabulary(load_tokenizer(self.folder))

    def load(self, context: int) -> None:
        if self.model is None:
            self.model, self.tokenizer = load_model(
                self.folder, scheme=self._scheme, max_model_len=context, **self._options
            )

    def answer(self, prompt: Sequence[int], sampled: Sampling) -> list[int]:
        torch.manual_seed(sampled.seed)
        inputs = torch.tensor([list(prompt)], device=self.model.device)
        room = self.model.config.max_position_embeddings - len(prompt)
        output = continue_prompt(
            self.model, inputs, max_new_tokens=max(1, min(room, sampled.max_new_tokens)), cache="auto",
            eos_token_id=list(sampled.stops), logits_processor=LogitsProcessorList([_Finite(self.facts.name)]),
            **sampling(self.model, sampled.temperature),
        )  # fmt: skip
        return output[0, len(prompt) :].tolist()

    def decode_rate(self) -> float:
        measured = measure(self.model, prompt_tokens=SPEED_PROMPT, new_tokens=SPEED_TOKENS, runs=SPEED_RUNS)
        return measured.decode_tokens_per_second

    def hidden(self, texts: Sequence[Text], progress: Progress | None) -> torch.Tensor:
        """Last hidden states (scored, hidden) where scored tokens are predicted."""
        return hidden_states(self.model, texts, self.facts.name, progress)

    def logits(self, texts: Sequence[Text], progress: Progress | None) -> Iterator[torch.Tensor]:
        hidden, dtype, device = self.hidden(texts, progress), self.model.dtype, self.device
        self.close()  # a head and some blocks of logits take its place
        yield from Logits(hidden, self.head(dtype, device)).blocks()

    def head(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Its lm_head (vocab, hidden)."""
        with open_checkpoint(self.folder) as checkpoint:
            return read_head(checkpoint, dtype, device)

    @property
    def device(self) -> torch.device:
        """Where logits are computed: where the model's are, but float64 is not everywhere."""
        device: torch.device = self.model.device
        return device if device.type in ("cuda", "xpu") else torch.device("cpu")

    def close(self) -> None:
        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Finite(LogitsProcessor):
    """Refuses logits that no token can be drawn by."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise not_finite(self._name)
        return scores


def not_finite(name: str) -> CheckpointError:
    """The error for a model that computes NaN or infinity."""
    return CheckpointError(f"{name}: NaN or infinity among its logits", hint=f"ossquant verify {name}")


def stored_scheme(checkpoint: Checkpoint) -> str | None:
    """The scheme by which load_model changes nothing: None for a checkpoint of ours, which says so itself."""
    return None if checkpoint.plan.has_bnb else checkpoint.plan.scheme(Role.EXPERTS).format


def stored_format(checkpoint: Checkpoint) -> str:
    """The built-in scheme that a checkpoint is stored in, or the formats of its experts, attention and head."""
    stored = {role: checkpoint.plan.scheme(role) for role in QUANTIZED}
    for name, recipe in BUILT_IN.items():
        if all(recipe.scheme(role) == scheme for role, scheme in stored.items()):
            return name
    return " ".join(scheme.format for scheme in stored.values())
