"""Quantizing by Ray tasks, on a real cluster of two nodes on this machine."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import run_cli
from make_checkpoint import TINY, make_checkpoint
from ossquant.checkpoint.reader import JOB, open_checkpoint
from ossquant.checkpoint.writer import plan_shards
from ossquant.errors import CheckpointError, MissingExtraError, UsageError
from ossquant.quantize import plan_quantize, quantize
from ossquant.quantize_ray import CodedShard, ShardJob, code_shard, quantize_on_ray, source_files
from ossquant.recipe import built_in

SHARD = 10**6
NF4 = built_in("nf4")
PATIENCE = 60  # seconds, for what takes one or two
MEMORY = 80 * 2**20  # of a node's object store, which only answers pass through


class _Cluster:
    """A head without cores and two nodes with one each, all of them raylets of their own."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address
        self.nodes: dict[int, Any] = {}  # by the raylet's process
        self.add()
        self.add()

    def add(self, **options: Any) -> int:
        node = self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY, **options)
        raylet: int = node.all_processes["raylet"][0].process.pid
        self.nodes[raylet] = node
        return raylet

    def kill(self, raylet: int) -> None:
        """SIGKILL for a node; its workers are left to themselves."""
        self._cluster.remove_node(self.nodes.pop(raylet), allow_graceful=False)

    def remove(self, raylet: int) -> None:
        self._cluster.remove_node(self.nodes.pop(raylet))

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[_Cluster]:
    """A cluster that tests may take nodes from and add nodes to, as long as two remain."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    running = _Cluster()
    yield running
    running.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of 37 MB, 46 files as NF4."""
    folder = tmp_path_factory.mktemp("ray") / "source"
    make_checkpoint(folder, replace(TINY, hidden_size=768, intermediate_size=768))
    return folder


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one machine makes of it."""
    folder = tmp_path_factory.mktemp("ray") / "plain"
    quantize(source, folder, NF4, max_shard_size=SHARD)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder; a folder in it would be an error."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished(output: Path) -> dict[str, int]:
    """The inode of each file that the journal calls done."""
    names = json.loads((output / JOB).read_bytes())["done"]
    return {name: (output / f"{name}.partial").stat().st_ino for name in names}


def attempt_at_work(output: Path) -> tuple[int, Path] | None:
    """A process that is writing an attempt in output just now, and where."""
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = file.readlink()
        except OSError:  # it has ended, or has closed the file
            continue
        if target.parent.parent == output and target.parent.name.startswith("ossquant-attempts-"):
            return int(file.parts[2]), target
    return None


def stop_a_writer(output: Path) -> tuple[int, Path]:
    """Freeze a process in the midst of an attempt."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = attempt_at_work(output)
        if found:
            os.kill(found[0], signal.SIGSTOP)
            if attempt_at_work(output) == found:  # else it was through before the signal came
                return found
            os.kill(found[0], signal.SIGCONT)
    raise AssertionError("no task was seen at work")


def parent(process: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def test_node_killed_half_way(
    cluster: _Cluster, source: Path, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A node is killed while it writes: the other writes that file again, and every byte is that of the plain run."""
    output = tmp_path / "out"
    abandoned: list[Path] = []

    def kill_once(done: int, total: int) -> None:
        if not abandoned:
            assert 0 < done < total
            assert 0 < len(finished(output)) < len(list(plain.glob("*.safetensors")))
            process, path = stop_a_writer(output)
            abandoned.append(path)
            cluster.kill(parent(process))
            os.kill(process, signal.SIGKILL)  # a frozen one does not see that its raylet is gone
            assert path.exists()

    report = quantize_on_ray(cluster.address, source, output, NF4, max_shard_size=SHARD, progress=kill_once)
    assert len(abandoned) == 1
    assert len(cluster.nodes) == 1
    assert not report.resumed
    assert contents(output) == contents(plain)
    assert capfd.readouterr().out == ""
    cluster.add()


def test_command(cluster: _Cluster, source: Path, plain: Path, tmp_path: Path) -> None:
    """The command with --ray prints its one answer, on relative paths, too, and tells the tasks' CPU time."""
    arguments = (source.name, tmp_path / "out", "--scheme", "nf4", "--max-shard-size", "1MB", "--json")
    done = run_cli("quantize", *arguments, "--ray", cluster.address, cwd=source.parent)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1  # the costs
    report = json.loads(done.stdout)
    assert report["files"] == len(list(plain.glob("*.safetensors")))
    assert report["cpu_seconds"] > 0
    assert contents(tmp_path / "out") == contents(plain)


@pytest.mark.parametrize("resume_on_ray", [True, False], ids=["on Ray", "here"])
def test_interrupted(cluster: _Cluster, source: Path, plain: Path, resume_on_ray: bool, tmp_path: Path) -> None:
    """Ctrl-C keeps the files that are done; with Ray or without, the next run does the others alone."""
    output = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if 3 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_on_ray(cluster.address, source, output, NF4, max_shard_size=SHARD, progress=interrupt)
    with pytest.raises(CheckpointError, match="unfinished job"):
        open_checkpoint(output)
    done = finished(output)
    assert done
    assert not list(output.glob("ossquant-attempts-*"))
    steps: list[tuple[int, int]] = []
    options: dict[str, Any] = {"max_shard_size": SHARD, "progress": lambda *step: steps.append(step)}
    if resume_on_ray:
        report = quantize_on_ray(cluster.address, source, output, NF4, **options)
        assert len(steps) == report.files - len(done)
    else:
        report = quantize(source, output, NF4, **options)
    assert steps == sorted(steps)
    assert steps[-1] == (report.source.nbytes, report.source.nbytes)
    assert report.resumed
    assert contents(output) == contents(plain)
    assert {name: (output / name).stat().st_ino for name in done} == done


def test_plain_run_goes_on_with_ray(cluster: _Cluster, source: Path, plain: Path, tmp_path: Path) -> None:
    """What a plain run has done before a kill, a run on Ray takes over, and clears away a killed run's attempts."""
    output = tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        if 3 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, output, NF4, max_shard_size=SHARD, progress=interrupt)
    done = finished(output)
    assert done
    left = output / "ossquant-attempts-of-a-killed-run"
    left.mkdir()
    (left / "model-00001-of-00046.safetensors.0").write_bytes(b"half")
    assert quantize_on_ray(cluster.address, source, output, NF4, max_shard_size=SHARD).resumed
    assert contents(output) == contents(plain)
    assert {name: (output / name).stat().st_ino for name in done} == done


def test_rounding_error(cluster: _Cluster, random_bf16: Path, tmp_path: Path) -> None:
    """What rounding to MXFP4 lost is added up over the tasks, each weight once, though blocks and scales part."""
    recipe = built_in("mxfp4")
    size = 150_000  # parts gate_up_proj, but not down_proj
    here = quantize(random_bf16, tmp_path / "here", recipe, max_shard_size=size)
    there = quantize_on_ray(cluster.address, random_bf16, tmp_path / "there", recipe, max_shard_size=size)
    assert there.mxfp4_error == pytest.approx(here.mxfp4_error, rel=1e-12)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_damaged_source(cluster: _Cluster, source: Path, tmp_path: Path) -> None:
    """What a task finds wrong ends the command as without Ray: the same sentence, the same exit code."""
    damaged = Path(shutil.copytree(source, tmp_path / "source"))
    with open_checkpoint(damaged) as checkpoint:
        location = checkpoint.locations["model.layers.3.self_attn.k_proj.weight"]
    with location.path.open("r+b") as file:
        file.seek(location.placed.offset + 1000)
        file.write(b"\xc0\x7f")
    arguments = ("quantize", damaged, tmp_path / "out", "--max-shard-size", "1MB")
    with_ray, without = run_cli(*arguments, "--ray", cluster.address), run_cli(*arguments)
    assert "k_proj.weight: NaN" in with_ray.stderr
    assert (with_ray.returncode, with_ray.stdout, with_ray.stderr) == (3, "", without.stderr)
    assert not list((tmp_path / "out").glob("ossquant-attempts-*"))


def test_another_version_on_a_node(cluster: _Cluster, source: Path, tmp_path: Path) -> None:
    """A node with another ossquant is refused by its name."""
    about = tmp_path / "site/ossquant-0.0.9.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: ossquant\nVersion: 0.0.9\n")
    node = cluster.add(env_vars={"PYTHONPATH": str(about.parents[1])})
    try:
        with pytest.raises(UsageError, match=rf"node {socket.gethostname()} has ossquant 0\.0\.9, this machine"):
            quantize_on_ray(cluster.address, source, tmp_path / "out", NF4, max_shard_size=SHARD)
    finally:
        cluster.remove(node)


@pytest.fixture
def job(source: Path, tmp_path: Path) -> ShardJob:
    """The job of a task for one file, OUTPUT being tmp_path."""
    (tmp_path / "attempts").mkdir()
    with open_checkpoint(source) as checkpoint:
        shard = plan_shards(plan_quantize(checkpoint, NF4), SHARD)[0]
        files = source_files(checkpoint)
        return ShardJob(source, files, checkpoint.config, NF4, shard, tmp_path / "attempts", 1)


def test_attempts_have_names_of_their_own(job: ShardJob, plain: Path) -> None:
    """Two attempts at one file do not meet, and are alike."""
    first, second = code_shard(job), code_shard(job)
    assert isinstance(first, CodedShard)
    assert isinstance(second, CodedShard)
    assert first.path != second.path
    assert first.entries == second.entries
    assert first.path.read_bytes() == second.path.read_bytes() == (plain / job.shard.name).read_bytes()


def test_late_attempt(job: ShardJob, tmp_path: Path) -> None:
    """An attempt that begins after its run has ended finds no folder to write to, and leaves nothing."""
    job.attempts.rmdir()
    answer = code_shard(job)
    assert isinstance(answer, UsageError)
    assert answer.message == f"node {socket.gethostname()} does not see {tmp_path}"
    assert list(tmp_path.iterdir()) == []


def test_node_without_the_source(job: ShardJob, tmp_path: Path) -> None:
    """A node that does not see SOURCE, or sees another there, is named."""
    answer = code_shard(replace(job, source=tmp_path / "elsewhere"))
    assert isinstance(answer, UsageError)
    assert answer.message == f"node {socket.gethostname()} does not see {tmp_path / 'elsewhere'}"
    other = Path(shutil.copytree(job.source, tmp_path / "other"))
    os.utime(other / "model.safetensors", (0, 0))
    answer = code_shard(replace(job, source=other))
    assert isinstance(answer, UsageError)
    assert answer.message == f"node {socket.gethostname()} sees something else at {other}"
    (other / "config.json").unlink()
    answer = code_shard(replace(job, source=other))
    assert isinstance(answer, UsageError)
    assert answer.message == f"node {socket.gethostname()} sees something else at {other}: no config.json"


def test_no_cluster(source: Path, tmp_path: Path) -> None:
    """An address where no cluster is, and one that is none, is a sentence at once, and OUTPUT is not made."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        done = run_cli("quantize", source, tmp_path / "out", "--ray", address)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-2] == f"error: no Ray cluster at {address}"
    for address in ("local", "somewhere", ""):
        with pytest.raises(UsageError, match=f"no Ray cluster at {address}"):
            quantize_on_ray(address, source, tmp_path / "out", NF4, max_shard_size=SHARD)
    assert not (tmp_path / "out").exists()


def test_without_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray, the error says the line that installs it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as caught:
        quantize_on_ray("auto", source, tmp_path / "out", NF4, max_shard_size=SHARD)
    assert caught.value.hint == "pip install 'ossquant[ray]'"
