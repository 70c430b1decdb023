"""Term, Workload, MemoryEstimate: what is asked of an engine, and the bytes it takes."""

from dataclasses import dataclass
from typing import Literal

from ossquant.errors import UsageError
from ossquant.plan import Plan
from ossquant.units import nearest

Basis = Literal["exact", "measured", "heuristic"]
_WEAKEST_LAST: tuple[Basis, ...] = ("exact", "measured", "heuristic")


@dataclass(frozen=True)
class Term:
    """Bytes from low to high, and the figure to expect.

    basis: "exact" follows from shapes and the engine's layout, "measured" rests on published logs,
    "heuristic" is a judgement.
    """

    low: int
    expected: int
    high: int
    basis: Basis

    def __add__(self, other: "Term") -> "Term":
        basis = max(self.basis, other.basis, key=_WEAKEST_LAST.index)
        return Term(self.low + other.low, self.expected + other.expected, self.high + other.high, basis)

    def less(self, nbytes: int) -> "Term":
        """The same without nbytes that are known to lie elsewhere."""
        return Term(self.low - nbytes, self.expected - nbytes, self.high - nbytes, self.basis)

    def scaled(self, share: float) -> "Term":
        """A share of it."""
        return Term(int(self.low * share), int(self.expected * share), int(self.high * share), self.basis)

    def times(self, factor: int) -> "Term":
        """The same on each of several devices."""
        return Term(self.low * factor, self.expected * factor, self.high * factor, self.basis)


def exact(nbytes: float) -> Term:
    """A term that is known to the byte."""
    return Term(int(nbytes), int(nbytes), int(nbytes), "exact")


def band(low: float, expected: float, high: float, basis: Basis) -> Term:
    """A term that is known between bounds."""
    return Term(int(low), int(expected), int(high), basis)


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine. None: the engine's default.

    max_model_len is the context in tokens of one sequence, max_num_seqs how many run at once. ubatch is
    llama.cpp's physical batch; max_num_batched_tokens vLLM's, and in transformers and mlx the prompt tokens
    computed at once. tensor_parallel is how many GPUs vLLM splits each layer over, all if not said. n_cpu_moe layers
    keep their experts in host memory, n_cpu_layers run there whole. kv_unified: the sequences share
    max_model_len cells. swa_full: sliding layers keep the whole context.
    """

    max_model_len: int = 8192
    max_num_seqs: int | None = None
    kv_cache_dtype: str = "auto"
    ubatch: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    n_cpu_moe: int = 0
    n_cpu_layers: int = 0
    tensor_parallel: int | None = None
    kv_unified: bool = False
    swa_full: bool = False

    @property
    def sequences(self) -> int:
        """How many sequences run at once; one if not said."""
        return self.max_num_seqs or 1

    def check(self, plan: Plan) -> None:
        """Raise UsageError for a workload that the model cannot have."""
        longest = plan.spec.max_position_embeddings
        if not 1 <= self.max_model_len <= longest:
            raise UsageError(f"max_model_len cannot be {self.max_model_len}", hint=f"the model takes 1 to {longest}")
        _check_between("max_num_seqs", self.max_num_seqs, 1, 65536)
        _check_between("ubatch", self.ubatch, 1, 65536)
        _check_between("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        _check_between("tensor_parallel", self.tensor_parallel, 1, 1024)
        _check_between("n_cpu_moe", self.n_cpu_moe, 0, plan.spec.num_hidden_layers)
        _check_between("n_cpu_layers", self.n_cpu_layers, 0, plan.spec.num_hidden_layers)
        utilization = self.gpu_memory_utilization
        if utilization is not None and not 0 < utilization <= 1:
            raise UsageError(f"gpu_memory_utilization cannot be {utilization}", hint="above 0, up to 1")


def _check_between(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{name} cannot be {value}", hint=f"{low} to {high}")


@dataclass(frozen=True)
class MemoryEstimate:
    """What an engine takes, summed over all devices, and what it keeps in host memory.

    weights, kv_cache, compute (buffers for activations and logits) and overhead (driver context, graphs,
    allocator) add up to total. host_overhead is the process and its buffers.
    """

    weights: Term
    kv_cache: Term
    compute: Term
    overhead: Term
    host_weights: int
    host_overhead: int

    @property
    def total(self) -> Term:
        """The sum of the device's terms."""
        return self.weights + self.kv_cache + self.compute + self.overhead

    @property
    def host_total(self) -> int:
        """Bytes of host memory."""
        return self.host_weights + self.host_overhead


# bytes of an element; blocks of 32 with an fp16 scale in llama.cpp's quantized types. ggml-common.h, 2026-11-22
_ELEMENT_BYTES = {"auto": 2.0, "f16": 2.0, "fp16": 2.0, "bf16": 2.0, "f32": 4.0, "fp8": 1.0, "fp8_e4m3": 1.0,
                  "fp8_e5m2": 1.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q5_0": 22 / 32, "q4_1": 20 / 32,
                  "q4_0": 18 / 32, "iq4_nl": 18 / 32}  # fmt: skip


def kv_element_bytes(dtype: str) -> float:
    """Bytes of one element of the cache."""
    return _ELEMENT_BYTES[dtype]


def kv_bytes_per_token_layer(plan: Plan, dtype: str, allowed: tuple[str, ...]) -> float:
    """Bytes that one token's key and value take in one layer. Raises UsageError for a dtype the engine lacks."""
    if dtype not in allowed:
        raise UsageError(f"kv_cache_dtype cannot be '{dtype}' here", hint=nearest(dtype, allowed))
    return 2 * plan.spec.num_key_value_heads * plan.spec.head_dim * kv_element_bytes(dtype)
