"""What a plan needs at run time."""

from dataclasses import replace

import pytest

from ossquant.errors import UsageError
from ossquant.memory import estimate, kv_cache_bytes
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.spec import ModelSpec
from ossquant.units import GIB

PER_TOKEN = 2 * 8 * 64 * 2  # bytes a token and layer: key and value, 8 heads of 64, bf16


@pytest.mark.parametrize(("size", "gib", "sliding_layers"), [("20b", 3.0, 12), ("120b", 4.5, 18)])
def test_kv_cache_at_full_context(size: str, gib: float, sliding_layers: int) -> None:
    """Full layers take 3.00 GiB (20b) and 4.50 GiB (120b) for 131072 tokens; sliding ones keep 127 tokens."""
    total = kv_cache_bytes(ModelSpec.published(size), 131072)
    assert total == int(gib * GIB) + sliding_layers * 127 * PER_TOKEN


@pytest.mark.parametrize(("tokens", "kept"), [(1, 1), (126, 126), (127, 127), (128, 127), (129, 127)])
def test_sliding_layers(tokens: int, kept: int) -> None:
    """Sliding layers keep all tokens up to the window less one, and no more."""
    spec = replace(ModelSpec.published("20b"), num_hidden_layers=1, layer_types=("sliding_attention",))
    assert kv_cache_bytes(spec, tokens) == kept * PER_TOKEN


def test_layer_types_count() -> None:
    """The cache follows layer_types, not the number of layers."""
    spec = ModelSpec.published("20b")
    everything = replace(spec, layer_types=("full_attention",) * 24)
    assert kv_cache_bytes(everything, 131072) == 24 * 131072 * PER_TOKEN


def test_kv_cache_elements() -> None:
    """An 8-bit cache takes half of a bf16 one."""
    spec = ModelSpec.published("120b")
    assert 2 * kv_cache_bytes(spec, 8192, bytes_per_element=1) == kv_cache_bytes(spec, 8192)


def test_never_falls() -> None:
    """More context never takes less memory."""
    spec = ModelSpec.published("20b")
    lengths = [*range(1, 300), *range(300, 131073, 997), 131072]
    needed = [kv_cache_bytes(spec, length) for length in lengths]
    assert needed == sorted(needed)


@pytest.mark.parametrize("recipe", ["hybrid", "nf4", "bf16"])
def test_estimate_adds_up(recipe: str) -> None:
    """Weights are the plan's bytes, the total is exact, and what is left out is named."""
    plan = make_plan(ModelSpec.published("20b"), built_in(recipe))
    needed = estimate(plan, 8192)
    assert needed.weights == plan.nbytes
    assert needed.kv_cache == kv_cache_bytes(plan.spec, 8192)
    assert needed.total == needed.weights + needed.kv_cache
    assert needed.not_counted == ("compute buffers", "driver context", "fragmentation")


@pytest.mark.parametrize("length", [-1, 0, 131073])
def test_length_out_of_range(length: int) -> None:
    """A context the model does not have is refused, with the range it has."""
    plan = make_plan(ModelSpec.published("20b"), built_in("hybrid"))
    with pytest.raises(UsageError, match="1 to 131072"):
        estimate(plan, length)
