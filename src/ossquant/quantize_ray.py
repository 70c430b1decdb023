"""Quantize on the machines of a Ray cluster: one task a file, over folders that all of them share.

A task writes its file under a name of its own and tells the hashes; the process that asked for it alone renames,
keeps the journal and commits. So a task that was given up can damage nothing, and an interrupted run goes on where
it stopped, with Ray or without.
"""

import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.checkpoint.writer import CheckpointWriter, Entries, Shard, ShardWriter
from ossquant.errors import MissingExtraError, OssquantError, UsageError
from ossquant.jobs import MAX_THREADS, Progress
from ossquant.plan import Plan
from ossquant.quantize import Loss, QuantizeReport, plan_quantize, quantize, run_here
from ossquant.recipe import Recipe

RETRIES = 5  # of a file whose process or machine was lost
CONNECT_SECONDS = 10.0
CANCEL_SECONDS = 3.0  # what is not gone by then writes to a folder that is


@dataclass(frozen=True)
class ShardJob:
    """All that a task needs to know; both folders absolute. files: name, bytes and seconds of change."""

    source: Path
    files: Sequence[tuple[str, int, int]]
    config: Mapping[str, Any]
    recipe: Recipe
    shard: Shard
    attempts: Path
    cores: int


@dataclass(frozen=True)
class CodedShard:
    """The file that a task wrote, its tensors' hashes, and what it took."""

    path: Path
    entries: Entries
    error: float
    norm: float
    cpu_seconds: float


def quantize_on_ray(
    address: str,
    source: str | Path,
    output: Path,
    recipe: Recipe,
    *,
    max_shard_size: int,
    force: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Do what `quantize` does, by tasks of the Ray cluster at address: "auto", or HOST:PORT.

    Every node needs this version of ossquant and must see SOURCE and OUTPUT under their names here. What a lost node
    was writing is written again by another. Raises what quantize raises, and MissingExtraError.
    """
    with _connected(address):
        return quantize(
            source, output, recipe, max_shard_size=max_shard_size, force=force, progress=progress,
            run=partial(_run_tasks, recipe),
        )  # fmt: skip


def code_shard(job: ShardJob) -> CodedShard | OssquantError:
    """Write one file, in a task; a failure of ours is an answer, for Ray would wrap an exception in its own."""
    cpu_started = time.process_time()
    loss, entries = Loss(), Entries()
    path = job.attempts / f"{job.shard.name}.{uuid.uuid4().hex}"
    try:
        with (
            _open_source(job) as checkpoint,
            closing(ShardWriter(job.shard, path, entries.update)) as writer,
        ):
            run_here(checkpoint, plan_quantize(checkpoint, job.recipe), writer, loss, None, job.cores)
    except OssquantError as error:
        return error
    return CodedShard(path, entries, loss.error, loss.norm, time.process_time() - cpu_started)


def _open_source(job: ShardJob) -> Checkpoint:
    """Open SOURCE as this machine sees it. Raises UsageError if it, or OUTPUT, is not what the job means."""
    if not job.attempts.is_dir():
        raise _blind("OUTPUT", f"does not see {job.attempts.parent}")
    if not job.source.is_dir():
        raise _blind("SOURCE", f"does not see {job.source}")
    try:
        checkpoint = open_checkpoint(job.source)
    except OssquantError as error:
        raise _blind("SOURCE", f"sees something else at {error.message}") from error
    if source_files(checkpoint) != job.files or checkpoint.config != job.config:
        raise _blind("SOURCE", f"sees something else at {job.source}")
    return checkpoint


def _blind(what: str, sees: str) -> UsageError:
    return UsageError(f"node {socket.gethostname()} {sees}", hint=f"{what} must be on a disk that all nodes share")


def source_files(checkpoint: Checkpoint) -> list[tuple[str, int, int]]:
    # seconds, for network file systems may cut off the rest
    return [(path.name, path.stat().st_size, int(path.stat().st_mtime)) for path in checkpoint.files]


def _run_tasks(
    recipe: Recipe,
    checkpoint: Checkpoint,
    plan: Plan,
    writer: CheckpointWriter,
    loss: Loss,
    progress: Progress | None,
) -> float:
    """Have every file that the writer needs made by a task; see quantize.Run."""
    import ray

    cores = _cores(ray.nodes())
    # SPREAD, for the files of one job come from one disk, and each node has a way of its own to it
    task = ray.remote(num_cpus=cores, max_retries=RETRIES, scheduling_strategy="SPREAD")(_by_value())
    cpu_seconds = 0.0
    with writer.attempts() as folder:
        attempts = folder.absolute()
        job = ShardJob(
            checkpoint.folder.absolute(),
            source_files(checkpoint),
            checkpoint.config,
            recipe,
            writer.shards[0],
            attempts,
            cores,
        )
        pending = {
            task.remote(version("ossquant"), pickle.dumps(replace(job, shard=shard))): shard
            for shard in writer.unfinished
        }
        try:
            while pending:
                (reference,), _ = ray.wait(list(pending), num_returns=1)
                shard = pending.pop(reference)
                coded = _answer(reference, shard)
                writer.take(shard, coded.path, coded.entries)
                for lost in attempts.glob(f"{shard.name}.*"):
                    lost.unlink(missing_ok=True)
                loss.add(coded.error, coded.norm)
                cpu_seconds += coded.cpu_seconds
                if progress:
                    progress(*_progress(checkpoint, writer))
        finally:
            _cancel(list(pending))
    return cpu_seconds


def _by_value() -> Callable[[str, bytes], Any]:
    """The task's function, which Ray sends along whole, for a node may have another ossquant, or none."""

    def run_shard(wanted: str, job: bytes) -> Any:
        import pickle
        import socket
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("ossquant")
        except PackageNotFoundError:
            found = ""
        if found != wanted:
            return socket.gethostname(), found
        from ossquant.quantize_ray import code_shard

        return code_shard(pickle.loads(job))  # noqa: S301  from the process that sent this function

    return run_shard


def _answer(reference: Any, shard: Shard) -> CodedShard:
    """What a task has made. Raises the error of ours that it ended with, UsageError if its processes die."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        answer = ray.get(reference)
    except RayTaskError:
        raise  # a bug, which its traceback tells best
    except RayError as error:
        raise UsageError(
            f"{shard.name}: Ray has given up on its task: {_first_sentence(error)}",
            hint="see to the cluster, then run the command again: it goes on with the files that are done",
        ) from error
    if isinstance(answer, OssquantError):
        raise answer
    if not isinstance(answer, CodedShard):
        node, found = answer
        wanted = f"ossquant {version('ossquant')}"
        raise UsageError(
            f"node {node} has {f'ossquant {found}' if found else 'no ossquant'}, this machine {wanted}",
            hint=f"install {wanted} on every node",
        )
    return answer


def _cancel(references: list[Any]) -> None:
    import ray

    for reference in references:
        ray.cancel(reference, force=True)
    if references:
        ray.wait(references, num_returns=len(references), timeout=CANCEL_SECONDS)


def _cores(nodes: Sequence[Mapping[str, Any]]) -> int:
    """Cores for each task: no more than the smallest node has, so that a task fits on any."""
    found = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
    return min([cores for cores in found if cores] + [MAX_THREADS])


def _progress(checkpoint: Checkpoint, writer: CheckpointWriter) -> tuple[int, int]:
    """Source bytes done, by the share of the result that is."""
    left, whole = (sum(shard.nbytes for shard in shards) for shards in (writer.unfinished, writer.shards))
    total = checkpoint.plan.nbytes
    return total * (whole - left) // whole, total


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at address; a program that is one already stays what it is."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--ray needs '{error.name}', which is not installed", hint="pip install 'ossquant[ray]'"
        ) from error
    if ray.is_initialized():
        yield
        return
    _connect(address)
    # what log_to_driver leaves: pages on stdout when a node dies, though its tasks are run again
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()
        ray._private.worker._worker_logs_enabled = True


def _connect(address: str) -> None:
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    hint = "`ray start --head` starts one, `ray start --address HOST:PORT` on every other node joins it"
    try:
        found = canonicalize_bootstrap_address(address)
        host, _, port = (found or "").rpartition(":")
        # ray.init waits minutes for an address where nobody answers, then ends the process
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        where = "on this machine" if address == "auto" else f"at {address}"
        raise UsageError(f"no Ray cluster {where}", hint=hint) from error
    try:
        ray.init(found, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"the Ray cluster at {address} cannot be used: {_first_sentence(error)}", hint=hint) from error


def _first_sentence(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__
