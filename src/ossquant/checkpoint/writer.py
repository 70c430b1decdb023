"""Write a checkpoint into a folder so that it appears whole or not at all.

Every byte's place is known beforehand. Shards grow under a `.partial` name and in any order of pieces; a
journal, ossquant-job.json, lists those that are done, and every gigabyte the tensors that are, each with its hash. When
all are, the shards get their names, then the index and the manifest, then config.json: without it no reader takes the
folder for a checkpoint.
"""

import fcntl
import hashlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ossquant.checkpoint.header import Placed, build_header
from ossquant.checkpoint.manifest import (
    MANIFEST,
    MODELFILE,
    Manifest,
    SideFile,
    TensorEntry,
    TensorHash,
    hash_file,
    hash_tensors,
)
from ossquant.checkpoint.reader import CHECKPOINT_SUFFIXES, INDEX, JOB, SINGLE, Checkpoint, Location
from ossquant.errors import CheckpointError, DoesNotFitError, UsageError
from ossquant.files import write_whole
from ossquant.plan import Plan
from ossquant.scheme import ITEMSIZE, StoredTensor
from ossquant.units import size

METADATA = {"format": "pt"}  # transformers asks for it
SAVED_BYTES = 2**30  # of a shard, after which the journal learns of its tensors
_ATTEMPTS = "ossquant-attempts-"  # begins the name of a folder with what other processes write

Entries = dict[str, TensorEntry]  # by the tensors' names


@dataclass(frozen=True)
class Shard:
    """One file to be: its header, the place of each of its tensors, and zeros after the last."""

    name: str
    header: bytes
    placed: tuple[Placed, ...]
    padding: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        last = self.placed[-1]
        return last.offset + last.tensor.nbytes + self.padding


def plan_shards(plan: Plan, max_shard_size: int) -> list[Shard]:
    """Spread a plan's tensors over files of at most max_shard_size bytes of data, a tensor whole where it fits."""
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for entry in plan.tensors:
        pieces = [entry.stored] if entry.nbytes <= max_shard_size else [(part,) for part in entry.stored]
        for piece in pieces:
            nbytes = sum(part.nbytes for part in piece)
            if groups[-1] and filled + nbytes > max_shard_size:
                groups.append([])
                filled = 0
            groups[-1] += piece
            filled += nbytes
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))
    ]  # fmt: skip
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)]


def _shard(name: str, tensors: Sequence[StoredTensor]) -> Shard:
    # by falling itemsize every tensor is aligned, which torch asks of a mapped tensor
    header, placed = build_header(sorted(tensors, key=lambda t: -ITEMSIZE[t.dtype]), METADATA)
    return Shard(name, header, tuple(placed))


class TensorWriter(Protocol):
    """Takes the pieces of those tensors that it needs, from any thread, each byte once."""

    def needs(self, name: str) -> bool:
        """Whether a tensor is still to be written."""

    def write(self, name: str, data: memoryview, offset: int = 0, piece: int = 0) -> None:
        """Write a piece of a tensor; piece is the bytes of every piece but the last, the whole tensor if not given."""


class ShardWriter:
    """A TensorWriter of one file; `done` is told of its tensors when the last byte is on the disk.

    saved are tensors that stand whole in the file already; without any it is made anew. From time to time `save` is
    told of all tensors that are on the disk.
    """

    def __init__(
        self,
        shard: Shard,
        path: Path,
        done: Callable[[Entries], None],
        saved: Entries | None = None,
        save: Callable[[Entries], None] | None = None,
    ) -> None:
        self.shard = shard
        self.path = path
        self._finished, self._save = done, save
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        self._placed = {placed.tensor.name: placed for placed in shard.placed}
        self._whole = dict(saved or {})
        self._left = {name: each.tensor.nbytes for name, each in self._placed.items() if name not in self._whole}
        self._unsaved = 0  # bytes of whole tensors
        self._hashes: dict[str, TensorHash] = {}
        self._pieces: dict[str, int] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | (0 if saved else os.O_TRUNC), 0o666)
        os.pwrite(self._file, shard.header, 0)
        if shard.padding:
            os.ftruncate(self._file, shard.nbytes)

    def needs(self, name: str) -> bool:
        """Whether a tensor belongs to the file."""
        return name in self._placed

    def write(self, name: str, data: memoryview, offset: int = 0, piece: int = 0) -> None:
        """Write a piece of a tensor. Raises DoesNotFitError when the disk is full."""
        placed = self._placed[name]
        self._hash(placed.tensor, piece or placed.tensor.nbytes).add(offset, data)
        position, view = placed.offset + offset, data
        try:
            while view:
                done = os.pwrite(self._file, view[: 1 << 20], position)
                view, position = view[done:], position + done
            self._count(name, len(data))
        except OSError as error:
            raise _disk_error(error, self.path.parent) from error

    def _count(self, name: str, nbytes: int) -> None:
        """Count what was written; tell of the file when it is whole, of its tensors when there are many."""
        with self._lock:
            self._left[name] -= nbytes
            if not self._left[name]:
                del self._left[name]
                self._whole[name] = TensorEntry(self.shard.name, self._pieces[name], self._hashes[name].hexdigest())
                self._unsaved += self._placed[name].tensor.nbytes
            last, due = not self._left, self._save is not None and self._unsaved >= SAVED_BYTES
            if due:
                self._unsaved = 0
            whole = dict(self._whole) if last or due else {}
        if last:
            with self._sync_lock:
                os.fsync(self._file)
            self.close()
            self._finished({name: whole[name] for name in self._placed})
        elif due and self._save:
            with self._sync_lock:
                if self._file >= 0:
                    os.fdatasync(self._file)
            self._save(whole)

    def close(self) -> None:
        """Close the file, whole or not."""
        with self._sync_lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _hash(self, tensor: StoredTensor, piece: int) -> TensorHash:
        with self._lock:
            if tensor.name not in self._hashes:
                self._hashes[tensor.name] = TensorHash(tensor.nbytes, piece)
                self._pieces[tensor.name] = piece
            return self._hashes[tensor.name]


class CheckpointWriter:
    """Takes pieces of tensors from any thread; `commit` makes the folder a checkpoint.

    identity describes the job (source, recipe, versions): only a job with the same one is resumed.
    Leaving the context without commit keeps what is done for the next run.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], identity: Mapping[str, Any], *, force: bool) -> None:
        self.folder = folder
        self.shards = shards
        self._identity = _digest(identity, shards)
        self._force = force
        self._lock = threading.Lock()
        self._places = {placed.tensor.name: (shard, placed) for shard in shards for placed in shard.placed}
        self._files: dict[str, ShardWriter] = {}
        self._done: dict[str, Entries] = {}  # the tensors of each finished shard
        self._saved: dict[str, Entries] = {}  # those of an unfinished one that are on the disk
        self._committing = False
        self.resumed = False  # whether an interrupted run has left anything that is done

    def __enter__(self) -> "CheckpointWriter":
        self._claim_alone()
        try:
            self._claim()
        except BaseException:
            os.close(self._folder_file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        os.close(self._folder_file)  # and with it the lock

    def needs(self, name: str) -> bool:
        """Whether a tensor is still to be written."""
        shard = self._places[name][0].name
        return shard not in self._done and name not in self._saved.get(shard, {})

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of the finished shards, with its hash, in the shards' order."""
        done = (self._done.get(shard.name, {}) for shard in self.shards)
        return {name: entry for entries in done for name, entry in entries.items()}

    def write(self, name: str, data: memoryview, offset: int = 0, piece: int = 0) -> None:
        """Write a piece of a tensor, each byte once.

        piece is the bytes of every piece but the last, the whole tensor if not given.
        Raises DoesNotFitError when the disk is full.
        """
        self._open(self._places[name][0]).write(name, data, offset, piece)

    @property
    def unfinished(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [shard for shard in self.shards if shard.name not in self._done]

    @contextmanager
    def attempts(self) -> Iterator[Path]:
        """Make a folder where other processes may write whole shards for `take`; it is gone afterwards.

        Its name is new every time, so one who writes late, or sees another OUTPUT, finds nothing of that name.
        """
        folder = self.folder / f"{_ATTEMPTS}{uuid.uuid4().hex}"
        try:
            folder.mkdir()
        except OSError as error:
            raise _disk_error(error, self.folder) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what a late one may leave, the next run removes

    def take(self, shard: Shard, path: Path, entries: Entries) -> None:
        """Make a file that another process wrote the finished shard. Raises CheckpointError if it is not whole."""
        try:
            whole = path.stat().st_size == shard.nbytes and _header_is(path, shard.header)
        except OSError:
            whole = False
        if not whole:
            raise CheckpointError(
                f"{shard.name}: not here as another machine has written it",
                hint="OUTPUT must be one folder that all of them share; then run the command again",
            )
        try:
            path.replace(self._partial(shard.name))
        except OSError as error:
            raise _disk_error(error, self.folder) from error
        self._record(shard, entries)

    def commit(
        self,
        config: Mapping[str, Any],
        total_size: int | None,
        side_files: Iterable[Path],
        manifest: Manifest | None = None,
        made: Mapping[str, bytes] | None = None,
    ) -> None:
        """Give everything its name, config.json last. Raises CheckpointError if a shard is not whole.

        total_size is what the index of several shards says; None where they have none. made are further files, by
        name. The manifest gets the hashes of what is written beside the weights.
        """
        if self.unfinished:
            raise CheckpointError(f"{self.unfinished[0].name}: not all of it was written", hint="run the command again")
        side_files = list(side_files)
        try:
            (self.folder / "config.json").unlink(missing_ok=True)
            self._committing = True
            self._save_journal()
            for shard in self.shards:
                partial = self._partial(shard.name)
                if partial.exists():  # else a commit that was cut short has named it
                    partial.replace(self.folder / shard.name)
            made = dict(made or {})
            if len(self.shards) > 1 and total_size is not None:
                made[INDEX] = self._index(total_size)
            self._remove_strangers({*made, *(path.name for path in side_files)})
            for path in side_files:
                _copy_whole(path, self.folder / path.name)
            for name, data in made.items():
                write_whole(self.folder / name, data)
            made["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
            if manifest:
                hashes = {path.name: hash_file(self.folder / path.name) for path in side_files}
                hashes |= {name: SideFile(len(data), hashlib.sha256(data).hexdigest()) for name, data in made.items()}
                write_whole(self.folder / MANIFEST, replace(manifest, side_files=hashes).to_json())
            write_whole(self.folder / "config.json", made["config.json"])
            (self.folder / JOB).unlink()
            _sync_folder(self.folder)
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def _claim_alone(self) -> None:
        """Lock the folder, so that two runs do not write the same files; a killed one leaves no lock."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file", hint="choose another OUTPUT")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._folder_file = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._folder_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._folder_file)
            raise UsageError(f"{self.folder}: another run is writing there", hint="wait for it to end") from error
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def _claim(self) -> None:
        """Make the folder ours: new, resumed, or with --force."""
        job = self.folder / JOB
        journal = _read_journal(job)
        ours = journal.get("identity") == self._identity
        self._committing = ours and journal.get("committing", False)
        if not ours and _holds_anything(self.folder):
            self._check_replaceable(job)
        listed, saved = (_listed(journal, key) if ours else {} for key in ("done", "saved"))
        self._done = {s.name: listed[s.name] for s in self.shards if s.name in listed and self._is_whole(s, listed)}
        self._saved = {
            s.name: sound
            for s in self.shards
            if s.name in saved and s.name not in self._done and (sound := self._sound(s, saved[s.name]))
        }
        try:
            for stale in self.folder.glob("*.partial"):
                if stale.name.removesuffix(".partial") not in (self._done | self._saved):
                    stale.unlink()
            for stale in self.folder.glob(f"{_ATTEMPTS}*"):
                shutil.rmtree(stale, ignore_errors=True)
            self.resumed = bool(self._done or self._saved)
            self._check_room()
            self._save_journal()
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def _check_replaceable(self, job: Path) -> None:
        if not job.exists() and not (self.folder / "config.json").exists():
            raise UsageError(
                f"{self.folder} exists and is not empty, and holds no checkpoint",
                hint="choose another OUTPUT; --force replaces checkpoints only",
            )
        if not self._force:
            what = "holds another unfinished job" if job.exists() else "exists and is not empty"
            raise UsageError(f"{self.folder} {what}", hint="choose another OUTPUT, or --force to replace it")

    def _is_whole(self, shard: Shard, listed: Mapping[str, Entries]) -> bool:
        """Whether a shard that the journal lists is there, byte for byte."""
        named = [self.folder / shard.name] if self._committing else []  # else that is a checkpoint to be replaced
        for path in (self._partial(shard.name), *named):
            if path.is_file() and path.stat().st_size == shard.nbytes:
                entries = listed[shard.name]
                return _header_is(path, shard.header) and _unchanged(path, shard.placed, entries) == entries
        return False

    def _sound(self, shard: Shard, saved: Entries) -> Entries:
        """Those tensors of an unfinished shard that are there, byte for byte."""
        path = self._partial(shard.name)
        if not path.is_file() or not _header_is(path, shard.header):
            return {}
        end = path.stat().st_size
        inside = [
            each for each in shard.placed if each.tensor.name in saved and each.offset + each.tensor.nbytes <= end
        ]
        return _unchanged(path, inside, saved)

    def _check_room(self) -> None:
        needed = sum(shard.nbytes - self._allocated(shard) for shard in self.unfinished)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DoesNotFitError(
                f"{self.folder}: {size(needed)} are to be written, {size(free)} are free",
                hint="free some space or choose another disk",
            )

    def _allocated(self, shard: Shard) -> int:
        """Bytes of the disk that an unfinished shard has already."""
        partial = self._partial(shard.name)
        return min(shard.nbytes, 512 * partial.stat().st_blocks) if partial.exists() else 0

    def _open(self, shard: Shard) -> ShardWriter:
        with self._lock:
            if shard.name not in self._files:
                try:
                    self._files[shard.name] = ShardWriter(
                        shard,
                        self._partial(shard.name),
                        partial(self._record, shard),
                        self._saved.get(shard.name),
                        partial(self._save, shard),
                    )
                except OSError as error:
                    raise _disk_error(error, self.folder) from error
            return self._files[shard.name]

    def _save(self, shard: Shard, entries: Entries) -> None:
        """Note tensors of an unfinished shard that are on the disk."""
        with self._lock:
            if shard.name not in self._done:
                self._saved[shard.name] = entries
                self._save_journal()

    def _record(self, shard: Shard, entries: Entries) -> None:
        try:
            with self._lock:
                self._done[shard.name] = entries
                self._saved.pop(shard.name, None)
                self._files.pop(shard.name, None)
                self._save_journal()
        except OSError as error:
            raise _disk_error(error, self.folder) from error

    def _save_journal(self) -> None:
        done, saved = (
            {shard: {name: [entry.piece, entry.sha256] for name, entry in entries.items()} for shard, entries in each}
            for each in (self._done.items(), self._saved.items())
        )
        journal = {"identity": self._identity, "done": done, "saved": saved, "committing": self._committing}
        write_whole(self.folder / JOB, json.dumps(journal).encode())

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def _remove_strangers(self, side_files: set[str]) -> None:
        """Remove what is left of a checkpoint that --force replaces."""
        ours = {JOB, *side_files, *(shard.name for shard in self.shards)}
        for path in self.folder.iterdir():
            belongs = path.suffix in (*CHECKPOINT_SUFFIXES, ".gguf") or path.name == MODELFILE
            if path.is_file() and path.name not in ours and belongs:
                path.unlink()

    def _index(self, total_size: int) -> bytes:
        weight_map = {name: shard.name for name, (shard, _) in self._places.items()}
        return json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2).encode()


def _holds_anything(folder: Path) -> bool:
    # a job killed at its very beginning leaves no more than this
    return any(path.name != f"{JOB}.partial" for path in folder.iterdir())


def _digest(identity: Mapping[str, Any], shards: Sequence[Shard]) -> str:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for shard in shards:
        digest.update(shard.name.encode() + shard.header)
    return digest.hexdigest()


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        journal = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    sound = isinstance(journal, dict) and all(isinstance(journal.get(key), dict) for key in ("done", "saved"))
    return journal if sound else {}


def _listed(journal: Mapping[str, Any], key: str) -> dict[str, Entries]:
    """The tensors of each shard under a key of a journal of ours, which our own digest vouches for."""
    return {
        shard: {name: TensorEntry(shard, piece, sha256) for name, (piece, sha256) in entries.items()}
        for shard, entries in journal[key].items()
    }


def _header_is(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _unchanged(path: Path, placed: Iterable[Placed], entries: Entries) -> Entries:
    """Those of the tensors whose bytes in the file still have the hash of their entry."""
    locations = {each.tensor.name: Location(path, each) for each in placed}
    with Checkpoint(path.parent, {}, locations) as written:
        found = hash_tensors(written, {name: entries[name].piece for name in locations})
    return {name: entries[name] for name in locations if found[name] == entries[name].sha256}


def _copy_whole(source: Path, path: Path) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with source.open("rb") as original, partial.open("wb") as file:
        shutil.copyfileobj(original, file, 2**20)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError, folder: Path) -> DoesNotFitError | UsageError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(f"{folder}: the disk is full", hint="free some space, then run the command again")
    return UsageError(f"{folder}: {error.strerror or error}", hint="OUTPUT must be a folder you may write to")
