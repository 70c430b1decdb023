"""Scenario: what the requests of one load shape amount to, and whether that is a result."""

from collections.abc import Mapping, Sequence
from typing import Any

from ossquant.bench.devices import Drawn
from ossquant.bench.facts import Facts
from ossquant.bench.result import Metric, Requests, Scenario
from ossquant.bench.spread import figure, spread
from ossquant.bench.tokens import Counted, count_tokens, describe_counts
from ossquant.bench.trace import Trace
from ossquant.bench.verdict import invalid_reasons, ran_out


def make_scenario(name: str, traces: Sequence[Trace], facts: Facts) -> Scenario:
    """Sum up the requests of a load, and judge whether it is a result."""
    answered = [trace for trace in traces if trace.ok and not ran_out(trace, facts)]
    truncated = [trace for trace in traces if trace.error is None and trace not in answered]
    counted = count_tokens(answered, facts.tokenizer)
    metrics = _metrics(answered, counted, facts) if answered else {}
    invalid = invalid_reasons(traces, answered, truncated, counted, facts)
    counts = describe_counts(answered, counted, facts.splits)
    if facts.client:
        counts["client"] = {"lag_p95": facts.client.lag, "cpu_share": facts.client.cpu_share}
    return Scenario(
        name=name,
        shape=facts.shape,
        valid=not invalid,
        invalid=tuple(invalid),
        partial=facts.partial,
        requests=Requests(len(traces), len(answered), sum(t.error is not None for t in traces), len(truncated)),
        seconds=facts.seconds,
        metrics=metrics,
        counts=counts | _turns(answered, facts),
        unmeasured=_unmeasured(metrics, counted, facts),
    )


def _metrics(answered: Sequence[Trace], counted: Counted, facts: Facts) -> dict[str, Metric]:
    many = _latencies(answered, counted, facts.splits)
    metrics = {name: spread(name, values, len(answered), source) for name, (values, source) in many.items() if values}
    return metrics | _rates(answered, counted, facts) | _costs(metrics, counted, facts)


def _latencies(answered: Sequence[Trace], counted: Counted, splits: bool) -> dict[str, tuple[list[float], Any]]:
    """The values of each metric that every request has its own of."""
    outputs = counted.output or ()
    tpots = [t.tpot(output) for t, output in zip(answered, outputs, strict=True)] if outputs else []
    known = [tpot for tpot in tpots if tpot]
    delays = [trace.sent - trace.intended for trace in answered]
    return {
        "ttft": ([trace.ttft for trace in answered], "client"),
        "ttfa": ([trace.ttfa for trace in answered if trace.ttfa is not None and splits], "client"),
        "tpot": (known, counted.source),
        "icl": ([gap for trace in answered for gap in trace.gaps], "client"),
        "e2e": ([trace.e2e for trace in answered], "client"),
        "queue_delay": (delays if any(delays) else [], "client"),
        "tokens_per_second_per_user": ([1 / tpot for tpot in known], counted.source),
    }


def _rates(answered: Sequence[Trace], counted: Counted, facts: Facts) -> dict[str, Metric]:
    """Work by wall time."""
    rates = {
        "requests_per_second": figure("requests_per_second", len(answered) / facts.seconds, len(answered), "client")
    }
    sums = {"output": counted.output and sum(counted.output), "input": counted.input and sum(counted.input)}
    if None not in sums.values():
        sums["total"] = sum(value or 0 for value in sums.values())
    for what, tokens in sums.items():
        if tokens:
            name = f"{what}_tokens_per_second"
            source = "usage" if what == "input" else counted.source
            rates[name] = figure(name, tokens / facts.seconds, len(answered), source)
    if facts.slo:
        good = sum(_meets(trace, counted, place, facts) for place, trace in enumerate(answered))
        rates["goodput"] = figure("goodput", good / facts.seconds, len(answered), "client")
    return rates


def _meets(trace: Trace, counted: Counted, place: int, facts: Facts) -> bool:
    tpot = trace.tpot(counted.output[place]) if counted.output else None
    values = {"ttft": trace.ttft, "ttfa": trace.ttfa, "tpot": tpot, "e2e": trace.e2e}
    measured = {name: values[name] for name in facts.slo}
    return all(value is not None and value <= facts.slo[name] for name, value in measured.items())


def _costs(metrics: Mapping[str, Metric], counted: Counted, facts: Facts) -> dict[str, Metric]:
    """What devices, watts and rent come to."""
    drawn = facts.drawn or Drawn(None, None, None)
    tokens = sum(counted.output or ())
    values = {
        "peak_device_bytes": drawn.device_bytes,
        "peak_host_bytes": drawn.host_bytes,
        "power_watts": drawn.watts,
        "joules_per_token": drawn.watts * facts.seconds / tokens if drawn.watts and tokens else None,
        "usd_per_million_tokens": (
            facts.usd_per_hour * facts.seconds / 3600 / tokens * 1e6 if facts.usd_per_hour and tokens else None
        ),
        "roofline_share": (
            metrics["tokens_per_second_per_user"].value / facts.roof_tokens_per_second
            if facts.roof_tokens_per_second and "tokens_per_second_per_user" in metrics
            else None
        ),
    }
    return {name: figure(name, value, 1, _source(name, counted)) for name, value in values.items() if value is not None}


def _source(name: str, counted: Counted) -> Any:
    return counted.source if name in ("joules_per_token", "usd_per_million_tokens", "roofline_share") else "client"


def _unmeasured(metrics: Mapping[str, Metric], counted: Counted, facts: Facts) -> dict[str, str]:
    """Why metrics are not there, where that is not plain from what was asked."""
    why = dict(facts.drawn.why if facts.drawn else {}) | dict(facts.why)
    if counted.output is None:
        unknown = "the server gives no usage, and there is no --tokenizer"
        why |= dict.fromkeys(("tpot", "output_tokens_per_second", "tokens_per_second_per_user"), unknown)
    elif "tpot" not in metrics:
        why["tpot"] = "no answer had a second chunk"
    if "ttfa" not in metrics:
        final = "no answer reached the final channel" if facts.splits else "the server does not take channels apart"
        why.setdefault("ttfa", final)
    if "power_watts" not in metrics and "power_watts" in why:
        why["joules_per_token"] = why["power_watts"]
    return {name: reason for name, reason in why.items() if name not in metrics}


def _turns(answered: Sequence[Trace], facts: Facts) -> dict[str, Any]:
    """TTFT and prompts by turn, of dialogues."""
    if facts.shape["kind"] != "multi-turn":
        return {}
    rows = []
    for turn in sorted({trace.turn for trace in answered}):
        these = [trace for trace in answered if trace.turn == turn]
        prompts = [trace.usage.prompt for trace in these if trace.usage.prompt is not None]
        cached = [trace.usage.cached for trace in these if trace.usage.cached is not None]
        rows.append({
            "turn": turn + 1,
            "ttft": spread("ttft", [trace.ttft for trace in these], len(these), "client").value,
            "input_tokens": spread("ttft", prompts, 1, "usage").value if prompts else None,
            "cached_tokens": spread("ttft", cached, 1, "usage").value if cached else None,
        })  # fmt: skip
    return {"turns": rows}
