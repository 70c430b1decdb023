"""Asked: what is to be measured; and Measured, what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ossquant.bench.prompts import Source
from ossquant.bench.result import Result
from ossquant.bench.shape import Shape
from ossquant.bench.tokens import CountTokens
from ossquant.bench.trace import Trace
from ossquant.errors import UsageError


@dataclass(frozen=True)
class Asked:
    """What is to be measured. requests is by scenario, None for a number that suits the shape; seconds ends sending."""

    shapes: Sequence[Shape]
    requests: int | None = None
    prompt_tokens: int = 128
    output_tokens: int = 64
    source: Source = "corpus"
    dataset: Path | None = None
    seed: int = 0
    warm_up: int = 1
    timeout: float = 600.0
    seconds: float = 3600.0
    model: str | None = None
    reasoning_effort: str | None = None
    ignore_eos: bool = False
    slo: Mapping[str, float] = field(default_factory=dict)
    tokenizer: CountTokens | None = None
    gpu: str | None = None
    usd_per_hour: float | None = None
    format: str | None = None

    def __post_init__(self) -> None:
        least = {
            "--requests": (self.requests, 1),
            "--prompt-tokens": (self.prompt_tokens, 1),
            "--new-tokens": (self.output_tokens, 2),
            "--warm-up": (self.warm_up, 0),
        }
        for option, (value, low) in least.items():
            if value is not None and value < low:
                raise UsageError(f"{option} must be at least {low}")
        if self.timeout <= 0 or self.seconds <= 0:
            raise UsageError("--timeout and --seconds must be above 0")

    def dialogues(self, shape: Shape) -> int:
        """How many dialogues a scenario holds."""
        suitable = {"single": 8, "closed": 4 * shape.concurrency, "open": 32, "multi-turn": 2 * shape.concurrency}
        return self.requests or max(8, suitable[shape.kind])


@dataclass(frozen=True)
class Measured:
    """A result, and the requests behind each scenario."""

    result: Result
    traces: Mapping[str, Sequence[Trace]]
