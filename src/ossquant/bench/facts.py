"""Facts: what is known about a load beside its requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ossquant.bench.devices import Drawn
from ossquant.bench.tokens import CountTokens
from ossquant.bench.watch import ClientLoad


@dataclass(frozen=True)
class Facts:
    """What is known about a load beside its requests. seconds is the wall time from the first send to the last end.

    output_tokens is what every answer was to have; preamble the tokens that all prompts share; slo the limits in
    seconds by metric; bytes_per_second the devices' bandwidth and bytes_per_token what one stream reads of it.
    """

    shape: Mapping[str, Any]
    seconds: float
    partial: bool = False
    given_up: bool = False
    output_tokens: int | None = None
    preamble: int | None = None
    slo: Mapping[str, float] = field(default_factory=dict)
    tokenizer: CountTokens | None = None
    client: ClientLoad | None = None
    drawn: Drawn | None = None
    usd_per_hour: float | None = None
    roof_tokens_per_second: float | None = None
    splits: bool = True  # whether channels come apart
    why: Mapping[str, str] = field(default_factory=dict)  # why a metric cannot be there, where that is known before
