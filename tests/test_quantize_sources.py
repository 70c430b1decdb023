"""A fine-tune in bf16 as transformers saves it, in several shards, through every scheme and killed on the way."""

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssForCausalLM

from conftest import SCHEMES, killed
from ossquant.checkpoint.reader import INDEX, JOB, open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.layout import Role
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.verify import verify

SHARD = 300_000
OPERATIONS = (12, 25, 40)  # on files of the output, after which a run is killed; an undisturbed one has more than 60
EXPERTS = ("gate_up_proj", "down_proj")
KEPT = set(Role) - {Role.EXPERTS, Role.ATTENTION}
# relative error of 4 bits on normal weights
LIMITS = {"bf16": (0, 0), "mxfp4": (0.13, 0), "int4": (0.13, 0), "hybrid": (0.13, 0.11), "nf4": (0.11, 0.11),
          "fp4": (0.14, 0.14)}  # fmt: skip


@pytest.fixture(scope="module")
def fine_tune(quantized: dict[str, Path], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in bf16, with every weight a little off its MXFP4 value, as transformers saves it."""
    folder = tmp_path_factory.mktemp("tuned") / "fine-tune"
    model = GptOssForCausalLM.from_pretrained(quantized["bf16"], dtype=torch.bfloat16)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.1 * weights.std() * torch.randn(weights.shape, generator=random, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="600KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(trained / name, folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """The files that the journal calls done, each with its inode and time of change."""
    if not (output / JOB).exists():
        return {}
    states = {}
    for name in json.loads((output / JOB).read_bytes())["done"]:
        path = output / f"{name}.partial"
        status = (path if path.exists() else output / name).stat()
        states[name] = status.st_ino, status.st_mtime_ns
    return states


def test_the_source(fine_tune: Path) -> None:
    """It is what the issue calls a fine-tune: several shards, experts fused and transposed in bf16, no quantization."""
    assert len(list(fine_tune.glob("model-*.safetensors"))) >= 4
    assert (fine_tune / INDEX).exists()
    config = json.loads((fine_tune / "config.json").read_text())
    assert "quantization_config" not in config
    stack = tensors_of(fine_tune)["model.layers.0.mlp.experts.gate_up_proj"]
    assert (stack.dtype, stack.shape) == (torch.bfloat16, (8, config["hidden_size"], 2 * config["intermediate_size"]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_killed_and_resumed(scheme: str, fine_tune: Path, tmp_path: Path) -> None:
    """Killed three times on its way to any scheme, it keeps what is done and ends bit for bit as if never disturbed."""
    out, recipe = tmp_path / "killed", built_in(scheme)
    quantize(fine_tune, tmp_path / "undisturbed", recipe, max_shard_size=SHARD)
    before: dict[str, tuple[int, int]] = {}
    for operation in OPERATIONS:
        assert killed(lambda: quantize(fine_tune, out, recipe, max_shard_size=SHARD), out, operation)
        with pytest.raises(CheckpointError, match=r"unfinished job|no config\.json"):
            open_checkpoint(out)
        after = finished(out)
        assert before.items() <= after.items()
        before = after
    assert before
    assert quantize(fine_tune, out, recipe, max_shard_size=SHARD).resumed
    assert {name: _state(out / name) for name in before} == before
    assert contents(out) == contents(tmp_path / "undisturbed")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, fine_tune: Path, tmp_path: Path) -> None:
    """Every scheme is whole, keeps what it does not quantize to the bit, and the rest as near as 4 bits are."""
    quantize(fine_tune, tmp_path / "out", built_in(scheme), max_shard_size=SHARD)
    report = verify(tmp_path / "out", fine_tune)
    assert report.whole
    assert report.comparison is not None
    errors = {role: error.relative for role, error in report.comparison.roles.items()}
    assert all(errors[role] == 0 for role in KEPT)
    for role, limit in zip((Role.EXPERTS, Role.ATTENTION), LIMITS[scheme], strict=True):
        assert limit * 0.6 <= errors[role] <= limit


def test_bf16_is_a_copy(fine_tune: Path, tmp_path: Path) -> None:
    """In bf16 every tensor has the bytes that transformers wrote."""
    quantize(fine_tune, tmp_path / "out", built_in("bf16"))
    source, result = tensors_of(fine_tune), tensors_of(tmp_path / "out")
    assert source.keys() == result.keys()
    assert all(torch.equal(source[name].view(torch.int16), result[name].view(torch.int16)) for name in source)


def test_nf4_is_that_of_bitsandbytes(fine_tune: Path, tmp_path: Path) -> None:
    """Each expert's codes are what bitsandbytes makes of the expert's own matrix, transposed back."""
    quantize(fine_tune, tmp_path / "out", built_in("nf4"))
    source, result = tensors_of(fine_tune), tensors_of(tmp_path / "out")
    for name in EXPERTS:
        stack = source[f"model.layers.2.mlp.experts.{name}"]
        for expert, weights in enumerate(stack.mT):
            codes, _ = bnb.quantize_4bit(weights.contiguous().float(), blocksize=64, quant_type="nf4")
            assert torch.equal(codes, result[f"model.layers.2.mlp.experts.{name}s.{expert}.weight"])
