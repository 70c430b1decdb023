"""What a checkpoint holds, byte for byte."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role
from ossquant.plan import Plan, TensorPlan, make_plan, read_plan
from ossquant.recipe import Recipe, built_in
from ossquant.scheme import BNB_FORMATS, Scheme, StoredTensor
from ossquant.spec import ModelSpec, alternating_layer_types

GOLDEN = Path(__file__).parent / "golden"
BNB = [Scheme(kind, block, double) for kind in BNB_FORMATS for block in (32, 64) for double in (True, False)]
PUBLISHED = Recipe("mxfp4", "as published", {Role.EXPERTS: Scheme("mxfp4")})
# every form a checkpoint may have
FORMS = [
    Recipe(f"{experts} with {attention}", "", {Role.EXPERTS: experts, Role.ATTENTION: attention})
    for experts in (Scheme("mxfp4"), Scheme("bf16"), *BNB)
    for attention in (Scheme("bf16"), *BNB)
]
SMALL = ModelSpec(
    num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, hidden_size=192, intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64, sliding_window=16,
    max_position_embeddings=4096, layer_types=alternating_layer_types(1),
)  # fmt: skip


def stored_by(plan: Plan) -> dict[str, StoredTensor]:
    return {part.name: part for entry in plan.tensors for part in entry.stored}


@pytest.mark.parametrize(("size", "parameters"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_parameters(size: str, parameters: int) -> None:
    """The 20b has 20,914,757,184 parameters and the 120b 116,829,156,672, however they are stored."""
    for recipe in (PUBLISHED, built_in("hybrid"), built_in("nf4"), built_in("bf16")):
        assert make_plan(ModelSpec.published(size), recipe).parameters == parameters


@pytest.mark.parametrize(
    ("recipe", "small", "large"),
    [
        (PUBLISHED, 13_761_264_768, 65_248_815_744),  # the 20b's index says the same
        (built_in("hybrid"), 12_815_980_080, 63_830_888_712),
        (built_in("nf4"), 12_523_994_160, 62_078_973_192),
        (built_in("fp4"), 12_523_994_160, 62_078_973_192),
        (built_in("nf4").with_double_quant(False), 13_442_998_032, 67_459_810_392),
        (built_in("bf16"), 41_829_514_368, 233_658_313_344),
    ],
    ids=lambda value: value.name if isinstance(value, Recipe) else "",
)
def test_bytes(recipe: Recipe, small: int, large: int) -> None:
    """What each scheme takes is known to the byte, for both models."""
    assert [make_plan(ModelSpec.published(size), recipe).nbytes for size in ("20b", "120b")] == [small, large]


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_golden(size: str) -> None:
    """The mxfp4 plan is the published checkpoint: every name, dtype and shape, and no other."""
    golden = json.loads((GOLDEN / f"gpt-oss-{size}.json").read_text())
    layers = {f"model.layers.{n}.{name}": v for n in range(golden["layers"]) for name, v in golden["layer"].items()}
    plan = make_plan(ModelSpec.published(size), PUBLISHED)
    found = {name: [part.dtype, list(part.shape)] for name, part in stored_by(plan).items()}
    assert found == golden["model"] | layers
    assert (len(found), plan.nbytes) == (golden["tensors"], golden["total_size"])


@pytest.mark.parametrize("recipe", [PUBLISHED, *FORMS], ids=lambda recipe: recipe.name)
def test_bytes_by_formula(recipe: Recipe) -> None:
    """A plan adds up without listing its tensors, and to what listing them gives, tensor by tensor."""
    plan = make_plan(SMALL, recipe)
    for entry in plan.tensors:
        assert entry.nbytes == sum(part.nbytes for part in entry.stored)
    assert plan.nbytes == sum(part.nbytes for part in stored_by(plan).values())


def test_large_plan_is_lazy() -> None:
    """The bytes of the 120b in NF4 are known without listing its 65,703 tensors."""
    plan = make_plan(ModelSpec.published("120b"), built_in("nf4"))
    assert plan.nbytes and plan.parameters
    assert not any("stored" in vars(entry) for entry in plan.tensors)
    assert len(stored_by(plan)) == 65_703


def test_by_role() -> None:
    """The table by role adds up to the plan, the largest role first, and counts what is in 4 bits."""
    plan = make_plan(ModelSpec.published("20b"), built_in("hybrid"))
    totals = plan.by_role()
    assert sum(total.nbytes for total in totals) == plan.nbytes
    assert sum(total.parameters for total in totals) == plan.parameters
    assert sum(total.tensors for total in totals) == len(stored_by(plan))
    assert [total.nbytes for total in totals] == sorted((total.nbytes for total in totals), reverse=True)
    assert (totals[0].role, totals[0].bits_per_weight) == (Role.EXPERTS, 4.25)
    assert plan.parameters_4bit == 19_110_297_600 + 24 * (2 * 4096 + 2 * 512) * 2880


def test_straddling_block() -> None:
    """A model whose rows do not divide into blocks has no plan, and the first such tensor is named."""
    narrow = replace(SMALL, intermediate_size=96)
    with pytest.raises(UnsupportedError, match=r"down_proj: rows of 96 .* blocks of 64"):
        make_plan(narrow, built_in("nf4"))
    assert make_plan(narrow, built_in("hybrid")).nbytes


@pytest.mark.parametrize("recipe", [PUBLISHED, *FORMS], ids=lambda recipe: recipe.name)
def test_recognised(recipe: Recipe) -> None:
    """Headers alone tell every form apart, block size and double quantization included."""
    plan = make_plan(SMALL, recipe)
    assert read_plan(SMALL, stored_by(plan)) == plan


DAMAGED = [PUBLISHED, built_in("hybrid"), built_in("nf4"), built_in("fp4").with_double_quant(False), built_in("bf16")]


def parts(recipe: Recipe) -> Iterator[tuple[TensorPlan, StoredTensor, set[str]]]:
    """Each stored tensor, and the names by which an error may call it: its own.

    Of the first matrix of a role, by which forms are told apart, the matrix is enough.
    """
    firsts = ("experts.gate_up_projs.0.weight", "experts.gate_up_proj", "q_proj.weight")
    for entry in make_plan(SMALL, recipe).tensors:
        for part in entry.stored:
            first = any(first in part.name for first in firsts) and not part.name.endswith("bias")
            yield entry, part, {entry.tensor.name if first else part.name}


@pytest.mark.parametrize("recipe", DAMAGED, ids=lambda recipe: recipe.name)
def test_missing(recipe: Recipe) -> None:
    """Whichever tensor is missing, it is named."""
    stored = stored_by(make_plan(SMALL, recipe))
    for _, part, names in parts(recipe):
        with pytest.raises(CheckpointError) as error:
            read_plan(SMALL, {name: tensor for name, tensor in stored.items() if name != part.name})
        assert any(name in error.value.message for name in names), part.name


@pytest.mark.parametrize("recipe", DAMAGED, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    "damage",
    [
        lambda part: replace(part, dtype="F32" if part.dtype != "F32" else "BF16"),
        lambda part: replace(part, dtype="I8" if part.dtype == "U8" else "F16"),
        lambda part: replace(part, shape=(*part.shape, 1)),
        lambda part: replace(part, shape=(part.shape[0] * 2 + 5000, *part.shape[1:])),
        lambda part: replace(part, shape=()),
    ],
    ids=["dtype", "same width", "dimension", "rows", "scalar"],
)
def test_wrong(recipe: Recipe, damage: object) -> None:
    """Whichever tensor has another dtype or shape than config.json asks for, it is named."""
    stored = stored_by(make_plan(SMALL, recipe))
    for _, part, names in parts(recipe):
        with pytest.raises(CheckpointError) as error:
            read_plan(SMALL, stored | {part.name: damage(part)})  # type: ignore[operator]
        assert any(name in error.value.message for name in names), part.name


@pytest.mark.parametrize("recipe", DAMAGED, ids=lambda recipe: recipe.name)
def test_unexpected(recipe: Recipe) -> None:
    """A tensor that is no part of the model is named."""
    stored = stored_by(make_plan(SMALL, recipe))
    for name in ("model.layers.1.input_layernorm.weight", "score.weight", "model.layers.0.self_attn.sinks_absmax"):
        with pytest.raises(CheckpointError, match=f"'{name}' is not part"):
            read_plan(SMALL, stored | {name: StoredTensor(name, "BF16", (192,))})


@pytest.mark.parametrize("name", ["x" * 10**6, "\x1b[2J\nerror: none"], ids=["long", "control characters"])
def test_hostile_name(name: str) -> None:
    """An unexpected tensor's name neither fills the screen nor steers the terminal."""
    stored = stored_by(make_plan(SMALL, PUBLISHED))
    with pytest.raises(CheckpointError) as error:
        read_plan(SMALL, stored | {name: StoredTensor(name, "BF16", (192,))})
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_two_forms_at_once() -> None:
    """Experts that stand there in two forms are refused."""
    stored = stored_by(make_plan(SMALL, PUBLISHED))
    with pytest.raises(CheckpointError, match="not part"):
        read_plan(SMALL, stored | stored_by(make_plan(SMALL, built_in("bf16"))))


def test_float32_source() -> None:
    """Weights of another float are unsupported, and the error says what to save them as."""
    stored = stored_by(make_plan(SMALL, built_in("bf16")))
    wide = {name: replace(part, dtype="F32") for name, part in stored.items()}
    with pytest.raises(UnsupportedError, match="bfloat16"):
        read_plan(SMALL, wide)
