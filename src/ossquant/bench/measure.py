"""Prefill and decode times and peak memory of a model in this process."""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ossquant.runtime  # noqa: F401  # isort: skip  says which extra is missing, so it comes before torch
import torch

from ossquant.errors import UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.decoder import Cache, decoding
from ossquant.runtime.fixed_cache import CACHE

SEED = 0
now = time.perf_counter

# runs done, of how many
OnRun = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """One prompt prefilled and decoded: when it began, and when the host had each token; seconds."""

    started: float
    tokens_at: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Seconds from the call to the first token."""
        return self.tokens_at[0] - self.started

    @property
    def decode(self) -> float:
        """Seconds of all tokens after the first."""
        return self.tokens_at[-1] - self.tokens_at[0]


@dataclass(frozen=True)
class Measurement:
    """Medians over the runs. ttft in seconds, rates in tokens a second, memory in bytes. partial: Ctrl-C ended it."""

    prompt_tokens: int
    new_tokens: int
    runs: tuple[Run, ...]
    device: str
    peak_host_bytes: int
    peak_device_bytes: int | None  # None where the model runs on the host
    partial: bool = False

    @property
    def ttft(self) -> float:
        """Seconds from the call to the first token."""
        return statistics.median(run.ttft for run in self.runs)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens by the time to the first token."""
        return self.prompt_tokens / self.ttft

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, by the time they took: one over TPOT."""
        return statistics.median((self.new_tokens - 1) / run.decode for run in self.runs)


def measure(
    model: Any,
    *,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    warm_up: int = 1,
    seed: int = SEED,
    cache: Cache = "auto",
    on_run: OnRun = lambda done, total: None,
) -> Measurement:
    """Run a seeded random prompt several times, in chunks as `run` does, after warm_up uncounted runs.

    Ctrl-C keeps the runs that are done, if there are any. Raises UsageError.
    """
    if prompt_tokens < 1 or new_tokens < 2 or runs < 1 or warm_up < 0:
        raise UsageError("a measurement takes at least 1 prompt token, 2 new tokens and 1 run")
    longest = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > longest:
        raise UsageError(f"{prompt_tokens} + {new_tokens} tokens are beyond the model's context of {longest}")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    for _ in range(warm_up):
        _run(model, prompt, new_tokens, cache)
    counted: list[Run] = []
    try:
        while len(counted) < runs:
            on_run(len(counted), runs)
            counted.append(_run(model, prompt, new_tokens, cache))
    except KeyboardInterrupt:
        if not counted:
            raise
    on_device = model.device.type == "cuda"
    return Measurement(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        runs=tuple(counted),
        device=torch.cuda.get_device_name(model.device) if on_device else "cpu",
        peak_host_bytes=_peak_host_bytes(),
        peak_device_bytes=_peak_device_bytes() if on_device else None,
        partial=len(counted) < runs,
    )


@torch.inference_mode()
def _run(model: Any, prompt: torch.Tensor, new_tokens: int, cache: Cache) -> Run:
    _wait(model)
    started = now()
    prompt_tokens = prompt.shape[1]
    with decoding(model, prompt_tokens, prompt_tokens + new_tokens, cache) as past:
        for chunk in prompt.split(PREFILL_CHUNK, dim=1):
            output = model(chunk, use_cache=True, logits_to_keep=1, **{CACHE: past})
            past = output[CACHE]
        token = _next(output)
        tokens_at = [now()]
        for _ in range(new_tokens - 1):
            output = model(token, use_cache=True, **{CACHE: past})
            token = _next(output)
            tokens_at.append(now())
    return Run(started, tuple(tokens_at))


def _next(output: Any) -> torch.Tensor:
    token = output.logits[:, -1:].argmax(dim=-1)
    token.tolist()  # a token is there when the host has it
    return token


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _peak_device_bytes() -> int:
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def _peak_host_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
