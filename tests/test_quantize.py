"""From the form a checkpoint has to the form a recipe asks for, in real files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ossquant.checkpoint.manifest import MANIFEST
from ossquant.checkpoint.reader import INDEX, open_checkpoint
from ossquant.checkpoint.writer import plan_shards
from ossquant.codec import bnb4, mxfp4
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role
from ossquant.quantize import compressed_tensors_config, quantize
from ossquant.recipe import BUILT_IN, Recipe, built_in
from ossquant.scheme import ITEMSIZE, Scheme, int4_prefix
from ossquant.verify import verify

FINEST = dict.fromkeys((Role.EXPERTS, Role.ATTENTION), Scheme("nf4", 32, double_quant=False))
MIXED = {Role.EXPERTS: Scheme("fp4", 32), Role.ATTENTION: Scheme("nf4", 64, double_quant=False)}
RECIPES = {
    **BUILT_IN,
    "nf4-single": built_in("nf4").with_double_quant(False),
    "nf4-finest": Recipe("nf4-finest", "", FINEST),
    "mixed": Recipe("mixed", "", MIXED),
    "attention only": Recipe("attention only", "", {Role.ATTENTION: Scheme("nf4")}),
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the safetensors library reads it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def as_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shard_size", [10**9, 400_000], ids=["one file", "shards"])
def test_plan_is_what_is_written(trained: Path, name: str, shard_size: int, tmp_path: Path) -> None:
    """The plan's bytes are those in the files, in the index and in what is read back."""
    out = tmp_path / "out"
    plan = quantize(trained, out, RECIPES[name], max_shard_size=shard_size).result
    assert plan.nbytes == sum(tensor.nbytes for tensor in tensors_of(out).values())
    sizes = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert sizes == {shard.name: shard.nbytes for shard in plan_shards(plan, shard_size)}
    if len(sizes) > 1:
        assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == plan.nbytes
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.plan == plan


@pytest.mark.parametrize("name", BUILT_IN)
def test_safetensors_library_agrees(quantized: dict[str, Path], name: str) -> None:
    """The safetensors library reads what ossquant reads; data begin on a page and every tensor is aligned."""
    with open_checkpoint(quantized[name]) as checkpoint:
        assert set(checkpoint.stored) == set(tensors_of(quantized[name]))
        for path in checkpoint.files:
            assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 4096 == 0
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                for key in file.keys():  # noqa: SIM118
                    stored, piece = checkpoint.stored[key], file.get_slice(key)
                    assert (stored.dtype, list(stored.shape)) == (piece.get_dtype(), piece.get_shape())
                    assert checkpoint.locations[key].placed.offset % ITEMSIZE[stored.dtype] == 0
                    buffer = bytearray(stored.nbytes)
                    checkpoint.read_into(key, memoryview(buffer))
                    assert buffer == as_bytes({key: file.get_tensor(key)})[key]


@pytest.mark.parametrize("name", BUILT_IN)
def test_untouched_tensors(trained: Path, quantized: dict[str, Path], name: str) -> None:
    """Embedding, head, router, norms and biases are the source's bytes, and so are the hybrid's experts."""
    source, result = as_bytes(tensors_of(trained)), as_bytes(tensors_of(quantized[name]))
    kept = {key for key in source if "_proj" not in key or key.endswith("_proj.bias")}
    assert len(kept) == 3 + 4 * 9
    if name == "hybrid":
        kept |= {key for key in source if ".experts." in key}
    assert all(result[key] == source[key] for key in kept)
    if name in ("nf4", "fp4"):
        for key in (key for key in source if key.endswith("_proj_bias")):
            rows = b"".join(result[f"{key.removesuffix('_bias')}s.{expert}.bias"] for expert in range(8))
            assert rows == source[key]


def test_bf16_values(trained: Path, quantized: dict[str, Path]) -> None:
    """The bf16 checkpoint has the published weights exactly, its expert stacks transposed."""
    source, result = tensors_of(trained), tensors_of(quantized["bf16"])
    for name in (name.removesuffix("_blocks") for name in source if name.endswith("_blocks")):
        rows = mxfp4.dequantize(source[f"{name}_blocks"].numpy(), source[f"{name}_scales"].numpy())
        assert np.array_equal(result[name].mT.contiguous().view(torch.int16).numpy().view(np.uint16), rows)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-finest", "mixed"])
def test_way_over_bf16(trained: Path, quantized: dict[str, Path], name: str, tmp_path: Path) -> None:
    """MXFP4 to bf16 to 4 bits gives the tensors that MXFP4 to 4 bits gives, bit for bit."""
    quantize(quantized["bf16"], tmp_path / "over", RECIPES[name])
    quantize(trained, tmp_path / "direct", RECIPES[name])
    assert as_bytes(tensors_of(tmp_path / "over")) == as_bytes(tensors_of(tmp_path / "direct"))


def test_hybrid_over_bf16(quantized: dict[str, Path], tmp_path: Path) -> None:
    """A hybrid made of the bf16 form has the same attention bit for bit, and experts of the same values."""
    quantize(quantized["bf16"], tmp_path / "over", built_in("hybrid"))
    over, direct = tensors_of(tmp_path / "over"), tensors_of(quantized["hybrid"])
    packed = {name.removesuffix("_blocks") for name in direct if name.endswith("_blocks")}
    for name in packed:
        found, expected = (
            mxfp4.dequantize(tensors.pop(f"{name}_blocks").numpy(), tensors.pop(f"{name}_scales").numpy())
            for tensors in (over, direct)
        )
        assert np.array_equal(found, expected)
    assert len(packed) == 8
    assert as_bytes(over) == as_bytes(direct)


def test_published_form_again(quantized: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    """From the bf16 form back to the published one, no weight changes and no other tensor."""
    quantize(quantized["bf16"], tmp_path / "back", RECIPES["mxfp4"])
    with open_checkpoint(tmp_path / "back") as back, open_checkpoint(trained) as source:
        assert back.plan == source.plan
    quantize(tmp_path / "back", tmp_path / "bf16", built_in("bf16"))
    assert as_bytes(tensors_of(tmp_path / "bf16")) == as_bytes(tensors_of(quantized["bf16"]))


def test_rounding_error(quantized: dict[str, Path], random_bf16: Path, tmp_path: Path) -> None:
    """Rounding to MXFP4 tells what it lost: nothing on MXFP4 values, and on others what the tensors show."""
    assert quantize(quantized["bf16"], tmp_path / "back", built_in("mxfp4")).mxfp4_error == 0.0
    report = quantize(random_bf16, tmp_path / "rounded", built_in("mxfp4"))
    before, after = tensors_of(random_bf16), tensors_of(tmp_path / "rounded")
    error = norm = 0.0
    for name in (name for name in before if name.endswith(("gate_up_proj", "down_proj"))):
        source = before[name].mT.double()
        parts = [after[f"{name}_{part}"].numpy() for part in ("blocks", "scales")]
        restored = torch.from_numpy(mxfp4.dequantize(*parts).view(np.int16)).view(torch.bfloat16).double()
        error += float((restored - source).pow(2).sum())
        norm += float(source.pow(2).sum())
    assert report.mxfp4_error == pytest.approx((error / norm) ** 0.5, rel=1e-9)


HEAD = {Role.EXPERTS: Scheme("mxfp4"), Role.ATTENTION: Scheme("nf4"), Role.LM_HEAD: Scheme("nf4")}


@pytest.mark.parametrize("double_quant", [True, False])
def test_lm_head_in_rows(trained: Path, tmp_path: Path, double_quant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large lm_head is coded some rows at a time, and gives what bnb4 makes of it whole."""
    monkeypatch.setattr("ossquant.quantize.WEIGHTS_AT_ONCE", 10_000)
    recipe = Recipe("head", "", HEAD).with_double_quant(double_quant)
    quantize(trained, tmp_path / "out", recipe)
    found, rows = tensors_of(tmp_path / "out"), tensors_of(trained)["lm_head.weight"]
    whole = bnb4.quantize(rows.view(torch.int16).numpy().view(np.uint16), recipe.scheme(Role.LM_HEAD))
    for suffix, part in whole.items():
        assert found[f"lm_head.weight{suffix}"].numpy().tobytes() == part.tobytes()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.plan.scheme(Role.LM_HEAD) == recipe.scheme(Role.LM_HEAD)
    assert verify(tmp_path / "out").whole


def test_int4_is_what_the_library_decodes(trained: Path, quantized: dict[str, Path]) -> None:
    """Every expert in INT4, decoded by compressed-tensors, is within 10 % of its MXFP4 source."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    source, packed = tensors_of(quantized["bf16"]), tensors_of(quantized["int4"])
    for name in (name for name in source if name.endswith(("gate_up_proj", "down_proj"))):
        for expert, weights in enumerate(source[name].mT):
            prefix = int4_prefix(name, expert)
            codes = unpack_from_int32(packed[f"{prefix}_weight_packed"], 4, weights.shape)
            scales = packed[f"{prefix}_weight_scale"].float().repeat_interleave(32, dim=1)
            decoded = codes.float() * scales
            assert (decoded - weights.float()).norm() < 0.1 * weights.float().norm()
    assert verify(quantized["int4"], trained).whole


def test_random_bf16_source(random_bf16: Path, tmp_path: Path) -> None:
    """Weights that are no MXFP4 values are rounded into any form; 4 bits and MXFP4 keep them within 15 %."""
    source = tensors_of(random_bf16)["model.layers.0.mlp.experts.down_proj"].mT.float()
    quantize(random_bf16, tmp_path / "hybrid", built_in("hybrid"))
    result = tensors_of(tmp_path / "hybrid")
    parts = [result[f"model.layers.0.mlp.experts.down_proj_{part}"].numpy() for part in ("blocks", "scales")]
    restored = torch.from_numpy(mxfp4.dequantize(*parts).view(np.int16)).view(torch.bfloat16).float()
    assert 0.05 < (restored - source).norm() / source.norm() < 0.15


@pytest.mark.parametrize("name", BUILT_IN)
def test_side_files(trained: Path, quantized: dict[str, Path], name: str) -> None:
    """What stands beside the weights is copied byte for byte, and nothing is left over."""
    beside = {path.name for path in trained.iterdir() if path.suffix != ".safetensors"} - {"config.json", INDEX}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= beside
    for file in beside - {"README.md"}:
        assert (quantized[name] / file).read_bytes() == (trained / file).read_bytes()
    found = {path.name for path in quantized[name].iterdir() if path.suffix != ".safetensors"}
    assert found == beside - {"README.md"} | {"config.json", INDEX, MANIFEST}


@pytest.mark.parametrize("name", BUILT_IN)
def test_config(trained: Path, name: str, tmp_path: Path) -> None:
    """config.json keeps every key but quantization_config, which says what the weights now are."""
    quantize(trained, tmp_path / "out", RECIPES[name])
    source, result = (json.loads((folder / "config.json").read_text()) for folder in (trained, tmp_path / "out"))
    source.pop("quantization_config", None)
    found = result.pop("quantization_config", None)
    assert result == source
    nf4 = {"format": name, "block_size": 64, "double_quant": True}
    assert found == {
        "hybrid": {"quant_method": "ossquant", "format_version": 1, "experts": {"format": "mxfp4"},
                   "attention": nf4 | {"format": "nf4"}},
        "nf4": {"quant_method": "ossquant", "format_version": 1, "experts": nf4, "attention": nf4},
        "fp4": {"quant_method": "ossquant", "format_version": 1, "experts": nf4, "attention": nf4},
        "bf16": None,
        "int4": compressed_tensors_config(),
        "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target"),
    [("nf4", "hybrid"), ("nf4", "bf16"), ("nf4", "fp4"), ("nf4", "nf4-single"), ("fp4", "nf4"),
     ("hybrid", "nf4-finest"), ("hybrid", "bf16")],
)  # fmt: skip
def test_already_quantized(quantized: dict[str, Path], source: str, target: str, tmp_path: Path) -> None:
    """A source that bitsandbytes has rounded already is refused: its errors would add up."""
    with pytest.raises(UnsupportedError, match=r"already.*published"):
        quantize(quantized[source], tmp_path / "out", RECIPES[target])
    assert not (tmp_path / "out").exists()


def test_more_of_the_same(quantized: dict[str, Path], tmp_path: Path) -> None:
    """What a source has in the wanted scheme is copied: a hybrid becomes nf4 by its experts alone."""
    quantize(quantized["hybrid"], tmp_path / "out", built_in("nf4"))
    assert as_bytes(tensors_of(tmp_path / "out")) == as_bytes(tensors_of(quantized["nf4"]))


@pytest.mark.parametrize("leading", [0, 200], ids=["shorter", "longer"])
def test_quant_state_of_another_writer(quantized: dict[str, Path], leading: int, tmp_path: Path) -> None:
    """Quant states that another program wrote, shorter or longer than ours, are copied whole."""
    shutil.copytree(quantized["nf4"], tmp_path / "theirs", ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(quantized["nf4"])
    ours = {name: data for name, data in as_bytes(tensors).items() if ".quant_state." in name}
    states = {name: b" " * leading + data.strip() for name, data in ours.items()}
    tensors |= {name: torch.frombuffer(bytearray(state), dtype=torch.uint8) for name, state in states.items()}
    save_file(tensors, tmp_path / "theirs/model.safetensors", metadata={"format": "pt"})
    quantize(tmp_path / "theirs", tmp_path / "out", built_in("nf4"))
    found = as_bytes(tensors_of(tmp_path / "out"))
    for name, state in states.items():
        assert json.loads(found[name]) == json.loads(state), name


def test_broken_weights(trained: Path, tmp_path: Path) -> None:
    """A NaN in the source stops the job, by the tensor's name, and no checkpoint appears."""
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    with open_checkpoint(source) as checkpoint:
        location = checkpoint.locations["model.layers.3.self_attn.k_proj.weight"]
    with location.path.open("r+b") as file:
        file.seek(location.placed.offset + 1000)
        file.write(b"\xc0\x7f")
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.k_proj\.weight: NaN"):
        quantize(source, tmp_path / "out", built_in("hybrid"))
    with pytest.raises(CheckpointError, match="unfinished"):
        open_checkpoint(tmp_path / "out")


def test_progress(trained: Path, tmp_path: Path) -> None:
    """Progress never falls and ends with every byte of the source."""
    calls: list[tuple[int, int]] = []
    report = quantize(trained, tmp_path / "out", built_in("nf4"), progress=lambda *call: calls.append(call))
    assert {total for _, total in calls} == {report.source.nbytes}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == report.source.nbytes


def test_report(trained: Path, tmp_path: Path) -> None:
    """The report counts what was read and written."""
    report = quantize(trained, tmp_path / "out", built_in("nf4"), max_shard_size=10**6)
    assert report.output == tmp_path / "out"
    assert report.files == len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert not report.resumed
    assert report.result.parameters == report.source.parameters
    assert report.bytes_per_second == report.source.nbytes / report.seconds


@pytest.mark.parametrize(
    ("tensor", "scheme"),
    [("model.layers.1.mlp.experts.down_proj_scales", "hybrid"),
     ("model.layers.0.mlp.experts.gate_up_proj_scales", "mxfp4"),
     ("model.embed_tokens.weight", "nf4"), ("model.layers.1.mlp.router.weight", "hybrid")],
)  # fmt: skip
def test_broken_weights_are_not_copied(trained: Path, tmp_path: Path, tensor: str, scheme: str) -> None:
    """A scale that stands for NaN, and NaN in bf16, are refused where they would only be copied, too."""
    shutil.copytree(trained, tmp_path / "broken")
    with open_checkpoint(tmp_path / "broken") as checkpoint:
        location = checkpoint.locations[tensor]
    with location.path.open("r+b") as file:
        file.seek(location.placed.offset + location.placed.tensor.nbytes - 2)
        file.write(b"\xff\xff")
    with pytest.raises(CheckpointError, match=tensor.split(".mlp")[0]):
        quantize(tmp_path / "broken", tmp_path / "out", built_in(scheme))
    assert not (tmp_path / "out" / "config.json").exists()
