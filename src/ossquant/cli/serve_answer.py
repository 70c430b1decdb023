"""What `ossquant serve-command` answers: the engine that fits best, its line, and what to know beside it."""

import shlex
from dataclasses import replace
from typing import Any

import typer

from ossquant.advice import command, warnings
from ossquant.cli import fit_json, fit_view
from ossquant.cli.named import NamedModel, named_model, no_modelfile, sized
from ossquant.engine import LOOPBACK
from ossquant.errors import UsageError
from ossquant.fit import ENGINE_FORMATS, Candidate, FitVerdict, best, candidate, stored_format
from ossquant.fit import fit as judge
from ossquant.hardware import find_machine
from ossquant.memory import Workload, foreign_options, parse_engine
from ossquant.servers import loads, minimum_version, notes, program, refusal
from ossquant.units import GIB

DOES_NOT_FIT = 4


def answer(
    *,
    source: str,
    engine: str | None,
    gpu: str,
    gpus: int,
    max_model_len: int,
    max_num_seqs: int | None,
    kv_cache_dtype: str,
    host: str,
    port: int | None,
    host_memory: str | None,
    as_json: bool,
) -> None:
    """Answer the options of `serve-command`. Raises typer.Exit with 4 if it does not fit."""
    if not host.strip() or not host.isprintable():
        raise UsageError("--host is empty, or no name", hint=f"--host {LOOPBACK}")
    workload = Workload(max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_cache_dtype=kv_cache_dtype)
    asked = _able(_candidates(named_model(source), source, engine), workload)
    machine = sized(find_machine(gpu), gpus, host_memory)
    verdict = best([judge(one, machine, _as_served(one, workload)) for one in asked])
    if as_json:
        fit_json.print_object(_answer(verdict, host, port))
    else:
        _print(verdict, host, port)
    if verdict.verdict == "no":
        raise typer.Exit(DOES_NOT_FIT)


def _candidates(named: NamedModel, source: str, engine: str | None) -> list[Candidate]:
    """The model under the engine, or under every one whose server loads it."""
    engines = [parse_engine(each) for each in (ENGINE_FORMATS if engine is None else (engine,))]
    stored = named.stored
    if stored is None:
        return [candidate(named.name, named.spec, ENGINE_FORMATS[each.name][0], each) for each in engines]
    able = [each for each in engines if loads(each, stored)]
    if engine == "ollama" and able and not named.serves(able[0]):
        raise no_modelfile(named)
    able = [each for each in able if named.serves(each)]
    if not able:
        raise refusal(source, stored, engine)
    return [Candidate(named.name, stored_format(stored), each, stored, named.path) for each in able]


def _able(asked: list[Candidate], workload: Workload) -> list[Candidate]:
    able = [one for one in asked if not foreign_options(one.engine, workload)]
    if not able:
        raise UsageError(
            f"{' and '.join(one.engine.name for one in asked)}: no {foreign_options(asked[0].engine, workload)[0]}",
            hint="leave it out, or choose another --engine",
        )
    return able


def _as_served(chosen: Candidate, workload: Workload) -> Workload:
    """What the engine's server does with it: `transformers serve` computes a prompt at once."""
    if chosen.engine.name != "transformers":
        return workload
    return replace(workload, max_num_batched_tokens=chosen.plan.spec.max_position_embeddings)


def _answer(verdict: FitVerdict, host: str, port: int | None) -> dict[str, Any]:
    return fit_json.verdict_object(verdict) | {
        "command": command(verdict, host, port) or None,
        "minimum_version": minimum_version(verdict),
        "notes": notes(verdict, host),
    }


def _print(verdict: FitVerdict, host: str, port: int | None) -> None:
    chosen, total = verdict.candidate, verdict.estimate.total
    if line := command(verdict, host, port):
        typer.echo(line)
    bounds = f"{total.low / GIB:.1f} to {total.high / GIB:.1f}"
    typer.echo(
        f"{chosen.model} in {chosen.engine.name}, {chosen.format}, on {fit_view.machine_name(verdict)}: "
        f"{fit_view.verdict_name(verdict)}, {total.expected / GIB:.1f} ({bounds}) of {verdict.usable / GIB:.1f} GiB; "
        f"{verdict.workload.max_model_len:,} tokens, {verdict.longest_max_model_len:,} fit",
        err=True,
    )
    if line:
        typer.echo(f"{program(chosen.engine)} {minimum_version(verdict)} or newer", err=True)
        unsure = [f"tight: {way}" for way in _way_out(verdict)] if verdict.verdict == "tight" else []
        remarks = [*unsure, *warnings(verdict), *notes(verdict, host)]
    else:
        remarks = [fit_view.what_it_takes(verdict), *warnings(verdict), *_way_out(verdict)]
    for remark in dict.fromkeys(remarks):
        typer.echo(f"! {remark}", err=True)


def _way_out(verdict: FitVerdict) -> list[str]:
    if verdict.longest_max_model_len:
        return [f"--max-model-len {verdict.longest_max_model_len} fits."]
    if verdict.most_num_seqs:
        return [f"--max-num-seqs {verdict.most_num_seqs} fits."]
    return [f"what else fits: ossquant fit --model {shlex.quote(verdict.candidate.model)}."]
