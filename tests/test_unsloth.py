"""The layout of unsloth's 4-bit checkpoints: the same bytes under other names."""

import json
from pathlib import Path

import pytest

from conftest import run_cli
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import UsageError
from ossquant.layout import Role
from ossquant.plan import make_plan, read_plan
from ossquant.quantize import quantize
from ossquant.recipe import Recipe, built_in
from ossquant.scheme import Scheme
from ossquant.spec import ModelSpec
from ossquant.verify import verify

SHARD = 10**6


@pytest.fixture(scope="module")
def unsloth(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The trained model as unsloth's 4-bit checkpoints have it."""
    folder = tmp_path_factory.mktemp("unsloth") / "out"
    quantize(trained, folder, built_in("nf4").for_unsloth(), max_shard_size=SHARD)
    return folder


def tensors_of(folder: Path) -> dict[str, bytes]:
    found = {}
    with open_checkpoint(folder) as checkpoint:
        for name, part in checkpoint.stored.items():
            data = bytearray(part.nbytes)
            checkpoint.read_into(name, memoryview(data))
            found[name] = bytes(data)
    return found


def test_the_router_alone_has_another_name(unsloth: Path, quantized: dict[str, Path]) -> None:
    """Each tensor of our nf4 layout is there, byte for byte; a router's name has 'linear' in it."""
    ours = tensors_of(quantized["nf4"])
    assert tensors_of(unsloth) == {name.replace(".router.", ".router.linear."): data for name, data in ours.items()}


def test_names_that_unsloth_has(unsloth: Path) -> None:
    """The names in the files are the parameters of unsloth_zoo 2026.10's own gpt-oss modules."""
    names = set(tensors_of(unsloth))
    layer = "model.layers.3."
    modules = [f"mlp.experts.{kind}_projs.{e}" for kind in ("gate_up", "down") for e in range(8)]
    modules += [f"self_attn.{letter}_proj" for letter in "qkvo"]
    statistics = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
    expected = {f"{layer}{module}.{part}" for module in modules for part in ("weight", "bias")}
    expected |= {f"{layer}{module}.weight.{part}" for module in modules for part in statistics}
    expected |= {f"{layer}mlp.router.linear.{part}" for part in ("weight", "bias")}
    expected |= {f"{layer}{rest}" for rest in ("self_attn.sinks", "input_layernorm.weight",
                                               "post_attention_layernorm.weight")}  # fmt: skip
    assert {name for name in names if name.startswith(layer)} == expected
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    }  # fmt: skip


def test_config_is_bitsandbytes_own(unsloth: Path) -> None:
    """transformers reads the quantization_config as its own, and ossquant as the nf4 recipe."""
    from transformers import AutoConfig, BitsAndBytesConfig

    from ossquant.runtime.bnb_config import recipe_from_bitsandbytes

    stated = AutoConfig.from_pretrained(unsloth).quantization_config
    config = BitsAndBytesConfig.from_dict(stated)
    assert config.quantization_method() == "nf4"
    assert {key: value for key, value in config.to_dict().items() if key in stated} == stated
    recipe, _ = recipe_from_bitsandbytes(stated)
    assert recipe.schemes == built_in("nf4").schemes


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("size", ["20b", "120b"])
def test_a_plan_is_read_back(size: str, block_size: int, double_quant: bool) -> None:
    """On both models the names say that the layout is unsloth's, and the bytes are those of our own."""
    scheme = Scheme("nf4", block_size, double_quant)
    recipe = Recipe("nf4", "", dict.fromkeys((Role.EXPERTS, Role.ATTENTION), scheme))
    plan = make_plan(ModelSpec.published(size), recipe.for_unsloth())
    stored = {part.name: part for entry in plan.tensors for part in entry.stored}
    assert plan.unsloth
    assert read_plan(plan.spec, stored) == plan
    assert plan.nbytes == make_plan(plan.spec, recipe).nbytes


def test_there_and_back(unsloth: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """From our nf4 to unsloth's layout and back: the very bytes, config.json included."""
    quantize(quantized["nf4"], tmp_path / "there", built_in("nf4").for_unsloth(), max_shard_size=SHARD)
    assert tensors_of(tmp_path / "there") == tensors_of(unsloth)
    quantize(tmp_path / "there", tmp_path / "back", built_in("nf4"), max_shard_size=SHARD)
    for path in quantized["nf4"].iterdir():
        if path.suffix == ".safetensors" or path.name == "config.json":
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_verify_knows_it(unsloth: Path, quantized: dict[str, Path], trained: Path) -> None:
    """It is whole, as far from its source as our own layout, and not at all from that."""
    assert verify(unsloth).whole
    report = verify(unsloth, quantized["nf4"])
    assert report.comparison is not None
    assert not any(distance.squares for distance in report.comparison.roles.values())
    ours, theirs = (verify(folder, trained).comparison for folder in (quantized["nf4"], unsloth))
    assert ours is not None and theirs is not None
    assert ours.roles == theirs.roles


@pytest.mark.parametrize("scheme", ["hybrid", "fp4", "mxfp4", "bf16", "int4"])
def test_what_unsloth_has_no_module_for_is_refused(scheme: str) -> None:
    """Only nf4 experts beside nf4 attention can be named so."""
    with pytest.raises(UsageError, match="unsloth"):
        built_in(scheme).for_unsloth()


def test_a_4_bit_head_is_refused() -> None:
    """unsloth keeps lm_head in 16 bits."""
    with pytest.raises(UsageError, match="lm_head"):
        Recipe("head", "", dict.fromkeys((Role.EXPERTS, Role.ATTENTION, Role.LM_HEAD), Scheme("nf4"))).for_unsloth()


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_warns_of_stock_transformers(dry: bool, trained: Path, tmp_path: Path) -> None:
    """--to-unsloth says what stock transformers makes of it; without it nothing is written that way."""
    target = ["--dry-run"] if dry else [tmp_path / "out"]
    result = run_cli("quantize", trained, *target, "--scheme", "nf4", "--to-unsloth")
    assert result.returncode == 0, result.stderr
    assert "random" in result.stderr
    assert run_cli("quantize", trained, tmp_path / "hybrid", "--to-unsloth").returncode == 2
    if not dry:
        stated = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
        assert stated["quant_method"] == "bitsandbytes"
        assert verify(tmp_path / "out").whole
