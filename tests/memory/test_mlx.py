"""What mlx-lm's server takes, against what MLX counted when it ran layers of the 20b's shape."""

from functools import cache
from typing import Any

import pytest

from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import find_device
from ossquant.layout import Role
from ossquant.memory import MemoryEstimate, Workload, estimate, parse_engine
from ossquant.memory.mlx import kv_cache_bytes
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec


@cache
def plan_of(size: str) -> Plan:
    return make_plan(ModelSpec.published(size), FORMATS["mxfp4"])


def needed(size: str, **asked: Any) -> MemoryEstimate:
    return estimate(plan_of(size), parse_engine("mlx"), Workload(**asked), find_device("m4max"))


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_weights(size: str) -> None:
    """Weights are the published bytes: mx.get_active_memory was 80 bytes above them."""
    assert needed(size).weights.low == needed(size).weights.high == plan_of(size).nbytes
    assert needed(size).host_weights == 0


@pytest.mark.parametrize(("tokens", "sliding", "full"), [(64, 131072, 524288), (256, 524288, 524288)])
def test_counted_cache(tokens: int, sliding: int, full: int) -> None:
    """A layer's cache is what nbytes of RotatingKVCache and KVCache said after a prompt; mlx-lm 0.32.2, 2026-11-26."""
    assert kv_cache_bytes(plan_of("20b"), Workload(max_model_len=tokens)) == 12 * (sliding + full)


def test_sliding_layers() -> None:
    """While a long prompt is read a sliding layer holds the window less a token and a chunk, a full one everything."""
    for chunk, held in ((None, 127 + 2048), (512, 127 + 512)):
        workload = Workload(max_model_len=131072, max_num_batched_tokens=chunk)
        assert kv_cache_bytes(plan_of("20b"), workload) == 12 * 2048 * (131072 + held)


def test_kept_conversations() -> None:
    """As many conversations as run are kept beside them; a fresh server keeps none."""
    term = needed("20b", max_num_seqs=3).kv_cache
    running = kv_cache_bytes(plan_of("20b"), Workload(max_num_seqs=3))
    assert (term.low, term.expected, term.high) == (running, 2 * running, 2 * running)
    assert running == 3 * kv_cache_bytes(plan_of("20b"), Workload())


@pytest.mark.parametrize(("tokens", "counted"), [(64, 17240778), (256, 85672996)])
def test_counted_layer(tokens: int, counted: int) -> None:
    """What MLX held above weights and cache while two layers read a prompt, a CPU's scores included, is covered."""
    term = needed("20b", max_model_len=131072, max_num_batched_tokens=8192).compute
    assert term.low <= counted * 8192 / tokens <= term.high


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_loading(size: str) -> None:
    """Before any prompt, loading holds three layers' gate_up_proj twice; so it was for four layers and for sixteen."""
    plan = plan_of(size)
    split = 3 * plan.role_nbytes[Role.EXPERTS] // plan.spec.num_hidden_layers * 2 // 3
    assert needed(size, max_model_len=1).compute.expected == split


def test_prompts_at_once() -> None:
    """Prompts that are read at once each take a chunk's activations."""
    one, four = (needed("20b", max_num_seqs=count, max_num_batched_tokens=8192).compute.high for count in (1, 4))
    assert four == 4 * one


def test_dtype() -> None:
    """The cache is in 16 bits."""
    assert needed("20b", kv_cache_dtype="bf16") == needed("20b")
    with pytest.raises(UsageError, match="kv_cache_dtype cannot be 'q8_0' here"):
        needed("20b", kv_cache_dtype="q8_0")
