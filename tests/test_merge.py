"""A LoRA adapter added to a checkpoint: what is added, what is refused, what is left of it."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import killed
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError, UnsupportedError, UsageError
from ossquant.layout import Role, tensors
from ossquant.merge import CONFIG, WEIGHTS, MergedCheckpoint, merge, read_adapter
from ossquant.quantize import quantize
from ossquant.recipe import Recipe, built_in
from ossquant.scheme import Scheme

Q, K, OUT = (f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "k"), (3, "o")))
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_projs.0", "model.layers.2.mlp.experts.down_projs.7"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")  # the layers of SHAPES are no whole model
SHAPES = {Q: (256, 192), K: (128, 192), OUT: (192, 256), GATE_UP: (256, 192), DOWN: (192, 128), "lm_head": (640, 192)}


def peft_model(modules: tuple[str, ...], **options: Any) -> Any:
    """Linear layers of the model's names and shapes, with a random adapter of peft's own."""
    torch.manual_seed(0)
    root = nn.Module()
    for name in modules:
        parent, parts = root, name.split(".")
        for part in parts[:-1]:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        rows, columns = SHAPES[name]
        parent.add_module(parts[-1], nn.Linear(columns, rows, bias=False))
    config: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(modules), "init_lora_weights": False}
    return get_peft_model(root, LoraConfig(**config | options))  # type: ignore[arg-type]


def saved(folder: Path, modules: tuple[str, ...] = (Q,), **options: Any) -> Path:
    """An adapter that peft has saved."""
    peft_model(modules, **options).save_pretrained(folder)
    return folder


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def change_weights(folder: Path, edit: Callable[[str, Tensor], tuple[str, Tensor]]) -> None:
    edited = dict(edit(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items())
    save_file({name: tensor.contiguous() for name, tensor in edited.items()}, folder / WEIGHTS)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def same_bytes(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)) for name in a
    )


def matrix(found: Mapping[str, Tensor], module: str) -> Tensor:
    """The weight of a module (out, in), of an expert too."""
    if ".experts." not in module:
        return found[f"{module}.weight"]
    stack, expert = module.replace("_projs.", "_proj.").rsplit(".", 1)
    return found[stack][int(expert)].T


CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "attention": ((Q, K, OUT), {}),
    "experts": ((GATE_UP, DOWN), {}),
    "lm_head": (("lm_head",), {}),
    "all, rank 64": (tuple(SHAPES), {"r": 64}),
    "rslora": ((Q, GATE_UP), {"use_rslora": True}),
    "patterns": (
        tuple(SHAPES),
        {
            "rank_pattern": {"q_proj": 4, "layers.1.self_attn.k_proj": 2, "^lm_head": 16, "projs.0": 5, "0": 3},
            "alpha_pattern": {"7": 100, "down_projs.7": 1, f"^{OUT}": 3, "^o_proj": 7, "k_proj": 0.5},
        },
    ),
    "a regex for targets": ((Q, GATE_UP), {"target_modules": r".*(q_proj|experts\.gate_up_projs\.\d+)"}),
    "not yet trained": ((Q, GATE_UP), {"init_lora_weights": True}),
    "orthogonal": ((Q,), {"init_lora_weights": "orthogonal"}),
    "mica": ((Q,), {"init_lora_weights": "mica"}),
}


@pytest.mark.parametrize(("source", "case"), [*(("mxfp4", case) for case in CASES), ("bf16", "all, rank 64")])
def test_peft_is_the_reference(source: str, case: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """What is written in bf16 is the source and what peft says it adds; all else keeps its bytes."""
    modules, options = CASES[case]
    model = peft_model(modules, **options)
    model.save_pretrained(tmp_path / "adapter")
    merge(quantized[source], tmp_path / "adapter", tmp_path / "out", built_in("bf16"))
    before, after = tensors_of(quantized["bf16"]), tensors_of(tmp_path / "out")
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    assert set(layers) == set(modules)
    for name, layer in layers.items():
        with torch.no_grad():
            expected = (matrix(before, name).float() + layer.get_delta_weight("default")).bfloat16()
        found = matrix(after, name)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
        assert (found == expected).float().mean() > 0.999  # fp32 sums in another order, then a tie
        matrix(after, name).copy_(matrix(before, name))
    assert same_bytes(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Halves in fp32 and in bf16 are read for what they are."""
    folder = saved(tmp_path / "adapter")
    change_weights(folder, lambda name, tensor: (name, tensor.to(dtype)))
    halves = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}
    a, b = (next(half for name, half in halves.items() if f"lora_{kind}" in name) for kind in "AB")
    with open_checkpoint(quantized["bf16"]) as source, read_adapter(folder, source.plan).weights:
        rows = read_adapter(folder, source.plan).rows(f"{Q}.weight", None, 0, 256, transposed=False)
    torch.testing.assert_close(torch.from_numpy(rows), 2 * b @ a, rtol=1e-5, atol=1e-6)


def test_lm_head_of_a_whole_model(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """With a LoRA on lm_head peft saves lm_head itself, which is passed over; another lm_head is refused."""
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(quantized["bf16"]),
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    itself = "base_model.model.lm_head.base_layer.weight"
    assert itself in load_file(tmp_path / "adapter" / WEIGHTS)
    report = merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("bf16"))
    assert set(report.kept) == {Role.ATTENTION, Role.LM_HEAD}
    before, after = (tensors_of(folder)["lm_head.weight"].float() for folder in (quantized["bf16"], tmp_path / "out"))
    with torch.no_grad():
        expected = before + model.base_model.model.lm_head.get_delta_weight("default")
    torch.testing.assert_close(after, expected, rtol=2**-7, atol=1e-6)
    for change in (lambda part: part * 1.01, lambda part: part[1:]):
        other = shutil.copytree(tmp_path / "adapter", tmp_path / "other", dirs_exist_ok=True)
        change_weights(other, lambda name, part, change=change: (name, change(part) if name == itself else part))
        with pytest.raises(UnsupportedError, match=r"lm_head\.base_layer\.weight"):
            merge(trained, other, tmp_path / "none", built_in("bf16"))


NAMES = (
    "q_proj",
    "self_attn.q_proj",
    "^q_proj",
    f"^{Q}",
    Q,
    "proj",
    "0",
    "^model",
    "layers.0.self_attn.q_proj",
    "_proj",
)


@pytest.mark.parametrize("pattern", NAMES)
def test_patterns_are_pefts(pattern: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A pattern holds for the modules that it holds for in peft."""
    folder = saved(tmp_path / "adapter", (Q, OUT))
    change(folder, alpha_pattern={pattern: 48})
    with open_checkpoint(quantized["bf16"]) as source:
        deltas = read_adapter(folder, source.plan).deltas
    for module in (Q, OUT):
        expected = 6.0 if get_pattern_key([pattern], module) == pattern else 2.0
        assert deltas[f"{module}.weight", None].scale == expected


def only(half: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        kept = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if f"lora_{half}" in name}
        save_file(kept, folder / WEIGHTS)

    return damage


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return partial(change_weights, edit=lambda name, tensor: (name.replace(old, new), tensor))


def filled(value: float) -> Callable[[Path], None]:
    def edit(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        tensor[-1, -1] = value if "lora_B" in name else tensor[-1, -1]
        return name, tensor

    return partial(change_weights, edit=edit)


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    return partial(change_weights, edit=lambda name, tensor: (name, tensor.to(dtype)))


def config(**changes: Any) -> Callable[[Path], None]:
    return partial(change, **changes)


def text(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / CONFIG).write_text(content)

    return damage


def twice(folder: Path) -> None:
    """The same halves a second time, without peft's prefix."""
    halves = load_file(folder / WEIGHTS)
    bare = {name.removeprefix("base_model.model."): tensor.clone() for name, tensor in halves.items()}
    save_file(halves | bare, folder / WEIGHTS)


def reshaped(half: str, *shape: int) -> Callable[[Path], None]:
    return partial(
        change_weights, edit=lambda name, tensor: (name, torch.ones(shape) if f"lora_{half}" in name else tensor)
    )


def wide(folder: Path) -> None:
    """A rank beyond the matrix's own."""
    change(folder, r=193)
    change_weights(folder, lambda name, _: (name, torch.ones(*((193, 192) if "lora_A" in name else (256, 193)))))


def truncated(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def sparse(folder: Path) -> None:
    """A terabyte that is not there."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**40)


def header(entries: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(len(entries).to_bytes(8, "little") + entries.encode())

    return damage


REFUSALS: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "dora": (config(use_dora=True), UnsupportedError, "'use_dora' is True"),
    "pissa": (config(init_lora_weights="pissa"), UnsupportedError, "'pissa' has changed the weights"),
    "pissa_niter": (config(init_lora_weights="pissa_niter_4"), UnsupportedError, "'pissa_niter_4'"),
    "olora": (config(init_lora_weights="olora"), UnsupportedError, "'olora' has changed"),
    "loftq": (config(init_lora_weights="loftq"), UnsupportedError, "'loftq' has changed"),
    "loftq_config": (config(loftq_config={"loftq_bits": 4}), UnsupportedError, "'loftq_config' is"),
    "ia3": (config(peft_type="IA3"), UnsupportedError, "type 'IA3'"),
    "no type": (text("{}"), UnsupportedError, "type None"),
    "biases": (config(bias="all"), UnsupportedError, "'bias' is 'all'"),
    "lora_bias": (config(lora_bias=True), UnsupportedError, "'lora_bias'"),
    "whole modules": (config(modules_to_save=["lm_head"]), UnsupportedError, "'modules_to_save'"),
    "target_parameters": (config(target_parameters=["mlp.experts.down_proj"]), UnsupportedError, "'target_parameters'"),
    "replication": (config(layer_replication=[[0, 4], [2, 4]]), UnsupportedError, "'layer_replication'"),
    "tokens": (config(trainable_token_indices=[1]), UnsupportedError, "'trainable_token_indices'"),
    "a key of next year": (config(use_future=1), UnsupportedError, "'use_future' is 1"),
    "regex": (config(rank_pattern={r".*\.(q|k)_proj": 8}), UnsupportedError, "is no module's name"),
    "slow regex": (config(alpha_pattern={"(a+)+$": 8}), UnsupportedError, "is no module's name"),
    "patterns in a list": (config(rank_pattern=["q_proj"]), CheckpointError, "not a table"),
    "another rank": (config(r=4), CheckpointError, "rank 4 and lora_alpha 16 "),
    "no rank": (config(r=None), CheckpointError, "rank None"),
    "no alpha": (config(lora_alpha=None), CheckpointError, "lora_alpha None"),
    "alpha NaN": (config(lora_alpha=math.nan), CheckpointError, "lora_alpha nan"),
    "alpha true": (config(lora_alpha=True), CheckpointError, "lora_alpha True"),
    "alpha beyond float": (config(lora_alpha=10**400), CheckpointError, "lora_alpha 1000"),
    "alpha a text": (config(alpha_pattern={"q_proj": "16"}), CheckpointError, "lora_alpha '16'"),
    "not JSON": (text("{"), CheckpointError, "not JSON"),
    "a list": (text("[]"), CheckpointError, "not a JSON object"),
    "JSON bomb": (text('{"a":' + "[" * 50_000), CheckpointError, "nested too deep"),
    "more JSON": (text('{"a":[' + "0," * 2**20 + "0]}"), CheckpointError, "more JSON than any model has"),
    "only A": (only("A"), CheckpointError, "lora_A and lora_B of"),
    "only B": (only("B"), CheckpointError, "lora_A and lora_B of"),
    "no tensors": (only("C"), CheckpointError, "no tensors"),
    "twice": (twice, UnsupportedError, "is no half of a matrix"),
    "path traversal": (renamed(Q, "../../../x"), UnsupportedError, "none of the model's matrices"),
    "router": (renamed(Q, "model.layers.0.mlp.router"), UnsupportedError, "none of the model's matrices"),
    "norm": (renamed(Q, "model.norm"), UnsupportedError, "none of the model's matrices"),
    "stack": (renamed(Q, "model.layers.0.mlp.experts.gate_up_proj"), UnsupportedError, "none of the model's"),
    "layer 4": (renamed("layers.0", "layers.4"), UnsupportedError, "none of the model's matrices"),
    "expert 8": (renamed(Q, GATE_UP[:-1] + "8"), UnsupportedError, "none of the model's matrices"),
    "expert 00": (renamed(Q, GATE_UP + "0"), UnsupportedError, "none of the model's matrices"),
    "embedding": (renamed("lora_A.weight", "lora_embedding_A"), UnsupportedError, "is no half of a matrix"),
    "magnitude": (renamed("lora_A.weight", "lora_magnitude_vector"), UnsupportedError, "is no half of a matrix"),
    "an unknown key": (renamed("lora_A.weight", "lora_A.default.weight"), UnsupportedError, "is no half of a matrix"),
    "of another model": (renamed(Q, K), CheckpointError, "are {'A': (8, 192), 'B': (256, 8)}, not"),
    "halves swapped": (reshaped("A", 192, 8), CheckpointError, "lora_A and lora_B of"),
    "a vector": (reshaped("A", 192), UnsupportedError, "is no half of a matrix"),
    "rank 0": (reshaped("A", 0, 192), CheckpointError, "lora_A and lora_B of"),
    "rank 193": (wide, UnsupportedError, "has rank 193, more than"),
    "fp16": (cast(torch.float16), UnsupportedError, "(F16) is no half of a matrix in fp32 or bf16"),
    "fp64": (cast(torch.float64), UnsupportedError, "(F64) is no half"),
    "int8": (cast(torch.uint8), UnsupportedError, "(U8) is no half"),
    "cut short": (truncated, CheckpointError, f"{WEIGHTS}: "),
    "a terabyte": (sparse, UnsupportedError, "is no half of a matrix"),
    "giant shape": (
        header('{"x":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,1]}}'),
        CheckpointError,
        "impossible shape",
    ),
    "header bomb": (header('{"a":' + "[" * 50_000), CheckpointError, "nested too deep"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case: str, trained: Path, tmp_path: Path) -> None:
    """What cannot be added is refused from headers alone, in seconds, with a hint, and nothing is written."""
    damage, kind, words = REFUSALS[case]
    damage(saved(tmp_path / "adapter"))
    started = time.process_time()
    with pytest.raises(CheckpointError) as refused:
        merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("mxfp4"))
    assert time.process_time() - started < 3
    assert type(refused.value) is kind
    assert words in refused.value.message
    assert refused.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(value: float, trained: Path, tmp_path: Path) -> None:
    """NaN and infinity in an adapter end the job, and the half is named."""
    filled(value)(saved(tmp_path / "adapter"))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: NaN or infinity in .*q_proj.lora_B.weight"):
        merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("mxfp4"))
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("module", [Q, GATE_UP])
def test_overflow(module: str, trained: Path, tmp_path: Path) -> None:
    """A sum that bf16 cannot hold ends the job, without a word from numpy."""
    saved(tmp_path / "adapter", (module,))
    change(tmp_path / "adapter", lora_alpha=1e38)
    change_weights(tmp_path / "adapter", lambda name, tensor: (name, torch.full_like(tensor, 1e3)))
    with pytest.raises(CheckpointError, match="NaN or infinity once the adapter is added"):
        merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("mxfp4"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_not_an_adapter(name: str, kind: str, trained: Path, tmp_path: Path) -> None:
    """Without both files, and not a folder or a pipe in place of one, it is no adapter."""
    path = saved(tmp_path / "adapter") / name
    path.unlink()
    if kind != "missing":
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UsageError, match="not an adapter"):
        merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("mxfp4"))


def test_many_patterns(trained: Path, tmp_path: Path) -> None:
    """A hundred thousand patterns take no longer than their JSON does."""
    folder = saved(tmp_path / "adapter", tuple(SHAPES))
    change(folder, alpha_pattern={f"m{n}.q_proj": 1 for n in range(100_000)})
    with open_checkpoint(trained) as source:
        started = time.process_time()
        assert len(read_adapter(folder, source.plan).deltas) == len(SHAPES)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("source", ["nf4", "fp4", "int4"])
def test_source_in_4_bits(source: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is added to experts that were rounded to NF4, FP4 or INT4."""
    saved(tmp_path / "adapter", (GATE_UP,))
    with pytest.raises(UnsupportedError, match=f"its experts are {source}, to which nothing can be added"):
        merge(quantized[source], tmp_path / "adapter", tmp_path / "out", built_in("bf16"))


def test_hybrid_source(quantized: dict[str, Path], tmp_path: Path) -> None:
    """To a hybrid's MXFP4 experts it is added, its NF4 attention stays as it is; to the attention it is not."""
    merge(quantized["hybrid"], saved(tmp_path / "experts", (GATE_UP,)), tmp_path / "out", built_in("hybrid"))
    before, after = tensors_of(quantized["hybrid"]), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert f"{GATE_UP[:-3]}_blocks" in changed
    assert all(".experts." in name for name in changed)
    with pytest.raises(UnsupportedError, match="its attention are nf4"):
        merge(quantized["hybrid"], saved(tmp_path / "attention"), tmp_path / "none", built_in("hybrid"))


@pytest.mark.parametrize("source", ["mxfp4", "bf16"])
def test_any_piece_has_the_same_bits(source: str, quantized: dict[str, Path], tmp_path: Path) -> None:
    """However a tensor is read, at odd offsets and over the borders of experts, its bytes are the same."""
    saved(tmp_path / "adapter", tuple(SHAPES), r=64)
    rng = np.random.default_rng(0)
    with MergedCheckpoint(open_checkpoint(quantized[source]), tmp_path / "adapter") as merged:
        for name in ("lm_head.weight", f"{Q}.weight", f"{K}.weight", f"{GATE_UP[:-3]}", f"{DOWN[:-3]}"):
            nbytes = merged.stored[name].nbytes
            whole, row = bytearray(nbytes), 2 * merged.stored[name].shape[-1]
            merged.read_into(name, memoryview(whole))
            cuts = [(0, 1), (nbytes - 1, nbytes), (row - 1, row + 1), (100 * row + 3, 101 * row)]
            cuts += [tuple(sorted(rng.integers(0, nbytes, 2))) for _ in range(40)]
            for begin, end in cuts:
                part = bytearray(end - begin)
                merged.read_into(name, memoryview(part), int(begin))
                assert part == whole[begin:end]


@pytest.mark.parametrize("transposed", [False, True])
def test_any_rows_have_the_same_bits(transposed: bool, trained: Path, tmp_path: Path) -> None:
    """What is added to a row is the same to the last bit of fp32, whichever rows are asked for with it."""
    saved(tmp_path / "adapter", ("lm_head", GATE_UP), r=64)
    rng = np.random.default_rng(0)
    with open_checkpoint(trained) as source:
        adapter = read_adapter(tmp_path / "adapter", source.plan)
        for name, expert in adapter.deltas:
            rows = partial(adapter.rows, name, expert, transposed=transposed)
            count = SHAPES["lm_head" if expert is None else GATE_UP][transposed]
            whole = rows(0, count)
            assert whole is not None
            cuts = [sorted(rng.choice(count + 1, 2, replace=False)) for _ in range(40)]
            for begin, end in [(0, 1), (count - 1, count), *cuts]:
                assert np.array_equal(rows(begin, end), whole[begin:end])


LM_HEAD = {Role.EXPERTS: Scheme("mxfp4"), Role.LM_HEAD: Scheme("nf4")}
WAYS = {
    "mxfp4": built_in("mxfp4"),
    "hybrid": built_in("hybrid"),
    "nf4": built_in("nf4"),
    "nf4 lm_head": Recipe("nf4 lm_head", "", LM_HEAD),
}


@pytest.mark.parametrize("way", WAYS)
def test_over_bf16_or_at_once(way: str, trained: Path, tmp_path: Path) -> None:
    """Merged to bf16 and then quantized, or merged at once: the same bytes; the source keeps its own."""
    saved(tmp_path / "adapter", tuple(SHAPES), r=64)
    before = digests(trained), digests(tmp_path / "adapter")
    merge(trained, tmp_path / "adapter", tmp_path / "bf16", built_in("bf16"))
    quantize(tmp_path / "bf16", tmp_path / "over", WAYS[way])
    merge(trained, tmp_path / "adapter", tmp_path / "at once", WAYS[way], max_shard_size=300_000)
    assert same_bytes(tensors_of(tmp_path / "over"), tensors_of(tmp_path / "at once"))
    assert (digests(trained), digests(tmp_path / "adapter")) == before


def test_large_matrix(tmp_path: Path) -> None:
    """An lm_head that is copied and coded some rows at a time has the bits of one that is read at once."""
    from make_checkpoint import TINY, make_checkpoint

    make_checkpoint(tmp_path / "source", replace(TINY, vocab_size=60_000), "bf16")
    torch.manual_seed(0)
    folder = saved(tmp_path / "adapter", ("lm_head",))
    change_weights(folder, lambda name, half: (name, torch.randn(60_000, 8) if "lora_B" in name else half))
    with MergedCheckpoint(open_checkpoint(tmp_path / "source"), folder) as merged:
        whole = bytearray(merged.stored["lm_head.weight"].nbytes)
        merged.read_into("lm_head.weight", memoryview(whole))
    report = merge(tmp_path / "source", folder, tmp_path / "bf16", built_in("bf16"))
    assert report.kept == {Role.LM_HEAD: pytest.approx(1, abs=1e-3)}
    assert tensors_of(tmp_path / "bf16")["lm_head.weight"].view(torch.uint8).numpy().tobytes() == whole
    merge(tmp_path / "source", folder, tmp_path / "at once", WAYS["nf4 lm_head"])
    quantize(tmp_path / "bf16", tmp_path / "over", WAYS["nf4 lm_head"])
    assert same_bytes(tensors_of(tmp_path / "over"), tensors_of(tmp_path / "at once"))


def scaled(folder: Path, factor: float) -> None:
    change_weights(folder, lambda name, tensor: (name, tensor * (factor if "lora_B" in name else 1)))


@pytest.mark.parametrize(
    ("factor", "scheme", "least", "most"),
    [(1, "mxfp4", 0.9, 1.1), (1e-4, "mxfp4", -0.1, 0.2), (1e-2, "bf16", 0.95, 1.05), (0, "mxfp4", 1, 1)],
)
def test_share_that_is_left(
    factor: float, scheme: str, least: float, most: float, trained: Path, tmp_path: Path
) -> None:
    """A strong adapter outlives MXFP4, a faint one does not, bf16 keeps it; of nothing, nothing is lost."""
    scaled(saved(tmp_path / "adapter", (GATE_UP, DOWN)), factor)
    kept = merge(trained, tmp_path / "adapter", tmp_path / "out", built_in(scheme)).kept
    assert set(kept) == {Role.EXPERTS}
    assert least <= kept[Role.EXPERTS] <= most


def test_share_is_over_all_that_is_touched(trained: Path, tmp_path: Path) -> None:
    """The share is the projection of what was written on what peft adds."""
    model = peft_model((GATE_UP, Q))
    model.save_pretrained(tmp_path / "adapter")
    scaled(tmp_path / "adapter", 0.05)
    kept = merge(trained, tmp_path / "adapter", tmp_path / "out", built_in("mxfp4")).kept
    quantize(tmp_path / "out", tmp_path / "now", built_in("bf16"))
    quantize(trained, tmp_path / "was", built_in("bf16"))
    now, was = (matrix(tensors_of(tmp_path / name), GATE_UP).double() for name in ("now", "was"))
    with torch.no_grad():
        added = 0.05 * model.base_model.model.get_submodule(GATE_UP).get_delta_weight("default").double()
    assert kept[Role.EXPERTS] == pytest.approx(float(((now - was) * added).sum() / (added * added).sum()), rel=1e-4)
    assert kept[Role.ATTENTION] == pytest.approx(1, abs=0.01)


def test_more_matrices_than_are_sampled(trained: Path, tmp_path: Path) -> None:
    """All 64 matrices of the experts get what is theirs, though the share is taken of 32."""
    folder = saved(tmp_path / "adapter", (GATE_UP,))
    halves = {}
    with open_checkpoint(trained) as source:
        stacks = [each for each in tensors(source.spec) if each.role is Role.EXPERTS]
    for stack in stacks:
        for expert in range(8):
            prefix = f"base_model.model.{stack.name}s.{expert}"
            halves[f"{prefix}.lora_A.weight"] = torch.randn(8, stack.shape[2])
            halves[f"{prefix}.lora_B.weight"] = torch.randn(stack.shape[1], 8)
    save_file(halves, folder / WEIGHTS)
    kept = merge(trained, folder, tmp_path / "out", built_in("bf16")).kept
    assert kept[Role.EXPERTS] == pytest.approx(1, abs=0.01)
    before, after = (as_merged_by(tmp_path, source) for source in (trained, tmp_path / "out"))
    for stack in stacks:
        for expert in range(8):
            a, b = (halves[f"base_model.model.{stack.name}s.{expert}.lora_{half}.weight"] for half in "AB")
            change = after[stack.name][expert].T.float() - before[stack.name][expert].T.float()
            torch.testing.assert_close(change, 2 * b @ a, rtol=0.02, atol=0.05)


def as_merged_by(folder: Path, source: Path) -> dict[str, Tensor]:
    quantize(source, folder / f"{source.name} in bf16", built_in("bf16"))
    return tensors_of(folder / f"{source.name} in bf16")


def test_killed_and_gone_on_with(trained: Path, tmp_path: Path) -> None:
    """Killed on the way, the same job goes on to the bytes of an undisturbed one."""
    folder, out = saved(tmp_path / "adapter", tuple(SHAPES)), tmp_path / "out"
    job = partial(merge, trained, folder, recipe=built_in("mxfp4"), max_shard_size=100_000)
    assert killed(lambda: job(out), out, 40)
    assert job(out).quantize.resumed
    job(tmp_path / "undisturbed")
    assert digests(out) == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("what", ["weights", "config"])
def test_another_adapter_is_another_job(what: str, trained: Path, tmp_path: Path) -> None:
    """A job does not go on with an adapter that has changed since, be it by a weight or by its alpha."""
    folder, out = saved(tmp_path / "adapter", tuple(SHAPES)), tmp_path / "out"
    job = partial(merge, trained, folder, recipe=built_in("mxfp4"), max_shard_size=100_000)
    assert killed(lambda: job(out), out, 40)
    if what == "weights":
        scaled(folder, 0.5)
    else:
        change(folder, lora_alpha=8)
    with pytest.raises(UsageError):
        job(out)
    assert not job(out, force=True).quantize.resumed
    job(tmp_path / "anew")
    assert same_bytes(tensors_of(out), tensors_of(tmp_path / "anew"))


@pytest.mark.parametrize("force", [False, True])
def test_the_adapter_is_no_output(force: bool, trained: Path, tmp_path: Path) -> None:
    """The adapter's own folder is never written to, with force neither."""
    folder = saved(tmp_path / "adapter")
    before = digests(folder)
    with pytest.raises(UsageError):
        merge(trained, folder, folder, built_in("mxfp4"), force=force)
    assert digests(folder) == before


def test_a_link_out_of_the_adapter(trained: Path, tmp_path: Path) -> None:
    """Weights that lie elsewhere are not followed."""
    folder = saved(tmp_path / "adapter")
    (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="a link out of its folder"):
        merge(trained, folder, tmp_path / "out", built_in("mxfp4"))
