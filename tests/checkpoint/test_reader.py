"""A checkpoint folder: what is opened, and what is refused."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ossquant.checkpoint.reader import INDEX, SINGLE, open_checkpoint, resolve
from ossquant.errors import CheckpointError, UnsupportedError, UsageError


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weight_map(folder: Path) -> dict[str, str]:
    table: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return table


def test_reads_every_byte(trained: Path) -> None:
    """Every tensor's bytes are those that the safetensors library reads, whole and in pieces."""
    expected = {name: tensor for path in trained.glob("*.safetensors") for name, tensor in load_file(path).items()}
    with open_checkpoint(trained) as checkpoint:
        assert checkpoint.stored.keys() == expected.keys()
        for name, tensor in expected.items():
            whole, piece = bytearray(checkpoint.stored[name].nbytes), bytearray(5)
            checkpoint.read_into(name, memoryview(whole))
            checkpoint.read_into(name, memoryview(piece), 3)
            assert whole == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert piece == whole[3:8]
        assert checkpoint.plan.nbytes == json.loads((trained / INDEX).read_text())["metadata"]["total_size"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_closes_files(trained: Path) -> None:
    """Leaving a checkpoint leaves no file open."""
    before = list(Path("/proc/self/fd").iterdir())
    with open_checkpoint(trained) as checkpoint:
        for name, tensor in checkpoint.stored.items():
            checkpoint.read_into(name, memoryview(bytearray(tensor.nbytes)))
        assert len(list(Path("/proc/self/fd").iterdir())) == len(before) + 2
    assert len(list(Path("/proc/self/fd").iterdir())) == len(before)


@pytest.mark.parametrize("part", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 1e-6, 0.3, 0.999999])
def test_truncated_shard(folder: Path, part: str, keep: float) -> None:
    """A shard cut anywhere is refused by its name, before anything is read from it."""
    os.truncate(folder / part, int((folder / part).stat().st_size * keep))
    with pytest.raises(CheckpointError, match=part):
        open_checkpoint(folder)


def test_shrinks_while_open(folder: Path) -> None:
    """A shard that shrinks after its header was read is an error, not a wrong tensor."""
    with open_checkpoint(folder) as checkpoint:
        name, place = next(iter(checkpoint.locations.items()))
        os.truncate(place.path, place.placed.offset + 100)
        with pytest.raises(CheckpointError, match=f"{place.path.name}: ends inside '{name}'"):
            checkpoint.read_into(name, memoryview(bytearray(checkpoint.stored[name].nbytes)))


def absent_shard(folder: Path) -> str:
    (folder / "model-00002-of-00002.safetensors").unlink()
    return r"model-00002-of-00002\.safetensors: named in"


def outside(folder: Path) -> str:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "x.safetensors")
    names = weight_map(folder)
    change_json(folder / INDEX, weight_map=names | {next(iter(names)): "../x.safetensors"})
    return r"'\.\./x\.safetensors' is not a file name"


def absolute(folder: Path) -> str:
    change_json(folder / INDEX, weight_map={"a": str(folder / "model-00001-of-00002.safetensors")})
    return "is not a file name"


def not_a_text(folder: Path) -> str:
    change_json(folder / INDEX, weight_map={"a": ["model.safetensors"]})
    return "is not a file name"


def endless_name(folder: Path) -> str:
    change_json(folder / INDEX, weight_map={"a": "x" * 5000 + ".safetensors"})
    return "xxx"


def wrong_shard(folder: Path) -> str:
    names = weight_map(folder)
    name = next(name for name in names if names[name].startswith("model-00001"))
    change_json(folder / INDEX, weight_map=names | {name: "model-00002-of-00002.safetensors"})
    return f"'{name}' is not in it"


def tensor_no_shard_has(folder: Path) -> str:
    change_json(folder / INDEX, weight_map=weight_map(folder) | {"extra": "model-00001-of-00002.safetensors"})
    return "'extra' is not in it"


def tensor_no_index_has(folder: Path) -> str:
    names = weight_map(folder)
    last = names.popitem()
    change_json(folder / INDEX, weight_map=names)
    return f"does not name '{last[0]}'"


def tensor_twice(folder: Path) -> str:
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "again.safetensors")
    change_json(folder / INDEX, weight_map=weight_map(folder) | {"x": "again.safetensors"})
    return "stands in another file too"


def no_weight_map(folder: Path) -> str:
    (folder / INDEX).write_text("{}")
    return "no weight_map"


def empty_weight_map(folder: Path) -> str:
    change_json(folder / INDEX, weight_map={})
    return "no weight_map"


def broken_index(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": ')
    return f"{INDEX}: not JSON"


def key_twice(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    return "twice"


def no_weights(folder: Path) -> str:
    (folder / INDEX).unlink()
    return f"neither {SINGLE} nor"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return r"no config\.json"


def broken_config(folder: Path) -> str:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    return r"config\.json: not JSON"


def deep_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"a":' + "[" * 10**6)
    return r"config\.json"


def unfinished(folder: Path) -> str:
    (folder / "ossquant-job.json").write_text("{}")
    return "unfinished job"


DAMAGES = [absent_shard, outside, absolute, not_a_text, endless_name, wrong_shard, tensor_no_shard_has,
           tensor_no_index_has, tensor_twice, no_weight_map, empty_weight_map, broken_index, key_twice, no_weights,
           no_config, broken_config, deep_config, unfinished]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folder(folder: Path, damage: Callable[[Path], str]) -> None:
    """A folder whose files do not agree is refused in one sentence that says which file, and why."""
    words = damage(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        open_checkpoint(folder)
    assert len(str(error.value)) < 600


def test_config_of_another_size(folder: Path) -> None:
    """A config.json of another model is told by the first tensor that does not fit it."""
    change_json(folder / "config.json", hidden_size=256)
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="not of the same model"):
        assert checkpoint.plan
    change_json(folder / "config.json", model_type="llama")
    with pytest.raises(UnsupportedError, match="'llama'"):
        open_checkpoint(folder)


@pytest.mark.parametrize("scheme", ["nf4", "bf16"])
def test_config_of_a_giant(quantized: dict[str, Path], scheme: str, tmp_path: Path) -> None:
    """A config.json that claims a hundred thousand experts is refused within 10 s and 2 GB."""
    shutil.copytree(quantized[scheme], tmp_path / "model")
    change_json(tmp_path / "model/config.json", num_local_experts=2**17)
    program = "import sys; from ossquant.checkpoint.reader import open_checkpoint; open_checkpoint(sys.argv[1]).plan"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")], capture_output=True, text=True, check=False,
        timeout=10, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9)),
    )  # fmt: skip
    assert done.stderr.splitlines()[-1].startswith("ossquant.errors.CheckpointError")


def test_resolve(trained: Path, tmp_path: Path) -> None:
    """A folder is taken as it is, as a text or as a path; a file is not a checkpoint."""
    assert resolve(trained) == resolve(str(trained)) == trained
    with pytest.raises(UsageError, match="is a file"):
        resolve(trained / "config.json")


@pytest.mark.parametrize(
    "source", ["absent", "a/b/c", "./a", "a b/c", "a/../b", "a--b/c", "openai/gpt--oss", "-/x", "a/b.", "ä/ö",
               pytest.param("a/" + "b" * 200, id="long id"), pytest.param("x" * 5000, id="long path"), "a\0b"]
)  # fmt: skip
def test_no_such_checkpoint(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither a folder nor can be a hub id is a usage error, and the hub is not asked."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint at"):
        resolve(source)
