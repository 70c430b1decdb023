"""A folder that appears whole or not at all: full disks, kills, leftovers of other jobs."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import killed, run_cli
from ossquant.checkpoint.header import read_header
from ossquant.checkpoint.reader import INDEX, open_checkpoint
from ossquant.checkpoint.writer import CheckpointWriter, Shard, ShardWriter, plan_shards
from ossquant.errors import CheckpointError, DoesNotFitError, UsageError
from ossquant.plan import make_plan
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.scheme import ITEMSIZE
from ossquant.spec import ModelSpec

HYBRID = built_in("hybrid")
SHARD = 1_200_000  # two files of the tiny model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_whole(folder: Path) -> bool:
    """Whether a reader takes the folder for a checkpoint."""
    try:
        with open_checkpoint(folder) as checkpoint:
            return checkpoint.plan.nbytes > 0
    except (CheckpointError, UsageError):
        return False


def interrupt(source: Path, output: Path, part: float, **options: Any) -> None:
    """Quantize to HYBRID as if Ctrl-C came when part of the source was done."""

    def stop(done: int, total: int) -> None:
        if done >= part * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, output, HYBRID, progress=stop, **{"max_shard_size": SHARD, **options})


@pytest.fixture
def source(trained: Path, tmp_path: Path) -> Path:
    """The trained model without most of what stands beside the weights."""
    keep = shutil.ignore_patterns("token*", "special*", "dialog*", "*.md")
    return Path(shutil.copytree(trained, tmp_path / "source", ignore=keep))


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    quantize(source, tmp_path / "whole", HYBRID, max_shard_size=SHARD)
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("scheme", ["hybrid", "nf4", "bf16"])
@pytest.mark.parametrize("limit", [10**5, 700_000, 10**9])
def test_plan_shards(trained: Path, scheme: str, limit: int) -> None:
    """Each tensor stands once, aligned, in a file no larger than asked for, after a header that ends on a page."""
    with open_checkpoint(trained) as checkpoint:
        plan = make_plan(checkpoint.spec, built_in(scheme))
    shards = plan_shards(plan, limit)
    stored = [placed.tensor for shard in shards for placed in shard.placed]
    assert sorted(t.name for t in stored) == sorted(part.name for entry in plan.tensors for part in entry.stored)
    for shard in shards:
        data = sum(placed.tensor.nbytes for placed in shard.placed)
        assert data <= limit or len(shard.placed) == 1
        assert shard.nbytes == len(shard.header) + data
        assert len(shard.header) % 4096 == 0
        assert all(placed.offset % ITEMSIZE[placed.tensor.dtype] == 0 for placed in shard.placed)
    names = [shard.name for shard in shards]
    count = len(names)
    several = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == (several if count > 1 else ["model.safetensors"])


def test_parts_stay_together() -> None:
    """The parts of one tensor share a file where they fit."""
    plan = make_plan(ModelSpec.published("20b"), HYBRID)
    places = {placed.tensor.name: shard.name for shard in plan_shards(plan, 10**9) for placed in shard.placed}
    assert len(set(places.values())) > 10
    for entry in plan.tensors:
        assert len({places[part.name] for part in entry.stored}) == 1


def test_commit_too_early(tmp_path: Path, trained: Path) -> None:
    """A writer that misses a byte does not commit."""
    with open_checkpoint(trained) as checkpoint:
        plan = make_plan(checkpoint.spec, built_in("bf16"))
    with CheckpointWriter(tmp_path / "out", plan_shards(plan, 10**9), {}, force=False) as writer:
        for entry in plan.tensors[:-1]:
            for part in entry.stored:
                writer.write(part.name, memoryview(bytes(part.nbytes)))
        writer.write("lm_head.weight", memoryview(bytes(1024)), piece=1024)
        with pytest.raises(CheckpointError, match="not all of it was written"):
            writer.commit({}, plan.nbytes, [])
    assert not is_whole(tmp_path / "out")


def test_output_exists(source: Path, tmp_path: Path) -> None:
    """A folder that holds anything, or a file, is refused and left as it is; an empty folder is taken."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists and is not empty.*--force"):
        quantize(source, tmp_path / "out", HYBRID)
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}
    with pytest.raises(UsageError, match="is a file"):
        quantize(source, tmp_path / "out/notes.txt", HYBRID, force=True)
    (tmp_path / "out/notes.txt").unlink()
    assert quantize(source, tmp_path / "out", HYBRID).files == 1


def test_output_and_source(source: Path, tmp_path: Path) -> None:
    """OUTPUT may be neither the source nor inside of it, not even with --force or by a link."""
    (tmp_path / "link").symlink_to(source)
    before = contents(source)
    for output in (source, source / "out", source / "a/b", tmp_path / "link", tmp_path / "link/out"):
        with pytest.raises(UsageError, match="inside the source"):
            quantize(source, output, HYBRID, force=True)
    assert contents(source) == before


def test_force(source: Path, whole: dict[str, bytes], quantized: dict[str, Path], tmp_path: Path) -> None:
    """--force leaves what a new folder would hold: no shard, index or chat template of what was there before."""
    shutil.copytree(quantized["nf4"], tmp_path / "out")
    (tmp_path / "out/added_tokens.json").write_text("{}")
    quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD, force=True)
    assert contents(tmp_path / "out") == whole


def test_force_spares_what_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    """--force on a folder of something else, say a home folder, is refused and leaves it alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no checkpoint"):
        quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD, force=True)
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_resumes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """An interrupted job leaves no checkpoint, and goes on with the files that are done."""
    interrupt(source, tmp_path / "out", 0.7)
    assert not is_whole(tmp_path / "out")
    done = json.loads((tmp_path / "out/ossquant-job.json").read_text())["done"]
    assert done
    times = {name: (tmp_path / f"out/{name}.partial").stat().st_mtime_ns for name in done}
    report = quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD)
    assert report.resumed
    assert contents(tmp_path / "out") == whole
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done} == times


def test_resume_starts_over_what_is_damaged(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A finished file that was cut or whose header was changed since is written again."""
    for size in (100, -100):
        interrupt(source, tmp_path / "out", 0.7)
        first = next((tmp_path / "out").glob("model-00001*.partial"))
        os.truncate(first, size if size > 0 else first.stat().st_size + size)
        quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD)
        assert contents(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")


def saved_tensors(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ossquant-job.json").read_text())["saved"].get("model.safetensors", {})


def test_resumes_inside_a_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one large file the tensors that the journal knows are not coded again; a changed one is."""
    monkeypatch.setattr("ossquant.checkpoint.writer.SAVED_BYTES", 300_000)
    quantize(source, tmp_path / "whole", HYBRID)
    whole, written = contents(tmp_path / "whole"), []
    write = ShardWriter.write

    def watch(self: ShardWriter, name: str, data: memoryview, offset: int = 0, piece: int = 0) -> None:
        written.append(name)
        write(self, name, data, offset, piece)

    monkeypatch.setattr(ShardWriter, "write", watch)
    for damaged in (False, True):
        out = tmp_path / f"out{damaged}"
        interrupt(source, out, 0.7, max_shard_size=10**9)
        known = saved_tensors(out)
        assert len(known) > 20
        if damaged:
            name = next(iter(known))
            place = next(p for p in shards_of(source, 10**9)[0].placed if p.tensor.name == name)
            with (out / "model.safetensors.partial").open("r+b") as file:
                file.seek(place.offset)
                file.write(b"\xff" * 8)
            known.pop(name)
        written.clear()
        assert quantize(source, out, HYBRID).resumed
        assert written
        assert not known.keys() & written
        assert contents(out) == whole


@pytest.mark.parametrize("other", ["recipe", "shard size", "source"])
def test_other_job(source: Path, other: str, tmp_path: Path) -> None:
    """An unfinished job is not resumed by another one, which needs --force to replace it."""
    interrupt(source, tmp_path / "out", 0.7)
    before = contents(tmp_path / "out")
    if other == "source":
        os.utime(source / "model-00001-of-00002.safetensors")
    recipe, shard_size = built_in("nf4") if other == "recipe" else HYBRID, 500_000 if other == "shard size" else SHARD
    with pytest.raises(UsageError, match="another unfinished job"):
        quantize(source, tmp_path / "out", recipe, max_shard_size=shard_size)
    assert contents(tmp_path / "out") == before
    assert not quantize(source, tmp_path / "out", recipe, max_shard_size=shard_size, force=True).resumed
    assert is_whole(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))


def test_old_weights_do_not_count_as_done(
    source: Path, whole: dict[str, bytes], random_tiny: Path, tmp_path: Path
) -> None:
    """Weights that --force replaces never end up in the new checkpoint, though its unfinished files be removed."""
    quantize(random_tiny, tmp_path / "out", HYBRID, max_shard_size=SHARD)  # same names, sizes and headers
    interrupt(source, tmp_path / "out", 0.7, force=True)
    for partial in (tmp_path / "out").glob("*.partial"):
        partial.unlink()
    quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD, force=True)
    assert whole.items() <= contents(tmp_path / "out").items()


@pytest.mark.parametrize("before", ["nothing", "another checkpoint"])
def test_killed_at_every_operation(
    source: Path, whole: dict[str, bytes], quantized: dict[str, Path], before: str, tmp_path: Path
) -> None:
    """Killed before any operation, the folder is the old or the new checkpoint or none; run again, it is whole."""
    force, out = before != "nothing", tmp_path / "out"
    old = contents(quantized["nf4"])

    def run() -> None:
        quantize(source, out, HYBRID, max_shard_size=SHARD, force=force)

    operation, states = 0, set()
    while True:
        if force:
            shutil.copytree(quantized["nf4"], out)
        operation += 1
        if not killed(run, out, operation):
            break
        state = "none"
        if is_whole(out):
            found = contents(out)
            state = "old" if force and old.items() <= found.items() else "new"
            assert state == "old" or whole.items() <= found.items(), operation
        states.add(state)
        if force or state == "none":
            run()
        assert whole.items() <= contents(out).items(), operation
        assert is_whole(out)
        shutil.rmtree(out)
    assert operation > 20
    assert states == ({"none", "old", "new"} if force else {"none", "new"})


def shards_of(source: Path, shard_size: int = SHARD) -> list[Shard]:
    with open_checkpoint(source) as checkpoint:
        return plan_shards(make_plan(checkpoint.spec, HYBRID), shard_size)


def test_too_small_a_disk(source: Path, disk: Callable[[int], Path]) -> None:
    """A disk that cannot hold the result is told before anything is written, with both sizes; exit code 4."""
    out = disk(2**20) / "out"
    done = run_cli("quantize", source, out)
    assert done.returncode == 4
    assert re.search(rf"^error: {out}: 2\.1\d MB are to be written, 1\.05 MB are free$", done.stderr, re.M)
    assert not out.exists() or not any(out.iterdir())


def test_disk_fills_up(source: Path, whole: dict[str, bytes], disk: Callable[[int], Path]) -> None:
    """A disk that fills up while weights are written leaves nothing that looks whole; with space again, it goes on."""
    folder = disk(sum(shard.nbytes for shard in shards_of(source)) + 2**20)

    def fill(done: int, total: int) -> None:
        try:
            with (folder / "filler").open("ab", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass

    with pytest.raises(DoesNotFitError, match="the disk is full"):
        quantize(source, folder / "out", HYBRID, max_shard_size=SHARD, progress=fill)
    assert not is_whole(folder / "out")
    (folder / "filler").unlink()
    quantize(source, folder / "out", HYBRID, max_shard_size=SHARD)
    assert contents(folder / "out") == whole


def test_disk_full_at_the_end(trained: Path, disk: Callable[[int], Path]) -> None:
    """A disk that has no room for the tokenizer gives exit code 4 and no checkpoint; with room, it is resumed."""
    needed = sum(-(-shard.nbytes // 4096) * 4096 for shard in shards_of(trained))
    journals = 12 * 4096  # an old and a new one, whichever shard is done first; one leaves less than a tokenizer takes
    out = disk(needed + journals) / "out"
    command = ("quantize", trained, out, "--max-shard-size", str(SHARD), "--json")
    done = run_cli(*command)
    assert done.returncode == 4
    assert f"error: {out}: the disk is full" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert not is_whole(out)
    disk(2**23)
    done = run_cli(*command)
    assert (done.returncode, json.loads(done.stdout)["resumed"]) == (0, True)
    assert is_whole(out)


def limited(what: int, limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (limit, limit))


def test_file_too_large(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files is told in a sentence."""
    done = run_cli("quantize", source, tmp_path / "out", preexec_fn=limited(resource.RLIMIT_FSIZE, 10**6))
    assert done.returncode == 2
    assert f"error: {tmp_path / 'out'}: File too large" in done.stderr.splitlines()
    assert not is_whole(tmp_path / "out")


def test_more_shards_than_open_files(source: Path, tmp_path: Path) -> None:
    """There may be more shards than a process may open files."""
    command = ("quantize", source, tmp_path / "out", "--max-shard-size", "20kB")
    done = run_cli(*command, preexec_fn=limited(resource.RLIMIT_NOFILE, 32))
    assert done.stderr.count("error:") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 32
    assert is_whole(tmp_path / "out")


def test_index(source: Path, tmp_path: Path) -> None:
    """The index names every tensor's file, and the bytes of all tensors."""
    report = quantize(source, tmp_path / "out", HYBRID, max_shard_size=SHARD)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    headers = {path.name: read_header(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert index["weight_map"] == {p.tensor.name: file for file, placed in headers.items() for p in placed}
    assert index["metadata"]["total_size"] == report.result.nbytes
    assert report.files == len(headers) == 2
