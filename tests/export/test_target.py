"""What can be exported to what, and the sentence for all else."""

from itertools import product
from pathlib import Path

import pytest

from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import UnsupportedError, UsageError
from ossquant.export import safetensors
from ossquant.export.gguf import export_gguf
from ossquant.export.target import DENSE, EXPERTS, TARGETS, check_formats, check_pair, find_target
from ossquant.layout import Role
from ossquant.plan import Plan, make_plan
from ossquant.quantize import quantize
from ossquant.recipe import Recipe, gguf_recipe
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec

HYBRID_FP4 = Recipe("hybrid-fp4", "", {Role.EXPERTS: Scheme("mxfp4"), Role.ATTENTION: Scheme("fp4")})
WORKS = {
    "gguf": {"mxfp4", "bf16", "hybrid", "hybrid-fp4"},
    "ollama": {"mxfp4", "bf16", "hybrid", "hybrid-fp4"},
    "mxfp4": {"mxfp4", "bf16"},
    "vllm-int4": {"mxfp4", "bf16"},
    "unsloth": {"mxfp4", "bf16", "nf4"},
}
FORMS = ("mxfp4", "bf16", "hybrid", "hybrid-fp4", "nf4", "fp4", "int4")


@pytest.fixture(scope="module")
def forms(quantized: dict[str, Path], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained model in every form that quantize makes of it."""
    folder = tmp_path_factory.mktemp("forms") / "hybrid-fp4"
    quantize(trained, folder, HYBRID_FP4)
    return quantized | {"hybrid-fp4": folder}


def plan_of(experts: str, attention: str) -> Plan:
    recipe = Recipe("", "", {Role.EXPERTS: Scheme(experts), Role.ATTENTION: Scheme(attention)})
    return make_plan(ModelSpec.published("20b"), recipe)


def export(name: str, source: Path, output: Path) -> None:
    target = find_target(name)
    if target.recipe is None:
        export_gguf(source, output)
    else:
        with open_checkpoint(source) as checkpoint:
            safetensors.plan_export(checkpoint, target, target.recipe, str(source))
        safetensors.export(source, output, target, target.recipe)


def test_every_pair_is_decided(forms: dict[str, Path]) -> None:
    """The table below names every target, and the forms are all that a checkpoint of ours may have."""
    assert set(WORKS) == set(TARGETS)
    assert set(FORMS) == set(forms)


@pytest.mark.parametrize(("target", "form"), list(product(WORKS, FORMS)))
def test_pairs(forms: dict[str, Path], target: str, form: str, tmp_path: Path) -> None:
    """What is said to work is written; of all else the sentence says what it is and what would do."""
    with open_checkpoint(forms[form]) as checkpoint:
        if form in WORKS[target]:
            check_pair(checkpoint.plan, find_target(target), "model")
            export(target, forms[form], tmp_path / "out")
            assert (tmp_path / "out/config.json").is_file()
            return
        with pytest.raises(UnsupportedError) as error:
            check_pair(checkpoint.plan, find_target(target), "model")
    made_from = ", ".join(dict.fromkeys(form for form in FORMS if form in WORKS[target] and "-" not in form))
    held = "hybrid in fp4" if form == "hybrid-fp4" else form
    assert error.value.message == f"model is {held}, and {target} is made from {made_from}"
    assert "export the published or bf16 checkpoint it was made of" in error.value.hint
    assert all(f"{name} takes " in error.value.hint for name in TARGETS)
    with pytest.raises(UnsupportedError):
        export(target, forms[form], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mix_of_its_own() -> None:
    """A checkpoint that has no name is described."""
    with pytest.raises(UnsupportedError, match=r"mine is experts in nf4, attention in fp4, and gguf is made from"):
        check_pair(plan_of("nf4", "fp4"), TARGETS["gguf"], "mine")


def test_the_whole_sentence_is_shown() -> None:
    """Neither the sentence nor its hint is cut where errors are."""
    with pytest.raises(UnsupportedError) as error:
        check_pair(plan_of("int4", "bf16"), TARGETS["gguf"], "x" * 200)
    assert error.value.message.endswith("hybrid")
    assert error.value.hint == (
        "export the published or bf16 checkpoint it was made of. gguf takes mxfp4, bf16, hybrid; ollama takes mxfp4, "
        "bf16, hybrid; mxfp4 takes mxfp4, bf16; vllm-int4 takes mxfp4, bf16; unsloth takes mxfp4, bf16, nf4"
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ggfu", "did you mean 'gguf'?"), ("GGUF", "did you mean 'gguf'?"), ("olama", "did you mean 'ollama'?"),
     ("exl3", "known: gguf, ollama, mxfp4")],
)  # fmt: skip
def test_unknown_target(name: str, hint: str) -> None:
    """The nearest target is named, or all."""
    with pytest.raises(UsageError, match=f"unknown target '{name}'") as error:
        find_target(name)
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize("role", ["dense", "experts"])
@pytest.mark.parametrize("value", ["q4_K_M", "Q4_K", "q6_k", "q2_K_S"])
def test_k_quants(role: str, value: str) -> None:
    """Who asks for a K-quant by habit is told why gpt-oss has none, and what it has."""
    formats = {"dense": DENSE[0], "experts": EXPERTS[0]} | {role: value}
    with pytest.raises(UsageError, match=f"--{role} cannot be '{value}'") as error:
        check_formats(**formats)
    assert error.value.hint.startswith("K-quants need rows of 256, gpt-oss' have 2880; ")
    assert error.value.hint.endswith(", ".join(DENSE if role == "dense" else EXPERTS))


@pytest.mark.parametrize(("role", "value", "hint"), [("dense", "q8", "q8_0"), ("dense", "mxfp4", "known: q8_0"),
                                                     ("experts", "mxfp", "mxfp4"), ("experts", "nf4", "")])  # fmt: skip
def test_unknown_format(role: str, value: str, hint: str) -> None:
    """Another format is refused, with the nearest or all."""
    formats = {"dense": DENSE[0], "experts": EXPERTS[0]} | {role: value}
    with pytest.raises(UsageError, match=f"--{role} cannot be '{value}'") as error:
        check_formats(**formats)
    assert hint in error.value.hint


@pytest.mark.parametrize(("dense", "experts"), list(product(DENSE, EXPERTS)))
def test_known_formats(dense: str, experts: str) -> None:
    """Every dense format goes with every one of experts, on the published shapes."""
    check_formats(dense, experts)
    for size in ("20b", "120b"):
        assert make_plan(ModelSpec.published(size), gguf_recipe("", dense, experts)).nbytes > 10**10
