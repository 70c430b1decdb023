"""GGUF headers of the published shapes, beside llama.cpp's own converter and published logs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from conftest import ROOT
from ossquant.export.gguf_header import plan_files
from ossquant.export.gguf_tensors import gguf_tensors
from ossquant.export.vocabulary import Vocabulary, read_vocabulary
from ossquant.plan import make_plan
from ossquant.recipe import gguf_recipe
from ossquant.spec import ModelSpec
from ossquant.units import GIB

LOGS = ROOT / "tests/data/logs"
# files that people have loaded, as llama.cpp printed them: log, dense format
LOGGED = {"20b": [("llama_cpp_8_ascend.log", "q8_0"), ("llama_cpp_3070_cpu_moe.log", "q8_0")],
          "120b": [("llama_cpp_m4_max_120b.log", "q8_0"), ("ollama_0_30_120b.log", "bf16")]}  # fmt: skip
FEW = 1000  # tokens: gguf's reader takes ten seconds for all of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and a config.json of the published size."""
    from harmony_tokenizer import write_tokenizer

    folder = tmp_path_factory.mktemp("published")
    write_tokenizer(folder, ROOT / "tests/data/tiny/tokenizer.json", 201088)
    return folder


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return read_vocabulary(folder, 201088, {})


def config() -> dict[str, Any]:
    return json.loads((ROOT / "tests/data/tiny/config.json").read_text())


def golden(size: str) -> dict[str, Any]:
    return json.loads((ROOT / f"tests/golden/gpt-oss-{size}-gguf.json").read_text())


def plan(size: str, dense: str = "q8_0") -> Any:
    return make_plan(ModelSpec.published(size), gguf_recipe("gguf", dense))


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_header(size: str, vocabulary: Vocabulary, tmp_path: Path) -> None:
    """Metadata, their types, and every tensor's name, type and shape are those that llama.cpp's converter writes."""
    expected = golden(size)
    if size == "120b":
        vocabulary = replace(vocabulary, tokens=vocabulary.tokens[:FEW], token_types=vocabulary.token_types[:FEW])
        expected["metadata"]["tokenizer.ggml.tokens"][1] = expected["metadata"]["tokenizer.ggml.token_type"][1] = FEW
    (shard,) = plan_files(gguf_tensors(plan(size)), plan(size), config(), vocabulary, f"gpt-oss-{size}", "x", None)
    with (tmp_path / shard.name).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.nbytes)  # the weights are a hole
    reader = gguf.GGUFReader(tmp_path / shard.name)
    found = {}
    for name, field in reader.fields.items():
        types = "/".join(kind.name for kind in field.types)
        found[name] = [types, len(field.data) if types.startswith("ARRAY") else field.contents()]
    assert {key: found.pop(key, None) for key in expected["metadata"]} == expected["metadata"]
    assert {key for key in found if not key.startswith("GGUF.")} == {
        "general.name", "general.size_label", "tokenizer.ggml.merges", "tokenizer.chat_template"
    }  # fmt: skip
    assert found["general.name"] == ["STRING", f"gpt-oss-{size}"]
    tensors = {t.name: [t.tensor_type.name, t.shape.tolist()[::-1]] for t in reader.tensors}
    layers = range(expected["layers"])
    assert tensors == expected["model"] | {
        f"blk.{layer}.{name}": tensor for layer in layers for name, tensor in expected["layer"].items()
    }
    assert len(tensors) == expected["tensors"]
    assert [t.data_offset for t in reader.tensors] == [placed.offset for placed in shard.placed]


@pytest.mark.parametrize(("size", "log", "dense"), [(size, *each) for size, logs in LOGGED.items() for each in logs])
def test_published_files(size: str, log: str, dense: str) -> None:
    """Numbers of tensors by type, and bytes to llama.cpp's last printed digit, are those of files that people load."""
    text = (LOGS / log).read_text("utf-8")
    printed = dict(re.findall(r"type +(f32|bf16|q8_0|mxfp4): +(\d+) tensors", text))
    tensors = [tensor.stored for tensor in gguf_tensors(plan(size, dense))]
    counts = {kind: sum(tensor.dtype == kind.upper() for tensor in tensors) for kind in printed}
    assert printed
    assert {kind: str(number) for kind, number in counts.items()} == printed
    sizes = re.search(r"file size += ([\d.]+) GiB \(([\d.]+) BPW\)", text)
    if sizes:
        nbytes = sum(tensor.nbytes for tensor in tensors)
        assert sizes.groups() == (f"{nbytes / GIB:.2f}", f"{8 * nbytes / plan(size, dense).parameters:.2f}")


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_names_are_the_librarys(size: str) -> None:
    """Every name is one that gguf knows for the architecture, and no other of its names is left for gpt-oss."""
    layers = ModelSpec.published(size).num_hidden_layers
    known = set()
    for kind in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT_OSS]:
        name = gguf.TENSOR_NAMES[kind]
        known |= {name.format(bid=layer) for layer in range(layers)}
    found = {tensor.stored.name.rpartition(".")[0] for tensor in gguf_tensors(plan(size))}
    assert found == known


def test_split_files(vocabulary: Vocabulary) -> None:
    """The 120b in files of 5 GB: none is larger by more than its header, and each tensor stands once."""
    tensors = gguf_tensors(plan("120b"))
    shards = plan_files(tensors, plan("120b"), config(), vocabulary, "gpt-oss-120b", "big", 5 * 10**9)
    count = len(shards)
    assert count >= -(-plan("120b").nbytes // (5 * 10**9))
    assert [shard.name for shard in shards] == [f"big-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    assert all(shard.nbytes - len(shard.header) <= 5 * 10**9 + 32 * len(shard.placed) for shard in shards)
    placed = [each.tensor.name for shard in shards for each in shard.placed]
    assert placed == [tensor.stored.name for tensor in tensors]
