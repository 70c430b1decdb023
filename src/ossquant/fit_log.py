"""LogComparison: a server's start-up log held against the prediction, term by term."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ossquant.errors import UsageError
from ossquant.fit import ENGINE_FORMATS, Candidate, candidate, fit
from ossquant.hardware import Machine, find_machine
from ossquant.memory import MemoryEstimate, Term, Workload, llama_cpp, parse_engine, vllm, workload_for
from ossquant.memory.terms import exact
from ossquant.spec import ModelSpec
from ossquant.startup_log import StartupLog, read_startup_log

UNNAMED = "1024GB"  # a device that no log names: it only matters to vLLM's kernels and to what is left for the cache
_SAME_SIZE = {"gguf-f16": "gguf-bf16"}
_OWN_OLLAMA_ENGINE = "0.13"  # of those without llama.cpp's server


@dataclass(frozen=True)
class LogRow:
    """One term: bytes predicted and measured."""

    term: str
    predicted: Term
    measured: int

    @property
    def error(self) -> float | None:
        """How far the expected figure is from the measured one, as a share of it; None if that is not above 0."""
        return self.predicted.expected / self.measured - 1 if self.measured > 0 else None


@dataclass(frozen=True)
class LogComparison:
    """A log, what was taken from it or from the user, its terms, and what had to be assumed."""

    log: StartupLog
    model: str
    format: str
    machine: Machine
    workload: Workload
    rows: tuple[LogRow, ...]
    assumed: tuple[str, ...]

    @property
    def device_known(self) -> bool:
        """Whether the log or the user named the device."""
        return self.machine.device.name != UNNAMED


def compare_log(
    path: Path, gpu: str | None, model: str | None, version: str | None, name: str | None, asked: Workload
) -> LogComparison:
    """Read a log and predict the same.

    gpu, model, the engine's version, name (a format) and asked stand in for what the log does not say.
    Raises UsageError for a log that cannot be read or does not say enough.
    """
    log = read_startup_log(path)
    which = model or log.model
    if which is None:
        raise UsageError(f"{path.name} does not say which model", hint="say --model 20b or 120b")
    stated = log.format and _SAME_SIZE.get(log.format, log.format)
    chosen = name or stated or ENGINE_FORMATS[log.engine][0]
    engine = parse_engine(log.engine, version or log.version or (_OWN_OLLAMA_ENGINE if log.own_engine else None))
    machine = _machine(log, gpu)
    question = candidate(which, ModelSpec.published(which), chosen, engine)
    workload = workload_for(engine, _workload(log, asked))
    if log.engine == "llama.cpp" and not workload.n_cpu_moe:
        workload = replace(workload, n_cpu_moe=_layers_missing(question, log))
    estimate = fit(question, machine, workload, plan_offload=False).estimate
    rows = _rows(log, estimate)
    if "available_kv_cache" in log.measured and machine.device.name != UNNAMED:
        rows.append(_left_for_cache(log, estimate, machine, vllm.utilization(workload, engine.version)))
    return LogComparison(log, which, chosen, machine, workload, tuple(rows), _assumed(log, chosen, stated))


def _rows(log: StartupLog, estimate: MemoryEstimate) -> list[LogRow]:
    terms = {
        "weights": estimate.weights,
        "kv_cache": estimate.kv_cache,
        "compute": estimate.compute,
        "host_weights": exact(estimate.host_weights),
        # what engines add up themselves leaves the driver out
        "total": estimate.weights + estimate.kv_cache + estimate.compute,
    }
    if log.own_engine:
        terms["total"] = terms["total"] + terms["host_weights"]
    if not estimate.host_weights:
        del terms["host_weights"]  # Metal maps the whole file
    return [LogRow(term, terms[term], log.measured[term]) for term in terms if term in log.measured]


def _left_for_cache(log: StartupLog, estimate: MemoryEstimate, machine: Machine, share: float) -> LogRow:
    pool = int(machine.device.usable_bytes * machine.count * share)
    taken = estimate.weights + estimate.compute + estimate.overhead
    left = Term(pool - taken.high, pool - taken.expected, pool - taken.low, "heuristic")
    return LogRow("available_kv_cache", left, log.measured["available_kv_cache"])


def _layers_missing(question: Candidate, log: StartupLog) -> int:
    """How many layers' experts the device lacks, by the weights that it holds."""
    whole, _ = llama_cpp.split_weights(question.plan, 0)
    layers = question.plan.spec.num_hidden_layers
    layer = (whole - llama_cpp.split_weights(question.plan, layers)[0]) / layers
    missing = whole - log.measured.get("weights", whole)
    return min(layers, max(0, round(missing / layer)))


def _machine(log: StartupLog, gpu: str | None) -> Machine:
    if gpu:
        named = find_machine(gpu)
        return replace(named, count=max(named.count, log.n_devices))
    try:
        device = find_machine(log.device_name or UNNAMED).device
    except UsageError:  # a name of the driver's that the table does not have
        device = find_machine(UNNAMED).device
    return Machine(device, max(1, log.n_devices), None)


# what a log may leave out, by its name there and in a Workload
_STATED = ("max_model_len", "max_num_seqs", "kv_cache_dtype", "ubatch", "max_num_batched_tokens",
           "gpu_memory_utilization", "n_cpu_moe", "kv_unified", "swa_full")  # fmt: skip


def _workload(log: StartupLog, asked: Workload) -> Workload:
    stated: dict[str, Any] = {name: getattr(log, name) for name in _STATED if getattr(log, name) is not None}
    return replace(asked, tensor_parallel=log.tensor_parallel_size or asked.tensor_parallel, **stated)


def _assumed(log: StartupLog, chosen: str, stated: str | None) -> tuple[str, ...]:
    """What the log does not say and matters to its engine."""
    wanted = {"max_model_len": log.max_model_len, "max_num_seqs": log.max_num_seqs}
    if log.engine != "vllm":
        wanted["ubatch"] = log.ubatch
    missing = [name for name, value in wanted.items() if value is None]
    return (*missing, *([f"format {chosen}"] if stated is None else []))
