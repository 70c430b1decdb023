"""Shape: how a load comes, one request after the other or by the clock."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ossquant.errors import UsageError

Kind = Literal["single", "closed", "open", "multi-turn"]
MAX_CONCURRENCY = 4096
MAX_RATE = 10_000  # requests a second


@dataclass(frozen=True)
class Shape:
    """A load shape: streams that wait for answers, or a rate of requests a second; turns of a dialogue."""

    kind: Kind
    concurrency: int = 1
    rate: float | None = None
    turns: int = 1

    @property
    def name(self) -> str:
        """What the scenario is called."""
        return {
            "single": "single",
            "closed": f"concurrency={self.concurrency}",
            "open": f"rate={self.rate:g}" if self.rate else "",
            "multi-turn": f"turns={self.turns} concurrency={self.concurrency}",
        }[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Give the shape as a result has it."""
        shown: dict[Kind, dict[str, Any]] = {
            "single": {},
            "closed": {"concurrency": self.concurrency},
            "open": {"rate": self.rate, "arrivals": "poisson"},
            "multi-turn": {"turns": self.turns, "concurrency": self.concurrency},
        }
        return {"kind": self.kind, **shown[self.kind]}


def make_shapes(concurrencies: Sequence[int], rates: Sequence[float], turns: int) -> list[Shape]:
    """Make the shapes that were asked for; a single stream if none was. Raises UsageError."""
    if not all(1 <= number <= MAX_CONCURRENCY for number in concurrencies):
        raise UsageError(f"a concurrency is a number from 1 to {MAX_CONCURRENCY}")
    if not all(0 < rate <= MAX_RATE for rate in rates):
        raise UsageError(f"a rate is above 0, and at most {MAX_RATE:,} requests a second")
    if turns > 1 and rates:
        raise UsageError("dialogues wait for their answers, so they have no rate", hint="leave out --rate or --turns")
    if turns > 1:
        return [Shape("multi-turn", concurrency=number, turns=turns) for number in concurrencies or [1]]
    closed = [Shape("single") if number == 1 else Shape("closed", concurrency=number) for number in concurrencies]
    opened = [Shape("open", rate=rate) for rate in rates]
    return closed + opened or [Shape("single")]
