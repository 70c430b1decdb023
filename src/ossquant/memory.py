"""MemoryEstimate: what a plan needs at run time."""

from dataclasses import dataclass

from ossquant.errors import UsageError
from ossquant.plan import Plan
from ossquant.spec import ModelSpec

# they depend on the engine and the driver, not on the plan
NOT_COUNTED = ("compute buffers", "driver context", "fragmentation")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the weights and of one sequence's keys and values, and what is left out."""

    weights: int
    kv_cache: int
    not_counted: tuple[str, ...] = NOT_COUNTED

    @property
    def total(self) -> int:
        """All bytes that are counted."""
        return self.weights + self.kv_cache


def estimate(plan: Plan, max_model_len: int) -> MemoryEstimate:
    """Add up a plan and a bf16 cache of max_model_len tokens.

    Raises UsageError for a length the model does not have.
    """
    longest = plan.spec.max_position_embeddings
    if not 1 <= max_model_len <= longest:
        raise UsageError(f"max_model_len cannot be {max_model_len}", hint=f"the model takes 1 to {longest}")
    return MemoryEstimate(plan.nbytes, kv_cache_bytes(plan.spec, max_model_len))


def kv_cache_bytes(spec: ModelSpec, max_model_len: int, bytes_per_element: int = 2) -> int:
    """Bytes of the keys and values of one sequence of max_model_len tokens.

    A sliding layer keeps the window less the token being computed, as transformers' cache does.
    """
    window = min(max_model_len, spec.sliding_window - 1)
    tokens = sum(window if kind == "sliding_attention" else max_model_len for kind in spec.layer_types)
    return 2 * spec.num_key_value_heads * spec.head_dim * bytes_per_element * tokens
