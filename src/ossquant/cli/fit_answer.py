"""What `ossquant fit` answers: candidates, machines, verdicts, and how they are shown."""

from pathlib import Path

import typer

from ossquant.cli import fit_json, fit_view
from ossquant.cli.named import PUBLISHED, NamedModel, named_model, no_modelfile, sized
from ossquant.errors import UsageError
from ossquant.fit import (
    ENGINE_FORMATS,
    FORMATS,
    Candidate,
    FitVerdict,
    candidate,
    cheapest,
    loads_stored,
    stored_format,
)
from ossquant.fit import fit as judge
from ossquant.hardware import Machine, find_machine, find_machines
from ossquant.memory import ENGINES, Engine, Workload, foreign_options, parse_engine
from ossquant.units import nearest

DOES_NOT_FIT = 4
# what the overview leaves out: what another row says as well, or what nobody serves
LEFT_OUT = {
    ("llama.cpp", "gguf-bf16"),
    ("ollama", "gguf-q8"),
    ("vllm", "int4"),
    ("vllm", "bf16"),
    ("transformers", "fp4"),
}


def answer(
    *,
    names: list[str] | None,
    gpu: str | None,
    gpus: int,
    model: str | None,
    engine: str | None,
    engine_version: str | None,
    format_: str | None,
    max_model_len: int,
    max_num_seqs: int | None,
    kv_cache_dtype: str,
    ubatch: int | None,
    max_num_batched_tokens: int | None,
    gpu_memory_utilization: float | None,
    tp: int | None,
    n_cpu_moe: int,
    kv_unified: bool,
    swa_full: bool,
    host_memory: str | None,
    compare: bool,
    cheapest_: bool,
    log: Path | None,
    as_json: bool,
) -> None:
    """Answer the options of `fit`. Raises typer.Exit with 4 if nothing fits."""
    workload = Workload(
        max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_cache_dtype=kv_cache_dtype, ubatch=ubatch,
        max_num_batched_tokens=max_num_batched_tokens, gpu_memory_utilization=gpu_memory_utilization,
        n_cpu_moe=n_cpu_moe, tensor_parallel=tp, kv_unified=kv_unified, swa_full=swa_full,
    )  # fmt: skip
    named = [*([gpu] if gpu is not None else []), *(names or [])]
    if log:
        _refuse_together("--log", {"--compare": compare, "--cheapest": cheapest_, "--engine": engine is not None})
        _hold_log(log, named, model, engine_version, format_, workload, as_json)
        return
    asked = _able(_candidates(model, engine, engine_version, format_), workload)
    if cheapest_:
        _refuse_together("--cheapest", {"--compare": compare, "a GPU": bool(named), "--gpus": gpus != 1})
        _show_cheapest(cheapest(_worth_asking(asked, engine, []), workload), as_json)
    elif compare:
        _refuse_together("--compare", {"--gpu": gpu is not None})
        if not named:
            raise UsageError("--compare without GPUs", hint="ossquant fit --compare 4090 5090 a100")
        machines = [sized(machine, gpus, host_memory) for name in named for machine in find_machines(name)]
        asked = _worth_asking(asked, engine, machines)
        _show_comparison([[judge(one, machine, workload) for one in asked] for machine in machines], as_json)
    else:
        if len(named) > 1:
            raise UsageError("several GPUs are named", hint="ossquant fit --compare 4090 5090")
        machine = sized(find_machine(named[0] if named else "auto"), gpus, host_memory)
        asked = _worth_asking(asked, engine, [machine])
        _show([judge(one, machine, workload) for one in asked], as_json)


def _refuse_together(option: str, others: dict[str, bool]) -> None:
    for other, given in others.items():
        if given:
            raise UsageError(f"{option} and {other} exclude each other", hint="leave one of them out")


def _candidates(model: str | None, engine: str | None, version: str | None, name: str | None) -> list[Candidate]:
    """What the options name; without them every engine with the formats people load in it."""
    if version is not None and engine is None:
        raise UsageError("--engine-version without --engine", hint=f"--engine {' or '.join(ENGINES)}")
    if name is not None and name not in FORMATS:
        raise UsageError(f"unknown format '{name}'", hint=nearest(name, FORMATS))
    engines = [parse_engine(engine, version)] if engine is not None else [parse_engine(each) for each in ENGINE_FORMATS]
    found = []
    for which in [model] if model is not None else ["20b", "120b"]:
        named = named_model(which)
        for chosen in engines:
            if named.stored and not name:
                if engine is not None and not named.serves(chosen):
                    raise no_modelfile(named)
                found += _as_stored(named, chosen)
            else:
                formats = _formats(chosen, name, bool(engine))
                found += [candidate(named.name, named.spec, each, chosen) for each in formats]
    if not found:
        raise UsageError(f"{engine or 'no engine'} does not load {model} as it is stored", hint="say --format")
    return found


def _formats(engine: Engine, name: str | None, all_of_them: bool) -> list[str]:
    if name and all_of_them:
        return [name]  # refused further down if the engine does not load it
    known = ENGINE_FORMATS[engine.name]
    if name:
        return [name] if name in known else []
    return [each for each in known if all_of_them or (engine.name, each) not in LEFT_OUT]


def _as_stored(named: NamedModel, engine: Engine) -> list[Candidate]:
    if named.stored is None or not loads_stored(engine, named.stored) or not named.serves(engine):
        return []
    return [Candidate(named.name, stored_format(named.stored), engine, named.stored, named.path)]


def _worth_asking(asked: list[Candidate], engine: str | None, machines: list[Machine]) -> list[Candidate]:
    """The candidates without mlx where nobody has it and nobody named it."""
    if engine or any(machine.device.vendor == "apple" for machine in machines):
        return asked
    return [one for one in asked if one.engine.name != "mlx"] or asked


def _able(asked: list[Candidate], workload: Workload) -> list[Candidate]:
    """The candidates whose engines have every option that the workload names."""
    able = [one for one in asked if not foreign_options(one.engine, workload)]
    if not able:
        engine = asked[0].engine
        raise UsageError(
            f"{engine.name} has no {foreign_options(engine, workload)[0]}",
            hint="leave it out, or choose another --engine",
        )
    return able


def _show(verdicts: list[FitVerdict], as_json: bool) -> None:
    if as_json:
        fit_json.print_verdicts(verdicts)
    else:
        fit_view.show(verdicts)
    if all(verdict.verdict == "no" for verdict in verdicts):
        raise typer.Exit(DOES_NOT_FIT)


def _show_comparison(columns: list[list[FitVerdict]], as_json: bool) -> None:
    if as_json:
        fit_json.print_comparison(columns)
    else:
        fit_view.show_comparison(columns)
    if all(verdict.verdict == "no" for column in columns for verdict in column):
        raise typer.Exit(DOES_NOT_FIT)


def _show_cheapest(found: list[FitVerdict], as_json: bool) -> None:
    if as_json:
        fit_json.print_cheapest(found)
    else:
        fit_view.show_cheapest(found)
    if not found:
        raise typer.Exit(DOES_NOT_FIT)


def _hold_log(
    path: Path, gpus: list[str], model: str | None, version: str | None, name: str | None, workload: Workload,
    as_json: bool,
) -> None:  # fmt: skip
    from ossquant.fit_log import compare_log

    if len(gpus) > 1:
        raise UsageError("--log with several GPUs", hint="name the one that the log is of, 2x3090 for two")
    spec = None if model is None else PUBLISHED.get(model)
    if model is not None and spec is None:
        raise UsageError(f"--log with --model '{model}'", hint="logs are read of the 20b and the 120b")
    comparison = compare_log(path, gpus[0] if gpus else None, spec, version, name, workload)
    if as_json:
        fit_json.print_log(comparison)
    else:
        fit_view.show_log(comparison)
