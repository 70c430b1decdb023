"""What an engine takes in memory for a plan and a workload: exact where it follows, bounded where it does not."""

from dataclasses import replace
from typing import Any

from ossquant.engine import ENGINES, Engine, parse_engine
from ossquant.hardware import Device
from ossquant.memory import llama_cpp, mlx, ollama, transformers, vllm
from ossquant.memory.terms import Basis, MemoryEstimate, Term, Workload
from ossquant.plan import Plan

__all__ = [
    "ENGINES",
    "Basis",
    "Engine",
    "MemoryEstimate",
    "Term",
    "Workload",
    "estimate",
    "parse_engine",
    "workload_for",
]


def estimate(plan: Plan, engine: Engine, workload: Workload, device: Device, count: int = 1) -> MemoryEstimate:
    """Add up what an engine takes over count devices. Raises UsageError for a workload it cannot have."""
    workload.check(plan)
    if engine.name == "llama.cpp":
        return llama_cpp.estimate(plan, workload, device, count, engine.version[0] if engine.version else None)
    if engine.name == "ollama":
        return ollama.estimate(plan, workload, device, count, engine.version)
    if engine.name == "vllm":
        return vllm.estimate(plan, workload, device, count, engine.version)
    if engine.name == "mlx":
        return mlx.estimate(plan, workload, device)
    return transformers.estimate(plan, workload, device, count)


# options of a workload that only some engines have, and the engines
_OWN_OPTIONS = {
    "ubatch": ("llama.cpp", "ollama"),
    "n_cpu_moe": ("llama.cpp", "transformers"),
    "kv_unified": ("llama.cpp",),
    "swa_full": ("llama.cpp",),
    "max_num_batched_tokens": ("vllm", "transformers", "mlx"),
    "gpu_memory_utilization": ("vllm",),
    "tensor_parallel": ("vllm",),
}
_KV_DTYPES = {
    "llama.cpp": llama_cpp.KV_DTYPES,
    "ollama": ollama.KV_DTYPES,
    "vllm": vllm.KV_DTYPES,
    "transformers": transformers.KV_DTYPES,
    "mlx": mlx.KV_DTYPES,
}


def foreign_options(engine: Engine, workload: Workload) -> list[str]:
    """What the workload asks for that this engine does not have."""
    defaults = Workload()
    foreign = [
        option
        for option, engines in _OWN_OPTIONS.items()
        if engine.name not in engines and getattr(workload, option) != getattr(defaults, option)
    ]
    if workload.kv_cache_dtype not in _KV_DTYPES[engine.name]:
        foreign.append(f"kv_cache_dtype {workload.kv_cache_dtype}")
    return foreign


def workload_for(engine: Engine, workload: Workload) -> Workload:
    """The workload without the options that this engine does not have, for several engines side by side."""
    defaults = Workload()
    names = [option.split()[0] for option in foreign_options(engine, workload)]
    own: dict[str, Any] = {name: getattr(defaults, name) for name in names}
    return replace(workload, **own)
