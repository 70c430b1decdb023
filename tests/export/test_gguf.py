"""GGUF files: their structure and weights as gguf's own reader has them, and how they come about."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from conftest import killed
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.codec import mxfp4
from ossquant.codec.expand import expand, pieces
from ossquant.errors import CheckpointError, DoesNotFitError, UnsupportedError, UsageError
from ossquant.export.gguf import export_gguf, plan_gguf
from ossquant.export.target import DENSE, EXPERTS
from ossquant.layout import Role

# what a format adds to a weight, of the root mean square of its tensor; by measurement on this model, rounded up
ERRORS = {"f32": 0.0, "bf16": 0.0, "q8_0": 0.007, "q5_0": 0.05, "q4_0": 0.1, "mxfp4": 0.0}
PAIRS = [*((experts, "q8_0") for experts in EXPERTS), *(("mxfp4", dense) for dense in DENSE[1:]), ("f32", "f32")]


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint as float32, by name."""
    with open_checkpoint(folder) as checkpoint:
        return {
            entry.tensor.name: np.concatenate(
                [rows for piece in pieces(entry.tensor) for rows in expand(checkpoint, entry, piece)]
            ).reshape(entry.tensor.shape)
            for entry in checkpoint.plan.tensors
        }


def expected(source: dict[str, Any], name: str) -> Any:
    """The weights that belong under a name of llama.cpp's, written down here once more."""
    block, _, rest = name.removeprefix("blk.").partition(".")
    if not name.startswith("blk."):
        return source[{"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
                       "output.weight": "lm_head.weight"}[name]]  # fmt: skip
    prefix, kind = f"model.layers.{block}.", rest.rpartition(".")[2]
    stem = rest.rpartition(".")[0]
    bias = "_bias" if kind == "bias" else ""
    if stem == "ffn_down_exps":
        return source[f"{prefix}mlp.experts.down_proj{bias}"]
    if stem in ("ffn_gate_exps", "ffn_up_exps"):
        return source[f"{prefix}mlp.experts.gate_up_proj{bias}"][:, stem == "ffn_up_exps" :: 2]
    if stem == "attn_sinks":
        return source[f"{prefix}self_attn.sinks"]
    module = {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.router",
    }[stem]  # fmt: skip
    return source[f"{prefix}{module}.{kind}"]


def check_weights(path: Path, source: dict[str, Any], experts: str, dense: str) -> None:
    """Hold every tensor of a file against the source's weights."""
    _, tensors = read(path)
    assert len(tensors) == 3 + 19 * 4
    for name, tensor in tensors.items():
        wanted = expected(source, name)
        format_ = experts if name.endswith("exps.weight") else dense if wanted.ndim == 2 else "f32"
        format_ = "f32" if "ffn_gate_inp" in name or name.endswith(".bias") else format_
        assert tensor.tensor_type.name == format_.upper(), name
        assert tuple(reversed(tensor.shape.tolist())) == wanted.shape, name
        found = dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error <= ERRORS[format_], (name, error)
        if format_ in ("q5_0", "q4_0"):
            assert error > 0


@pytest.mark.parametrize(("experts", "dense"), PAIRS)
def test_weights(trained: Path, experts: str, dense: str, tmp_path: Path) -> None:
    """From the published form, every tensor is the source's within its format's error; MXFP4, bf16 and f32 exactly."""
    export_gguf(trained, tmp_path / "out", experts=experts, dense=dense)
    check_weights(only_file(tmp_path / "out"), weights(trained), experts, dense)


@pytest.mark.parametrize("experts", ["mxfp4", "bf16", "q8_0"])
def test_weights_of_a_fine_tune(random_bf16: Path, experts: str, tmp_path: Path) -> None:
    """From bf16 experts that are no MXFP4 values, bf16 is exact, and what MXFP4 lost is told truly."""
    report = export_gguf(random_bf16, tmp_path / "out", experts=experts, dense="bf16")
    source = weights(random_bf16)
    if experts != "mxfp4":
        assert report.mxfp4_error is None
        check_weights(only_file(tmp_path / "out"), source, experts, "bf16")
        return
    _, tensors = read(only_file(tmp_path / "out"))
    squares = norm = 0.0
    for name in (name for name in tensors if name.endswith("exps.weight")):
        wanted = expected(source, name).astype(np.float64)
        found = dequantize(tensors[name].data, tensors[name].tensor_type).reshape(wanted.shape)
        squares += float(((found - wanted) ** 2).sum())
        norm += float((wanted**2).sum())
    assert report.mxfp4_error == pytest.approx((squares / norm) ** 0.5, rel=1e-6)
    assert 0.1 < report.mxfp4_error < 0.13


def test_mxfp4_values_stay(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A bf16 checkpoint whose experts are MXFP4 values gives the published experts again, without an error."""
    report = export_gguf(quantized["bf16"], tmp_path / "out", dense="bf16")
    assert report.mxfp4_error == 0.0
    check_weights(only_file(tmp_path / "out"), weights(trained), "mxfp4", "bf16")


def test_hybrid(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """From our hybrid the experts are the published bytes, and attention has its NF4 values."""
    for source in ("hybrid", "trained"):
        export_gguf(quantized.get(source, trained), tmp_path / source, dense="f32")
    _, ours = read(only_file(tmp_path / "hybrid"))
    _, published = read(only_file(tmp_path / "trained"))
    values = weights(quantized["hybrid"])
    for name, tensor in ours.items():
        if ".attn_" in name and name.endswith(".weight") and "norm" not in name and "sinks" not in name:
            assert np.array_equal(tensor.data, expected(values, name))
            assert not np.array_equal(tensor.data, published[name].data)
        else:
            assert tensor.data.tobytes() == published[name].data.tobytes()


def test_codes_are_not_touched(trained: Path, tmp_path: Path) -> None:
    """MXFP4 experts keep every code and scale, zeros' signs and unused codes included."""
    export_gguf(trained, tmp_path / "out")
    _, tensors = read(only_file(tmp_path / "out"))
    with open_checkpoint(trained) as checkpoint:
        name = "model.layers.2.mlp.experts.gate_up_proj"
        blocks, scales = (
            np.frombuffer(raw, np.uint8).reshape(checkpoint.stored[f"{name}_{part}"].shape)
            for part in ("blocks", "scales")
            for raw in [bytearray(checkpoint.stored[f"{name}_{part}"].nbytes)]
            if checkpoint.read_into(f"{name}_{part}", memoryview(raw)) is None
        )
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    for half, stem in enumerate(("gate", "up")):
        packed = tensors[f"blk.2.ffn_{stem}_exps.weight"].data.reshape(8, 128, -1, 17)
        assert np.array_equal(packed[..., 0], scales[:, half::2])
        found = np.concatenate([packed[..., 1:] & 15, packed[..., 1:] >> 4], axis=-1)
        assert np.array_equal(found, codes[:, half::2])


@pytest.mark.parametrize("split", [None, 10**6, 300_000])
def test_planned_sizes(trained: Path, split: int | None, tmp_path: Path) -> None:
    """The planned files, their sizes and no others are written; each begins its weights on a boundary of 32 bytes."""
    with open_checkpoint(trained) as checkpoint:
        planned = plan_gguf(checkpoint, "tiny", split_max_size=split)
    report = export_gguf(trained, tmp_path / "out", split_max_size=split)
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.gguf")}
    assert files == {file.name: file.nbytes for file in planned.files}
    assert report.files == len(files)
    if split is None:
        assert list(files) == ["tiny-mxfp4-q8_0.gguf"]
        return
    assert len(files) > 1
    seen: set[str] = set()
    for number, name in enumerate(sorted(files)):
        fields, tensors = read(tmp_path / "out" / name)
        assert name == f"tiny-mxfp4-q8_0-{number + 1:05d}-of-{len(files):05d}.gguf"
        assert (fields["split.no"], fields["split.count"]) == (number, len(files))
        assert fields["split.tensors.count"] == 3 + 19 * 4
        assert all(tensor.data_offset % 32 == 0 for tensor in tensors.values())
        assert sum(int(tensor.n_bytes) for tensor in tensors.values()) <= split
        assert not seen & tensors.keys()
        seen |= tensors.keys()
    assert len(seen) == 3 + 19 * 4


@pytest.mark.parametrize("dense", ["q8_0", "f32"])
def test_pieces(trained: Path, dense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices and biases that are coded some rows at a time give the file that they give whole."""
    export_gguf(trained, tmp_path / "whole", dense=dense)
    monkeypatch.setattr("ossquant.codec.expand.PIECE_WEIGHTS", 1000)
    monkeypatch.setattr("ossquant.codec.expand.STEP_WEIGHTS", 400)
    monkeypatch.setattr("ossquant.export.gguf.ROWS_AT_ONCE", 700)
    export_gguf(trained, tmp_path / "pieces", dense=dense)
    assert only_file(tmp_path / "pieces").read_bytes() == only_file(tmp_path / "whole").read_bytes()


def test_beside_the_weights(trained: Path, tmp_path: Path) -> None:
    """The folder has the file, config.json without a word on quantization, and a manifest with every tensor."""
    export_gguf(trained, tmp_path / "out", dense="bf16")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tiny-mxfp4-bf16.gguf", "config.json", "ossquant-manifest.json"}
    config = json.loads((trained / "config.json").read_text())
    config.pop("quantization_config")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    manifest = json.loads((tmp_path / "out/ossquant-manifest.json").read_text())
    _, tensors = read(tmp_path / "out/tiny-mxfp4-bf16.gguf")
    assert manifest["tensors"].keys() == tensors.keys() | {"tiny-mxfp4-bf16.gguf"}  # and the header
    assert manifest["scheme"]["experts"] == {"format": "mxfp4"}
    assert manifest["scheme"]["attention"] == {"format": "bf16"}


@pytest.mark.parametrize("source", ["nf4", "fp4", "int4"])
def test_other_forms(source: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Experts that are rounded to 4 bits of another kind are refused, and the forms that work are named."""
    with pytest.raises(UnsupportedError, match=rf"{source}, and gguf is made from mxfp4, bf16, hybrid"):
        export_gguf(quantized[source], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("experts", "q4_k"), ("experts", "nf4"), ("dense", "mxfp4")])
def test_other_formats(trained: Path, option: str, value: str, tmp_path: Path) -> None:
    """A format that GGUF does not have, or that suits no row of gpt-oss, is refused."""
    with pytest.raises(UsageError, match=f"--{option} cannot be '{value}'"):
        export_gguf(trained, tmp_path / "out", **{option: value})


def edited(source: Path, output: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config.json; a value of None takes the key out."""
    shutil.copytree(source, output)
    config = json.loads((output / "config.json").read_text()) | changes
    text = json.dumps({key: value for key, value in config.items() if value is not None})
    (output / "config.json").write_text(text)
    return output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_limit": 5.0}, "'swiglu_limit' is 5.0, llama.cpp computes with 7.0"),
        ({"swiglu_alpha": 1.5}, "'swiglu_alpha' is 1.5, llama.cpp computes with 1.702"),
        ({"hidden_act": "gelu"}, "'hidden_act' is gelu"),
        ({"layer_types": ["full_attention"] * 4}, "are not sliding and full in turns"),
        ({"rms_norm_eps": None}, "'rms_norm_eps' is 'None'"),
        ({"rope_scaling": None}, "neither rope_scaling nor rope_parameters"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(
    trained: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A config that llama.cpp would not follow, or cannot be told, is refused before anything is written."""
    source = edited(trained, tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message):
        export_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_weights(trained: Path, tmp_path: Path) -> None:
    """NaN in a norm, in attention or in a block scale is refused by its tensor's name, and no file appears."""
    with open_checkpoint(trained) as checkpoint:
        places = {name: location for name, location in checkpoint.locations.items() if "layers.1." in name}
    for name, nan in (
        ("model.layers.1.input_layernorm.weight", b"\xc0\x7f"),
        ("model.layers.1.self_attn.q_proj.weight", b"\xc0\x7f"),
        ("model.layers.1.mlp.experts.down_proj_scales", b"\xff"),
        ("model.layers.1.mlp.experts.down_proj_bias", b"\x80\x7f"),
    ):
        source = Path(shutil.copytree(trained, tmp_path / "source"))
        with (source / places[name].path.name).open("r+b") as file:
            file.seek(places[name].placed.offset + 2)
            file.write(nan)
        with pytest.raises(CheckpointError, match=name.removesuffix("_scales")):
            export_gguf(source, tmp_path / "out", dense="bf16")
        assert not list((tmp_path / "out").glob("*.gguf"))
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "out")


def test_truncated_source(trained: Path, tmp_path: Path) -> None:
    """A shard that was cut is named, and no file appears."""
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    path = source / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        export_gguf(source, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.gguf"))


def test_killed_at_every_operation(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any operation on its files, no file under its final name is cut; run again, all is whole."""
    monkeypatch.setattr("ossquant.checkpoint.writer.SAVED_BYTES", 400_000)

    def run(output: Path) -> None:
        export_gguf(trained, output, split_max_size=10**6)

    run(tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    out, operation = tmp_path / "out", 1
    while killed(lambda: run(out), out, operation):
        found = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert all(found[name] == whole[name] for name in found if name.endswith(".gguf")), operation
        if found.keys() != whole.keys():
            run(out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == whole, operation
        shutil.rmtree(out)
        operation += 1
    assert operation > 20


def test_resumes(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted export of one file goes on with the tensors that are on the disk."""
    monkeypatch.setattr("ossquant.checkpoint.writer.SAVED_BYTES", 400_000)

    def stop(done: int, total: int) -> None:
        if done > 0.7 * total:
            raise KeyboardInterrupt

    export_gguf(trained, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        export_gguf(trained, tmp_path / "out", progress=stop)
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert not (tmp_path / "out/config.json").exists()
    saved = json.loads((tmp_path / "out/ossquant-job.json").read_text())["saved"]["tiny-mxfp4-q8_0.gguf"]
    assert len(saved) > 10
    assert export_gguf(trained, tmp_path / "out").resumed
    assert only_file(tmp_path / "out").read_bytes() == only_file(tmp_path / "whole").read_bytes()


def test_other_job(trained: Path, tmp_path: Path) -> None:
    """An unfinished export in another format is not gone on with, and an export that is there is not replaced."""
    export_gguf(trained, tmp_path / "out")
    before = only_file(tmp_path / "out").read_bytes()
    with pytest.raises(UsageError, match=r"exists and is not empty.*--force"):
        export_gguf(trained, tmp_path / "out", dense="bf16")
    assert only_file(tmp_path / "out").read_bytes() == before
    export_gguf(trained, tmp_path / "out", dense="bf16", force=True)
    assert only_file(tmp_path / "out").name == "tiny-mxfp4-bf16.gguf"


def test_disk_too_small(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room is told before anything is written."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(DoesNotFitError, match=r"2\.26 MB are to be written, 1\.00 MB are free"):
        export_gguf(trained, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.gguf"))


@pytest.mark.parametrize(
    ("experts", "form", "warning"),
    [
        ("q4_0", "mxfp4", "take 4.50 bits a weight and are off by 7 %; MXFP4, which they are in, takes 4.25"),
        ("q5_0", "mxfp4", "take 5.50 bits a weight and are off by 4 %"),
        ("q4_0", "bf16", "take 4.50 bits a weight, MXFP4 4.25"),
        ("q8_0", "mxfp4", "take 8.50 bits a weight and are off by 0.6 %"),
        ("bf16", "bf16", ""),
        ("mxfp4", "bf16", ""),
    ],
)
def test_larger_and_worse(trained: Path, quantized: dict[str, Path], experts: str, form: str, warning: str) -> None:
    """Experts in a format of GGUF that is larger than MXFP4 and worse come with a warning that says how much."""
    with open_checkpoint(trained if form == "mxfp4" else quantized[form]) as checkpoint:
        warnings = plan_gguf(checkpoint, "tiny", experts=experts).warnings
    assert len(warnings) == bool(warning)
    assert warning in "".join(warnings)


def test_stated_errors() -> None:
    """The errors that the warning states are those of normal weights in MXFP4, coded again."""
    rng = np.random.default_rng(0)
    bits = (rng.standard_normal((256, 2880)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    source = mxfp4.to_floats(mxfp4.dequantize(*mxfp4.quantize(bits)))
    for kind, stated, digits in (("Q8_0", 0.006, 3), ("Q5_0", 0.04, 2), ("Q4_0", 0.07, 2)):
        type_ = gguf.GGMLQuantizationType[kind]
        coded = dequantize(gguf.quants.quantize(source, type_), type_)
        error = float(np.linalg.norm(coded - source) / np.linalg.norm(source))
        assert round(error, digits) == stated


def test_roles_have_one_format(trained: Path) -> None:
    """Router, norms, biases and sinks are f32, as llama.cpp asks, whatever is chosen."""
    with open_checkpoint(trained) as checkpoint:
        plan = plan_gguf(checkpoint, "tiny", dense="q4_0", experts="q8_0").plan
    small = (Role.ROUTER, Role.NORM, Role.BIAS, Role.EXPERT_BIAS)
    assert {plan.scheme(role).format for role in small} == {"f32"}
