"""What stock paths get wrong on gpt-oss in silence: seen here to be so still, and that ours does not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils.quantization_config import Mxfp4Config

from ossquant.errors import CheckpointError, UsageError
from ossquant.plan import make_plan
from ossquant.recipe import built_in, parse_recipe
from ossquant.runtime.load import load_model, placement
from ossquant.spec import ModelSpec

IDS = torch.arange(5, 45)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def planned_4bit(model: torch.nn.Module, scheme: str) -> int:
    return make_plan(ModelSpec.from_config(model.config.to_dict()), built_in(scheme)).parameters_4bit


def test_experts_left_in_16_bits(quantized: dict[str, Path]) -> None:
    """Stock load_in_4bit quantizes attention alone, a fraction of the weights; ours the experts, too."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype="bfloat16")  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(quantized["bf16"], quantization_config=config)
    in_4bit = sum(2 * module.weight.numel() for module in stock.modules() if isinstance(module, Linear4bit))
    assert stock.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    ours, _ = load_model(quantized["bf16"], quantization_config=config)
    assert placement(ours).parameters_4bit == planned_4bit(ours, "nf4") > 4 * in_4bit


def test_random_experts(trained: Path, tmp_path: Path) -> None:
    """Without quantization_config stock transformers makes experts up; ours reads what the tensors are."""
    folder = tmp_path / "dropped"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    right, _ = load_model(trained, scheme="mxfp4")
    made_up = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert not torch.allclose(logits(made_up), logits(right), atol=0.1)
    ours, _ = load_model(folder, scheme="mxfp4")
    torch.testing.assert_close(logits(ours), logits(right), rtol=0, atol=0)


def test_bf16_under_the_names_of_mxfp4(trained: Path, tmp_path: Path) -> None:
    """What it expanded, transformers before 5.24 saves under MXFP4's names and reads back wrong; here it is refused."""
    folder = tmp_path / "saved"
    stock = AutoModelForCausalLM.from_pretrained(trained, quantization_config=Mxfp4Config(dequantize=True))
    stock.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    expanded = re.compile(r"_proj$")  # the experts' names in 5.24; attention's end in weight and bias
    renamed = {expanded.sub("_proj_blocks", name): tensor for name, tensor in saved.items()}
    assert sum(name.endswith("_blocks") for name in renamed) == 8
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError):
        load_model(folder, scheme="nf4")


def test_kernels_missing(trained: Path) -> None:
    """Where MXFP4 has no kernels stock transformers expands it to bf16; ours computes on the four bits."""
    stock = AutoModelForCausalLM.from_pretrained(trained)
    assert stock.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.bfloat16
    ours, _ = load_model(trained, scheme="mxfp4")
    assert placement(ours).parameters_4bit == planned_4bit(ours, "mxfp4") > 0
    assert placement(ours).bytes_by_device["cpu"] < sum(p.numel() * p.element_size() for p in stock.parameters()) / 2


def test_block_size_that_does_not_divide() -> None:
    """bitsandbytes takes a block that straddles rows, and is wrong on 2-D weights; here it is refused."""
    table = {"format": "nf4", "block_size": 128}
    with pytest.raises(UsageError, match="128"):
        parse_recipe({"name": "wide", "why": "wide blocks", "experts": table, "attention": table}, "wide.toml")
