"""Which scheme each role gets."""

from pathlib import Path
from typing import Any

import pytest

from ossquant import load_model
from ossquant.errors import UsageError
from ossquant.layout import Role
from ossquant.plan import make_plan
from ossquant.quantize import quantize
from ossquant.recipe import BUILT_IN, Recipe, built_in, load_recipe, parse_recipe
from ossquant.runtime.generate import generate
from ossquant.runtime.load import placement
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec
from ossquant.verify import verify

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
NF4: dict[str, Any] = {"format": "nf4"}
WHOLE: dict[str, Any] = {"name": "mine", "why": "to test", "experts": NF4, "attention": NF4}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_recipes_load(path: Path, size: str) -> None:
    """Every recipe in recipes/ carries its file's name and gives a plan for both models."""
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    plan = make_plan(ModelSpec.published(size), recipe)
    assert plan.scheme(Role.EXPERTS) == recipe.schemes[Role.EXPERTS]
    assert plan.scheme(Role.ATTENTION) == recipe.schemes[Role.ATTENTION]


def test_recipes_match_the_schemes() -> None:
    """Each scheme has a recipe of its name, with the same choices; the others are a finer nf4 and two with lm_head."""
    found = {path.stem: load_recipe(path).schemes for path in RECIPES}
    head = {Role.LM_HEAD: Scheme("nf4")}
    others = {
        "nf4-finest": dict.fromkeys((Role.EXPERTS, Role.ATTENTION), Scheme("nf4", 32, double_quant=False)),
        "nf4-smallest": {**BUILT_IN["nf4"].schemes, **head},
        "hybrid-smallest": {**BUILT_IN["hybrid"].schemes, **head},
    }
    assert found == {name: recipe.schemes for name, recipe in BUILT_IN.items()} | others


@pytest.mark.parametrize("name", ["hybrid-smallest", "nf4-smallest", "nf4-finest"])
def test_recipes_run(name: str, trained: Path, tmp_path: Path) -> None:
    """A recipe that no scheme stands for makes a whole checkpoint, which loads in 4 bits and knows what was learnt."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml")
    plan = quantize(trained, tmp_path / name, recipe).result
    assert verify(tmp_path / name).whole
    model, tokenizer = load_model(tmp_path / name)
    assert placement(model).parameters_4bit == plan.parameters_4bit
    reply = generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in reply.final


def test_unnamed_roles() -> None:
    """A role that a recipe does not name stays bf16, norms and biases always do."""
    recipe = parse_recipe({"name": "a", "why": "b", "attention": NF4}, "a.toml")
    assert recipe == Recipe("a", "b", {Role.ATTENTION: Scheme("nf4")})
    assert {recipe.scheme(role) for role in Role if role is not Role.ATTENTION} == {Scheme("bf16")}


def test_double_quant() -> None:
    """Double quantization is switched for every nf4 and fp4 role, and for no other."""
    hybrid = built_in("hybrid").with_double_quant(False)
    assert hybrid.schemes == {Role.EXPERTS: Scheme("mxfp4"), Role.ATTENTION: Scheme("nf4", double_quant=False)}
    assert built_in("fp4").with_double_quant(False).with_double_quant(True) == built_in("fp4")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exprts": NF4}, "unknown key 'exprts'.*experts"),
        ({"norm": {"format": "bf16"}}, "unknown key 'norm'"),
        ({"name": ""}, "'name'"),
        ({"why": 3}, "'why'"),
        ({"experts": "nf4"}, "experts.*needs a format"),
        ({"experts": {}}, "experts.*needs a format"),
        ({"experts": {"format": "nf5"}}, "experts.*'nf5'.*did you mean 'nf4'"),
        ({"attention": {"format": "mxfp4"}}, "attention.*cannot be 'mxfp4'"),
        ({"lm_head": {"format": "mxfp4"}}, "lm_head.*cannot be 'mxfp4'"),
        ({"experts": {"format": "int4"}}, "int4 experts are for vLLM"),
        ({"experts": NF4 | {"blocksize": 32}}, "unknown key 'blocksize'.*block_size"),
        ({"experts": {"format": "mxfp4", "block_size": 32}}, "unknown key 'block_size'"),
        ({"experts": NF4 | {"block_size": 128}}, "32 or 64, not 128"),
        ({"experts": NF4 | {"block_size": 64.0}}, "32 or 64, not 64.0"),
        ({"experts": NF4 | {"block_size": [64]}}, "32 or 64"),
        ({"experts": NF4 | {"double_quant": 1}}, "double_quant must be true or false"),
        ({"attention": {"format": "bf16"}}, "experts in nf4 need attention"),
    ],
)
def test_refused(change: dict[str, Any], words: str) -> None:
    """A recipe that cannot be meant is refused by the key that is wrong, with the nearest right one."""
    with pytest.raises(UsageError, match=rf"^mine\.toml: .*({words})"):
        parse_recipe(WHOLE | change, "mine.toml")


def test_empty() -> None:
    """A recipe without a role is refused."""
    with pytest.raises(UsageError, match="no role"):
        parse_recipe({"name": "a", "why": "b"}, "a.toml")


@pytest.mark.parametrize(
    "text",
    [b"[experts", b"\xff\xfe", b"a = 1\na = 2", b"a = " + b"[" * 10**5],
    ids=["cut off", "bytes", "twice", "deep"],
)
def test_not_toml(text: bytes, tmp_path: Path) -> None:
    """A file that is not TOML is a usage error that names it."""
    path = tmp_path / "broken.toml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=r"broken\.toml"):
        load_recipe(path)


def test_no_file(tmp_path: Path) -> None:
    """A recipe that is not there, or is a folder, is a usage error that names it."""
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(UsageError, match=path.name):
            load_recipe(path)


@pytest.mark.parametrize(
    ("name", "words"), [("nf5", "did you mean 'nf4'"), ("NF4", "did you mean 'nf4'"), ("q4_k_m", "known: hybrid, nf4"),
                        ("int8", "did you mean 'int4'")]
)  # fmt: skip
def test_unknown_scheme(name: str, words: str) -> None:
    """An unknown scheme is answered with the nearest known one."""
    with pytest.raises(UsageError, match=words):
        built_in(name)
