"""FitVerdict: whether a plan fits a machine under an engine, how, and up to what."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

from ossquant.decode import DecodeRate, decode_rate
from ossquant.errors import UsageError
from ossquant.hardware import Device, Machine, devices
from ossquant.layout import Role
from ossquant.memory import Engine, MemoryEstimate, Workload, estimate, vllm
from ossquant.plan import Plan, make_plan
from ossquant.recipe import BUILT_IN, F32, SERVED, Recipe
from ossquant.spec import ModelSpec
from ossquant.units import GIB, size_both

Verdict = Literal["fits", "tight", "offload", "no"]
_BEST_FIRST: tuple[Verdict, ...] = ("fits", "tight", "offload", "no")
FORMATS: dict[str, Recipe] = BUILT_IN | SERVED
# what each engine loads, best first
ENGINE_FORMATS: dict[str, tuple[str, ...]] = {
    "llama.cpp": ("gguf-q8", "gguf-bf16"),
    "ollama": ("gguf-bf16", "gguf-q8"),
    "vllm": ("mxfp4", "int4", "bf16"),
    "mlx": ("mxfp4",),  # of transformers' bf16 layout mlx-lm 0.32 finds no experts, and says so
    "transformers": ("mxfp4", "hybrid", "nf4", "fp4", "bf16"),
}
MIXED = "mixed"  # a checkpoint of a recipe of the user's own
GGUF = "gguf"  # an export that has no name in FORMATS
GGUF_ENGINES = ("llama.cpp", "ollama")
MAX_SEQUENCES = 4096


@dataclass(frozen=True)
class Candidate:
    """What is held against a machine: a model in a format, under an engine.

    path is the file that the engine is given, where it is not found by the model's name.
    """

    model: str
    format: str
    engine: Engine
    plan: Plan
    path: str = ""


@dataclass(frozen=True)
class FitVerdict:
    """The answer, and what it rests on.

    verdict: "fits" where the high figure fits, "tight" where only the expected one does, "offload" where it
    fits with the workload's n_cpu_moe or n_cpu_layers on the host, "no" otherwise. usable and headroom
    (usable less the expected total) are bytes over all devices; for vLLM usable is what
    gpu_memory_utilization leaves. longest_max_model_len and most_num_seqs fit as "fits" does, 0 if none.
    obstacle says why a machine cannot run it at all. decode is None if not known.
    """

    candidate: Candidate
    machine: Machine
    workload: Workload
    estimate: MemoryEstimate
    usable: int
    verdict: Verdict
    longest_max_model_len: int
    most_num_seqs: int
    decode: DecodeRate | None
    obstacle: str = ""

    @property
    def headroom(self) -> int:
        """Usable bytes that are left, negative if bytes are lacking."""
        return self.usable - self.estimate.total.expected

    @property
    def usd_per_hour(self) -> float | None:
        """Rent of all devices, None if not known."""
        price = self.machine.device.usd_per_hour
        return None if price is None else price * self.machine.count

    def usd_per_million_tokens(self) -> tuple[float, float] | None:
        """What a million written tokens cost, at the high and at the low decode rate."""
        if self.usd_per_hour is None or self.decode is None:
            return None
        per_hour = self.usd_per_hour * 1e6 / 3600
        return per_hour / self.decode.high, per_hour / self.decode.low


def candidate(model: str, spec: ModelSpec, name: str, engine: Engine) -> Candidate:
    """Plan a model in one of FORMATS for an engine. Raises UsageError if the engine does not load it."""
    if name not in ENGINE_FORMATS[engine.name]:
        raise UsageError(
            f"{engine.name} does not load {name}", hint=f"it loads {', '.join(ENGINE_FORMATS[engine.name])}"
        )
    return Candidate(model, name, engine, _plan(spec, name))


@cache
def _plan(spec: ModelSpec, name: str) -> Plan:
    return make_plan(spec, FORMATS[name])


def fit(candidate: Candidate, machine: Machine, workload: Workload, plan_offload: bool = True) -> FitVerdict:
    """Hold a candidate with a workload against a machine; experts or layers go to the host if they must.

    A workload with n_cpu_moe of its own is taken as it is, and any with plan_offload off. Raises UsageError
    for a workload that cannot be.
    """
    obstacle = _obstacle(candidate, machine, workload)
    machine = replace(machine, count=_devices_used(candidate, machine, workload))
    question = _Question(candidate, machine)
    if plan_offload and not obstacle and not workload.n_cpu_moe and question.state(workload) == "no":
        offloaded = question.offloaded(workload)
        if offloaded:
            obstacle = question.host_lacks(offloaded)
            workload = workload if obstacle else offloaded
    verdict: Verdict = "no" if obstacle else question.state(workload)
    on_host = workload.n_cpu_moe or workload.n_cpu_layers
    return FitVerdict(
        candidate=candidate,
        machine=machine,
        workload=workload,
        estimate=question.estimate(workload),
        usable=question.usable(workload),
        verdict="offload" if on_host and verdict == "fits" else verdict,
        longest_max_model_len=0 if obstacle else question.longest_max_model_len(workload),
        most_num_seqs=0 if obstacle else question.most_num_seqs(workload),
        decode=question.decode(workload) if verdict != "no" else None,
        obstacle=obstacle,
    )


@dataclass(frozen=True)
class _Question:
    candidate: Candidate
    machine: Machine

    def estimate(self, workload: Workload) -> MemoryEstimate:
        return estimate(self._loaded(), self.candidate.engine, workload, self.machine.device, self.machine.count)

    def usable(self, workload: Workload) -> int:
        usable = self.machine.device.usable_bytes * self.machine.count
        if self.candidate.engine.name == "vllm":
            return int(usable * vllm.utilization(workload, self.candidate.engine.version))
        return usable

    def state(self, workload: Workload) -> Verdict:
        needed, usable = self.estimate(workload), self.usable(workload)
        if needed.total.expected > usable or not self._host_holds(needed):
            return "no"
        return "fits" if needed.total.high <= usable else "tight"

    def offloaded(self, workload: Workload) -> Workload | None:
        """The workload with as little on the host as fits the devices; None if nothing does, or the engine cannot."""
        engine, layers = self.candidate.engine, self.candidate.plan.spec.num_hidden_layers
        if self.machine.device.unified_memory or not _offloads(self.candidate):
            return None
        if engine.offloads_experts:
            moved = [replace(workload, n_cpu_moe=count) for count in range(1, layers + 1)]
        else:
            moved = [replace(workload, n_cpu_layers=count) for count in range(1, layers + 1)]
        index = bisect_left(moved, True, key=self._on_device)
        return moved[index] if index < layers else None

    def host_lacks(self, workload: Workload) -> str:
        """What an offload lacks of host memory; empty if nothing, or if that is not known."""
        needed, host = self.estimate(workload), self.machine.host_memory
        if self._host_holds(needed) or host is None:
            return ""
        layers = workload.n_cpu_moe or workload.n_cpu_layers
        return (
            f"with {layers} layers on the host {self.candidate.engine.name} would fit, but needs "
            f"{size_both(needed.host_total)} of host memory, and {size_both(host)} are free"
        )

    def _on_device(self, workload: Workload) -> bool:
        return self.estimate(workload).total.high <= self.usable(workload)

    def longest_max_model_len(self, workload: Workload) -> int:
        """The longest context that fits."""
        return self._largest(
            range(1, self.candidate.plan.spec.max_position_embeddings + 1),
            lambda length: replace(workload, max_model_len=length),
        )

    def most_num_seqs(self, workload: Workload) -> int:
        """The most sequences that fit, up to MAX_SEQUENCES."""
        return self._largest(range(1, MAX_SEQUENCES + 1), lambda count: replace(workload, max_num_seqs=count))

    def _largest(self, values: Sequence[int], asked: Callable[[int], Workload]) -> int:
        found = bisect_right(values, False, key=lambda value: self.state(asked(value)) != "fits")
        return values[found - 1] if found else 0

    def decode(self, workload: Workload) -> DecodeRate | None:
        engine = self.candidate.engine.name
        tensor_parallel = self.machine.count if engine == "vllm" else 1
        return decode_rate(self._loaded(), engine, workload, self.machine.device, tensor_parallel)

    def _loaded(self) -> Plan:
        """The plan as it lies in memory: transformers expands MXFP4 to bf16 where it has no kernels."""
        if falls_back(self.candidate, self.machine.device):
            return _plan(self.candidate.plan.spec, "bf16")
        return self.candidate.plan

    def _host_holds(self, needed: MemoryEstimate) -> bool:
        device, host = self.machine.device, self.machine.host_memory
        if device.unified_memory:
            return needed.total.expected + needed.host_weights <= device.memory_gb * GIB * self.machine.count
        return host is None or needed.host_total <= host


def _offloads(candidate: Candidate) -> bool:
    """Whether what does not fit can lie in host memory; of transformers, only `ossquant run` does so."""
    if candidate.engine.name == "transformers":
        return candidate.plan.has_bnb
    return candidate.engine.name in ("llama.cpp", "ollama")


def _devices_used(candidate: Candidate, machine: Machine, workload: Workload) -> int:
    split = workload.tensor_parallel if candidate.engine.name == "vllm" else None
    return min(split or machine.count, machine.count)


def _obstacle(candidate: Candidate, machine: Machine, workload: Workload) -> str:
    """Why the machine cannot run the candidate at all; empty if it can."""
    engine, device = candidate.engine.name, machine.device
    kernels = device.mxfp4_kernels.get("llama.cpp" if engine == "ollama" else engine)
    if kernels is False and engine != "transformers":
        return f"{engine} has no kernels for gpt-oss on {device.arch}"
    if engine == "mlx" and (device.vendor != "apple" or machine.count > 1):
        return "mlx is counted on one of Apple's GPUs only"
    if engine != "vllm":
        return ""
    if device.vendor == "apple":
        return "vLLM itself does not run on Apple's GPUs"
    heads, split = candidate.plan.spec.num_attention_heads, workload.tensor_parallel or machine.count
    if heads % split:
        return f"vLLM cannot split {heads} attention heads over {split} GPUs; --tp says over how many"
    if candidate.format == "int4" and candidate.plan.spec.intermediate_size // split % 32:
        return f"vLLM cannot split int4 groups of 32 over {split} GPUs; --tp 2 or 1"
    if split > machine.count:
        return f"--tp {split} needs {split} GPUs, there are {machine.count}"
    return ""


def falls_back(candidate: Candidate, device: Device) -> bool:
    """Whether transformers would expand the candidate's MXFP4 experts to bf16 on a device."""
    return (
        candidate.engine.name == "transformers"
        and candidate.format == "mxfp4"
        and device.mxfp4_kernels.get("transformers") is False
    )


def cheapest(asked: Sequence[Candidate], workload: Workload) -> list[FitVerdict]:
    """What carries a workload, by rent an hour, then by the price of a token.

    Of each device with a known price the fewest that fit, under the engine that writes cheapest.
    """
    chosen: dict[tuple[str, str], FitVerdict] = {}
    for one, device in product(asked, devices()):
        verdict = _fewest(one, workload, device)
        if verdict is None:
            continue
        key = (one.model, device.name)
        if key not in chosen or _price_key(verdict) < _price_key(chosen[key]):
            chosen[key] = verdict
    return sorted(chosen.values(), key=_price_key)


def _fewest(candidate: Candidate, workload: Workload, device: Device) -> FitVerdict | None:
    if device.usd_per_hour is None:
        return None
    verdicts = (fit(candidate, Machine(device, count, None), workload) for count in (1, 2, 4, 8))
    return next((verdict for verdict in verdicts if verdict.verdict == "fits"), None)


def _price_key(verdict: FitVerdict) -> tuple[float, float]:
    tokens = verdict.usd_per_million_tokens()
    return verdict.usd_per_hour or 0.0, sum(tokens) if tokens else float("inf")


def best(verdicts: Sequence[FitVerdict]) -> FitVerdict:
    """The verdict to act on: what fits before what is tight or offloaded, then the larger model, then the first."""
    return min(verdicts, key=lambda each: (_BEST_FIRST.index(each.verdict), -each.candidate.plan.parameters))


def stored_format(plan: Plan) -> str:
    """The name in FORMATS of what a checkpoint holds, double quantization and block size aside.

    "gguf" for any other GGUF, "mixed" for any other checkpoint.
    """
    roles = (Role.EXPERTS, Role.ATTENTION, Role.LM_HEAD, Role.EMBEDDING, Role.NORM)
    kinds = [plan.scheme(role).format for role in roles]
    same = (name for name, recipe in FORMATS.items() if [recipe.scheme(role).format for role in roles] == kinds)
    return next(same, GGUF if plan.scheme(Role.NORM) == F32 else MIXED)


def loads_stored(engine: Engine, plan: Plan) -> bool:
    """Whether an engine loads a checkpoint as it is stored; what no name describes `ossquant run` alone does."""
    name = stored_format(plan)
    if name == GGUF:
        return engine.name in GGUF_ENGINES
    return engine.name == "transformers" if name == MIXED else name in ENGINE_FORMATS[engine.name]
