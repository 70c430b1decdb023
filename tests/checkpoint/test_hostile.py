"""Hostile checkpoints, whole folders of them: an error in under a second, in bounded memory."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossquant.checkpoint.header import build_header, parse_json, read_header
from ossquant.checkpoint.reader import INDEX, SINGLE, open_checkpoint, parse_weight_map
from ossquant.errors import CheckpointError
from ossquant.plan import make_plan
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.scheme import StoredTensor
from ossquant.spec import ModelSpec

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NAN, INFINITY = 0x7FC0, 0xFF80  # bits of bf16
SECONDS, EXTRA_BYTES = 1.0, 300 * 10**6


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


OPEN = """
import resource, sys, time
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    open_checkpoint(sys.argv[1]).plan
except CheckpointError as error:
    print(f"CheckpointError: {error.message}")
print(time.process_time() - started, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def assert_refused_cheaply(folder: Path, words: str) -> None:
    """Opening is a CheckpointError with these words, by a process that is given a second and 300 MB."""
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
    error, costs = done.stdout.splitlines()
    seconds, extra = map(float, costs.split())
    assert error.startswith("CheckpointError: ")
    assert words in error
    assert seconds < SECONDS
    assert extra < EXTRA_BYTES


BOMBS: dict[str, bytes] = {
    "objects": b'{"a":[' + b"{}," * 10**7 + b"0]}",
    "some objects": b'{"a":[' + b"{}," * (2**19 - 3) + b"0]}",
    "lists": b'{"a":[' + b"[]," * 10**7 + b"0]}",
    "numbers": b'{"a":[' + b"1," * 10**7 + b"0]}",
    "texts": b'{"a":[' + '"\U0001f600bcdefghi",'.encode() * (2**20 - 9) + b"0]}",
    "keys": b"{" + b",".join(b'"%x":0' % i for i in range(2 * 10**6)) + b"}",
    "some keys": b"{" + b",".join(b'"%x":0' % i for i in range(2**19 - 2)) + b"}",
    "one text": b'{"a":"' + "\U0001f600".encode() + b"x" * (24 * 2**20 - 20) + b'"}',
    "escapes": b'{"a":"' + b"\\u1234" * (4 * 10**6) + b'"}',
    "long integers": b'{"a":[' + (b"9" * 4300 + b",") * 5000 + b"0]}",
    "spaces": b"{" + b" " * 90_000_000 + b"}",
    "depth": b'{"a":' + b"[" * 10**6,
}


@pytest.mark.parametrize("where", ["config.json", INDEX, FIRST])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(folder: Path, where: str, bomb: str) -> None:
    """JSON that is small on disk and large in memory is refused, in a config, an index and a header."""
    raw = BOMBS[bomb]
    (folder / where).write_bytes(len(raw).to_bytes(8, "little") + raw if where == FIRST else raw)
    assert_refused_cheaply(folder, where)


def stored_tensors(recipe: str) -> list[StoredTensor]:
    plan = make_plan(ModelSpec.published("120b"), built_in(recipe))
    return [part for entry in plan.tensors for part in entry.stored]


def test_the_largest_model_passes() -> None:
    """The 120b in nf4 has 65,703 tensors: its header if all lie in one file, its index and its manifest are read."""
    tensors = stored_tensors("nf4")
    assert len(tensors) == 65_703
    header, _ = build_header(tensors, {"format": "pt"})
    assert len(parse_json(header[8:], SINGLE)) == 65_704
    names = {tensor.name: "model-00001-of-00013.safetensors" for tensor in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    assert len(parse_weight_map(parse_json(json.dumps(index, indent=2).encode(), INDEX))) == 65_703
    entries = {name: {"file": file, "piece": 10**9, "sha256": "0" * 64} for name, file in names.items()}
    assert len(parse_json(json.dumps({"tensors": entries}, indent=1).encode(), "manifest")["tensors"]) == 65_703


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("count", [80_000, 95_000])
def test_many_tensors_in_one_file(folder: Path, count: int, size: int) -> None:
    """A header of very many tensors, of a byte or none, is refused well within a second, at the limit and beyond."""
    (folder / INDEX).unlink()
    header, _ = build_header([StoredTensor(f"{i}", "U8", (size,)) for i in range(count)], {})
    (folder / SINGLE).write_bytes(header + bytes(count * size))
    assert_refused_cheaply(folder, "more tensors than any model has" if count > 80_000 else "in any form")


def test_many_tensors_in_many_files(folder: Path) -> None:
    """Headers that are sound one by one end at 80,000 tensors in all."""
    names = {}
    for number in range(2):
        header, _ = build_header([StoredTensor(f"{number}.{i}", "U8", (0,)) for i in range(70_000)], {})
        (folder / f"{number}.safetensors").write_bytes(header)
        names[f"{number}.0"] = f"{number}.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="more tensors than any model has"):
        open_checkpoint(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"{i}": FIRST for i in range(2**17 + 1)}}))
    assert_refused_cheaply(folder, "more tensors than any model has")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_one_shard_under_many_names(folder: Path, link: Callable[[Path, Path], None]) -> None:
    """A shard is not read again under a second name."""
    link(folder / FIRST, folder / "again.safetensors")
    table = json.loads((folder / INDEX).read_text())
    name = next(name for name, shard in table["weight_map"].items() if shard == FIRST)
    table["weight_map"][name] = "again.safetensors"
    (folder / INDEX).write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="under a second name"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, FIRST, "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "/dev/zero", "nowhere/at/../../../all", ".."])
def test_link_out_of_the_folder(folder: Path, name: str, target: str) -> None:
    """A link out of the folder is refused by its name, whatever it stands for."""
    shutil.move(folder / name, folder.parent / "outside")
    (folder / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{name}: a link out of its folder"):
        open_checkpoint(folder)


def test_link_to_itself(folder: Path) -> None:
    """Links that go in circles are refused."""
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("circle.safetensors")
    (folder / "circle.safetensors").symlink_to(FIRST)
    with pytest.raises(CheckpointError, match="a link "):
        open_checkpoint(folder)


@pytest.mark.parametrize("source", [FIRST, "config.json"])
def test_what_is_no_file(folder: Path, source: str) -> None:
    """A pipe or a folder in a file's place is refused, and nobody waits for it."""
    (folder / source).unlink()
    os.mkfifo(folder / source)
    assert_refused_cheaply(folder, source)
    (folder / source).unlink()
    (folder / source).mkdir()
    assert_refused_cheaply(folder, source)


def test_link_inside_the_folder(folder: Path) -> None:
    """A link to a file of the same folder is read."""
    (folder / FIRST).rename(folder / "weights.bin")
    (folder / FIRST).symlink_to("weights.bin")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.plan


@pytest.fixture
def snapshot(trained: Path, tmp_path: Path) -> Path:
    """The trained model as the hub's cache keeps it: links from snapshots/COMMIT to blobs/."""
    place = tmp_path / "models--someone--gpt-oss/snapshots" / ("0" * 40)
    place.mkdir(parents=True)
    (place.parent.parent / "blobs").mkdir()
    for number, path in enumerate(sorted(trained.iterdir())):
        shutil.copy(path, place.parent.parent / f"blobs/{number:064}")
        (place / path.name).symlink_to(f"../../blobs/{number:064}")
    return place


def test_hub_cache(snapshot: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache's links to its blobs are read: by the folder's path, from inside it, and through a link to it."""
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for source in (snapshot, Path(), tmp_path / "link"):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.plan


def test_hub_cache_link_to_elsewhere(snapshot: Path, tmp_path: Path) -> None:
    """A snapshot's link to anything but a blob is refused."""
    (tmp_path / "outside").write_text("{}")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link out of its folder"):
        open_checkpoint(snapshot)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(folder: Path) -> None:
    """A file that may not be read is told in a sentence."""
    (folder / FIRST).chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_checkpoint(folder)


def test_a_file_name_too_long_for_the_disk(folder: Path) -> None:
    """A name of few characters and many bytes is refused before the disk is asked for it."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "é" * 200 + ".safetensors"}}))
    with pytest.raises(CheckpointError, match="not a file name"):
        open_checkpoint(folder)


def change_data(folder: Path, name: str, item: bytes) -> None:
    """Put item into the middle of a tensor."""
    with open_checkpoint(folder) as checkpoint:
        place = checkpoint.locations[name]
    middle = place.placed.tensor.nbytes // 2 // len(item) * len(item)
    with place.path.open("r+b") as file:
        file.seek(place.placed.offset + middle)
        file.write(item)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "mxfp4", "hybrid"])
@pytest.mark.parametrize("bits", [NAN, INFINITY])
def test_weights_that_are_not_finite(random_bf16: Path, tmp_path: Path, scheme: str, bits: int) -> None:
    """One NaN or infinity in a bf16 expert stops the job by the tensor's name, and leaves no checkpoint."""
    source, name = shutil.copytree(random_bf16, tmp_path / "source"), "model.layers.1.mlp.experts.down_proj"
    change_data(source, name, np.uint16(bits).tobytes())
    with pytest.raises(CheckpointError, match=name):
        quantize(source, tmp_path / "output", built_in(scheme))
    assert not (tmp_path / "output/config.json").exists()


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int4", "bf16"])
def test_scale_that_is_not_finite(folder: Path, tmp_path: Path, scheme: str) -> None:
    """One scale of 255 stops the job by the tensor's name, and leaves no checkpoint."""
    name = "model.layers.1.mlp.experts.down_proj"
    change_data(folder, f"{name}_scales", b"\xff")
    with pytest.raises(CheckpointError, match=f"{name}.*scale of 255"):
        quantize(folder, tmp_path / "output", built_in(scheme))
    assert not (tmp_path / "output/config.json").exists()


numbers = st.sampled_from([0, 1, 2, 16, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]) | st.integers(0, 64)
headers = st.dictionaries(
    st.text(max_size=4),
    st.fixed_dictionaries({
        "dtype": st.sampled_from(["U8", "BF16", "F32", "I64", "F8_E8M0", "U4", ""]),
        "shape": st.lists(numbers, max_size=9),
        "data_offsets": st.lists(numbers, min_size=1, max_size=3),
    }),
    max_size=4,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(headers, st.integers(0, 64))
def test_fuzz_headers(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int) -> None:
    """Whatever a header says of its tensors, they fill the file without overlap, or it is refused."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(size))
    try:
        placed = read_header(path)
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    ends = [8 + len(raw), *(entry.offset for entry in placed[1:]), 8 + len(raw) + size]
    sizes = [
        header[entry.tensor.name]["data_offsets"][1] - header[entry.tensor.name]["data_offsets"][0] for entry in placed
    ]
    assert [entry.offset for entry in placed] == ends[: len(placed)]
    assert sum(sizes) == size


paths = st.sampled_from([FIRST, SECOND, "../x.safetensors", "/x.safetensors", "x", "", "a/../b.safetensors"]) | st.text(
    max_size=9
)
values = paths | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_indexes(trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """An index with some entries changed, added or taken away is read only if it says what it said before."""
    folder = tmp_path_factory.getbasetemp() / "fuzz_indexes"
    if not folder.exists():
        shutil.copytree(trained, folder)
    table = json.loads((trained / INDEX).read_text())["weight_map"]
    names = st.sampled_from(sorted(table)) | st.text(max_size=9)
    changes = data.draw(st.dictionaries(names, values, min_size=1, max_size=3))
    removed = data.draw(st.lists(st.sampled_from(sorted(table)), max_size=1))
    damaged = {name: shard for name, shard in (table | changes).items() if name not in removed}
    (folder / INDEX).write_text(json.dumps({"weight_map": damaged}))
    if damaged == table:
        assert open_checkpoint(folder).plan
    else:
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(folder)
        assert str(error.value).isprintable()


def test_the_largest_header(trained: Path, tmp_path: Path) -> None:
    """A header with as many tensors as may be parsed is read within a process of 2 GB of address space."""
    header, _ = build_header([StoredTensor(f"{i}", "U8", (0,)) for i in range(90_000)], {})
    (tmp_path / SINGLE).write_bytes(header)
    shutil.copy(trained / "config.json", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9)),
    )  # fmt: skip
    assert done.stdout.startswith("CheckpointError: ")
