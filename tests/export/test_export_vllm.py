"""What vLLM asks for of an INT4 checkpoint: all of it is there, and every kind of fault is named."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.export.vllm import check_coverage, parameters
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.scheme import StoredTensor
from ossquant.spec import ModelSpec

Stored = dict[str, StoredTensor]
LAYER = "model.layers.3.mlp.experts"


def stored_of(size: str, scheme: str = "int4") -> Stored:
    plan = make_plan(ModelSpec.published(size), built_in(scheme))
    return {part.name: part for entry in plan.tensors for part in entry.stored}


@pytest.fixture(scope="module")
def whole() -> Stored:
    """The stored tensors of the 20b in INT4."""
    return stored_of("20b")


@pytest.mark.parametrize(("size", "layers", "experts"), [("20b", 24, 32), ("120b", 36, 128)])
def test_published_shapes(size: str, layers: int, experts: int) -> None:
    """INT4 of both published models fills every parameter, each by tensors of its own, without one left over."""
    stored, spec = stored_of(size), ModelSpec.published(size)
    assert check_coverage(spec, stored) == 3 + 15 * layers
    asked = Counter(tensor.name for tensors in parameters(spec).values() for tensor in tensors)
    assert set(asked.values()) == {1}
    assert asked.keys() == stored.keys()
    assert len(asked) == 3 + layers * (15 + 4 * experts)


def test_what_is_written(quantized: dict[str, Path]) -> None:
    """The INT4 checkpoint of the trained model has what vLLM asks for."""
    with open_checkpoint(quantized["int4"]) as checkpoint:
        assert check_coverage(checkpoint.spec, checkpoint.stored) == 3 + 15 * 4


@pytest.mark.parametrize("scheme", ["mxfp4", "bf16", "nf4"])
def test_other_forms(scheme: str) -> None:
    """A checkpoint in another form has not what INT4 kernels ask for."""
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.\S+' is (missing|U8 \[\d+, 1\]); vLLM fills"):
        check_coverage(ModelSpec.published("20b"), stored_of("20b", scheme))


def shaped(stored: Stored, name: str) -> None:
    stored[name] = replace(stored[name], shape=(*stored[name].shape[:-1], stored[name].shape[-1] + 1))


def typed(stored: Stored, name: str) -> None:
    stored[name] = replace(stored[name], dtype="F32")


NAMES = {
    f"{LAYER}.31.w13_weight_packed": ("model.layers.3.mlp.experts.routed_experts.w13_weight_packed", "I32 [5760, 361]"),
    f"{LAYER}.0.w13_weight_scale": ("model.layers.3.mlp.experts.routed_experts.w13_weight_scale", "BF16 [5760, 91]"),
    f"{LAYER}.7.w2_weight_packed": ("model.layers.3.mlp.experts.routed_experts.w2_weight_packed", "I32 [2880, 361]"),
    f"{LAYER}.gate_up_proj_bias": ("model.layers.3.mlp.experts.routed_experts.w13_bias", "BF16 [32, 5761]"),
    f"{LAYER}.down_proj_bias": ("model.layers.3.mlp.experts.routed_experts.w2_bias", "BF16 [32, 2881]"),
    "model.layers.3.mlp.router.weight": ("model.layers.3.mlp.router.weight", "BF16 [32, 2881]"),
    "model.layers.0.self_attn.k_proj.weight": ("model.layers.0.attn.qkv_proj.weight", "BF16 [512, 2881]"),
    "model.layers.0.self_attn.v_proj.bias": ("model.layers.0.attn.qkv_proj.bias", "BF16 [513]"),
    "model.layers.23.self_attn.sinks": ("model.layers.23.attn.sinks", "BF16 [65]"),
    "model.embed_tokens.weight": ("model.embedding.weight", "BF16 [201088, 2881]"),
    "lm_head.weight": ("lm_head.weight", "BF16 [201088, 2881]"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [Stored.pop, shaped, typed], ids=["missing", "wrong shape", "wrong dtype"])
def test_faults(whole: Stored, name: str, damage: Callable[[Stored, str], object]) -> None:
    """A tensor that is missing, or has another shape or dtype, is named with the parameter that it was to fill."""
    stored = dict(whole)
    damage(stored, name)
    parameter, shape = NAMES[name]
    with pytest.raises(CheckpointError) as error:
        check_coverage(ModelSpec.published("20b"), stored)
    found = {Stored.pop: "is missing", shaped: f"is {shape}", typed: "is F32 ["}[damage]
    assert error.value.message.startswith(f"'{name}' {found}")
    assert error.value.message.endswith(f"; vLLM fills '{parameter}' with it")


def test_left_over(whole: Stored) -> None:
    """A tensor that vLLM does not know is named; vLLM would say nothing."""
    name = "model.layers.3.mlp.experts.extra"
    with pytest.raises(CheckpointError, match=f"'{name}': vLLM would pass over it"):
        check_coverage(ModelSpec.published("20b"), whole | {name: StoredTensor(name, "BF16", (1,))})


@pytest.mark.parametrize("instead", [True, False], ids=["instead", "beside"])
def test_trap(whole: Stored, instead: bool) -> None:
    """Names as transformers' modules would give them, which vLLM skips without a word, are found out."""
    trap = f"{LAYER}.5.gate_up_proj.weight_packed"
    stored = dict(whole)
    tensor = stored[f"{LAYER}.5.w13_weight_packed"]
    if instead:
        stored.pop(tensor.name)
    stored[trap] = replace(tensor, name=trap)
    expected = f"'{tensor.name}' is missing; vLLM fills" if instead else f"'{trap}': vLLM would pass over it"
    with pytest.raises(CheckpointError) as error:
        check_coverage(ModelSpec.published("20b"), stored)
    assert error.value.message.startswith(expected)
