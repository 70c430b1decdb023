"""What `ossquant fit --json` prints; docs/fit.md documents the keys."""

from typing import TYPE_CHECKING, Any

from ossquant.advice import command, warnings
from ossquant.fit import FitVerdict, best
from ossquant.memory import Term
from ossquant.units import GIB

if TYPE_CHECKING:
    from ossquant.fit_log import LogComparison

SCHEMA_VERSION = 1


def print_verdicts(verdicts: list[FitVerdict]) -> None:
    """Print the best verdict, and the others under `alternatives` if there were several to choose from."""
    chosen = best(verdicts)
    answer = _head() | verdict_object(chosen)
    if len(verdicts) > 1:
        answer["alternatives"] = [verdict_object(verdict) for verdict in verdicts if verdict is not chosen]
    _print(answer)


def print_object(value: dict[str, Any]) -> None:
    """Print one object of the schema."""
    _print(_head() | value)


def print_comparison(columns: list[list[FitVerdict]]) -> None:
    """Print every verdict of every machine under `comparison`."""
    _print(_head() | {"comparison": [verdict_object(verdict) for column in columns for verdict in column]})


def print_cheapest(verdicts: list[FitVerdict]) -> None:
    """Print what carries the workload under `cheapest`, cheapest first."""
    _print(_head() | {"cheapest": [verdict_object(verdict) | _price(verdict) for verdict in verdicts]})


def print_log(comparison: "LogComparison") -> None:
    """Print a log's terms, predicted and measured."""
    log = comparison.log
    _print(_head() | {
        "engine": log.engine,
        "engine_version": log.version,
        "model": comparison.model,
        "format": comparison.format,
        "device": {"name": comparison.machine.device.name, "count": comparison.machine.count},
        "terms": {
            row.term: {"predicted": _term(row.predicted), "measured": row.measured, "error": row.error}
            for row in comparison.rows
        },
        "assumed": list(comparison.assumed),
    })  # fmt: skip


def verdict_object(verdict: FitVerdict) -> dict[str, Any]:
    """One verdict as the documented keys."""
    device, estimate, workload = verdict.machine.device, verdict.estimate, verdict.workload
    decode = verdict.decode
    memory = device.nvml_bytes or int(device.memory_gb * (GIB if device.arch else 1e9))
    return {
        "model": verdict.candidate.model,
        "engine": verdict.candidate.engine.name,
        "format": verdict.candidate.format,
        "device": {
            "name": device.name,
            "count": verdict.machine.count,
            "memory": memory * verdict.machine.count,
            "usable": verdict.usable,
        },
        "workload": {
            "max_model_len": workload.max_model_len,
            "max_num_seqs": workload.sequences,
            "kv_cache_dtype": workload.kv_cache_dtype,
        },
        "verdict": verdict.verdict,
        "device_memory": {
            "weights": _term(estimate.weights),
            "kv_cache": _term(estimate.kv_cache),
            "compute": _term(estimate.compute),
            "overhead": _term(estimate.overhead),
            "total": _term(estimate.total),
        },
        "host_memory": {"weights": estimate.host_weights, "total": estimate.host_total},
        "n_cpu_moe": workload.n_cpu_moe if verdict.candidate.engine.offloads_experts else None,
        "headroom": verdict.headroom,
        "longest_max_model_len": verdict.longest_max_model_len,
        "most_num_seqs": verdict.most_num_seqs,
        "decode_tokens_per_second": {"low": round(decode.low, 1), "high": round(decode.high, 1)} if decode else None,
        "usd_per_hour": verdict.usd_per_hour,
        "command": command(verdict) or None,
        "warnings": warnings(verdict),
    }


def _head() -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION}


def _term(term: Term) -> dict[str, Any]:
    return {"low": term.low, "expected": term.expected, "high": term.high, "basis": term.basis}


def _price(verdict: FitVerdict) -> dict[str, Any]:
    price = verdict.usd_per_million_tokens()
    return {"usd_per_million_tokens": {"low": round(price[0], 3), "high": round(price[1], 3)} if price else None}


def _print(value: dict[str, Any]) -> None:
    from ossquant.cli import render

    render.print_json(value)
