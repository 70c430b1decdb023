"""What `ossquant quantize` says when it cannot: exit code, one sentence, nothing written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import run_cli


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(code: int, *words: str, arguments: tuple[str | Path, ...], folder: Path) -> None:
    """Run it; every word must stand in the error or its hint."""
    before = listing(folder)
    done = run_cli("quantize", *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    said = "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :])
    assert len(said.splitlines()) <= 2
    assert all(word in said for word in words), said
    assert listing(folder) == before


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def not_gpt_oss(model: Path) -> list[str]:
    change_config(model, model_type="llama")
    return ["'llama'", "'gpt_oss'"]


def no_key(model: Path) -> list[str]:
    change_config(model, num_local_experts=None)
    return ["'num_local_experts' is missing"]


def cut_shard(model: Path) -> list[str]:
    os.truncate(model / "model-00002-of-00002.safetensors", 500_000)
    return ["model-00002-of-00002.safetensors: 500000 of ", "truncated"]


def no_shard(model: Path) -> list[str]:
    (model / "model-00002-of-00002.safetensors").unlink()
    return ["model-00002-of-00002.safetensors: named in model.safetensors.index.json"]


def no_config(model: Path) -> list[str]:
    (model / "config.json").unlink()
    return ["no config.json"]


def unfinished(model: Path) -> list[str]:
    (model / "ossquant-job.json").write_text("{}")
    return ["an unfinished job, not a checkpoint", "run its `ossquant quantize` again"]


def other_config(model: Path) -> list[str]:
    change_config(model, vocab_size=641)
    return ["model.embed_tokens.weight", "[640, 192]", "[641, 192]"]


@pytest.mark.parametrize(
    "damage",
    [not_gpt_oss, no_key, cut_shard, no_shard, no_config, unfinished, other_config],
    ids=lambda damage: damage.__name__,
)
def test_damaged_source(model: Path, damage: Callable[[Path], list[str]], tmp_path: Path) -> None:
    """A source that is not what it should be ends with 3, and the sentence says what is wrong with which file."""
    words = damage(model)
    refused(3, *words, arguments=(model, "out"), folder=tmp_path)


def test_no_source(tmp_path: Path) -> None:
    """A path that is not there ends with 2."""
    refused(2, "no checkpoint at ./nowhere", arguments=("./nowhere", "out"), folder=tmp_path)
    refused(2, "is missing", arguments=(".", "--scheme", "nf4"), folder=tmp_path)


@pytest.mark.parametrize("output", ["taken", "taken/file.txt", "model", "model/out"])
def test_output(model: Path, output: str, tmp_path: Path) -> None:
    """An OUTPUT that exists, is a file, or lies inside of SOURCE, or is SOURCE, ends with 2 and stays as it is."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file.txt").write_text("mine")
    words = {"taken": "exists", "taken/file.txt": "is a file"}.get(output, "inside the source")
    refused(2, words, arguments=(model, output), folder=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scheme", "nf5"], ["unknown scheme 'nf5'", "did you mean 'nf4'?"]),
        (["--scheme", "int8"], ["unknown scheme 'int8'", "did you mean 'int4'?"]),
        (["--scheme", "nf4", "--recipe", "good.toml"], ["--scheme and --recipe exclude each other"]),
        (["--recipe", "absent.toml"], ["no recipe at absent.toml"]),
        (["--recipe", "broken.toml"], ["broken.toml: not readable as TOML"]),
        (["--recipe", "unknown.toml"], ["unknown.toml: unknown key 'atention'", "did you mean 'attention'?"]),
        (["--max-shard-size", "five"], ["'five' is not a size", "5GB"]),
        (["--max-shard-size", "-1GB"], ["'-1GB' is not a size"]),
        (["--max-shard-size", "0"], ["--max-shard-size must be at least 1 byte"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_options(trained: Path, options: list[str], words: list[str], tmp_path: Path) -> None:
    """An option that cannot be meant ends with 2, and the sentence names what is nearest to it."""
    recipe = 'name = "mine"\nwhy = "to test"\n[attention]\nformat = "nf4"\n'
    (tmp_path / "good.toml").write_text(recipe)
    (tmp_path / "broken.toml").write_text(recipe + "[experts")
    (tmp_path / "unknown.toml").write_text(recipe.replace("attention", "atention"))
    refused(2, *words, arguments=(trained, "out", *options), folder=tmp_path)


def test_quantized_source(quantized: dict[str, Path], tmp_path: Path) -> None:
    """A source that is NF4 already ends with 3, and the sentence says what to quantize from."""
    words = ["are nf4 already", "quantize from the published or the bf16 checkpoint"]
    refused(3, *words, arguments=(quantized["nf4"], "out", "--scheme", "fp4"), folder=tmp_path)


def test_hostile_name(model: Path, tmp_path: Path) -> None:
    """A tensor's name cannot add lines to the error or steer the terminal."""
    path = model / "model-00001-of-00002.safetensors"
    raw = path.read_bytes()
    name = b"model.embed_tokens.weight"
    assert name in raw
    path.write_bytes(raw.replace(name, rb"\u001b[2J\nerror: all well"[: len(name)].ljust(len(name), b"!"), 1))
    refused(3, arguments=(model, "out"), folder=tmp_path)
