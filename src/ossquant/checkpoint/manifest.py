"""The manifest of a checkpoint: what it was made of, a hash of every stored tensor and of every file beside them."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ossquant.checkpoint.header import check_count, read_json
from ossquant.checkpoint.reader import SIDE_SUFFIXES, Checkpoint
from ossquant.errors import CheckpointError
from ossquant.layout import Role
from ossquant.plan import Plan

MANIFEST = "ossquant-manifest.json"  # beside config.json
FORMAT_VERSION = 1
MAX_PIECES = 2**16  # of one tensor: half a terabyte in pieces of 8 MiB
MAX_THREADS = 8
_READ_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|gguf)", re.ASCII)

# bytes done so far, of how many
Progress = Callable[[int, int], None]
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: the file it was written to, and the hash of its bytes, taken in pieces.

    sha256 is the SHA-256, in hex, of the concatenated SHA-256 digests of consecutive pieces of `piece` bytes, of
    which the last may be shorter; so threads may hash the pieces in any order.
    """

    file: str
    piece: int
    sha256: str


@dataclass(frozen=True)
class SideFile:
    """A file beside the weights: its size in bytes, and the SHA-256 of all of it, in hex."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """What a checkpoint was made of: its name, the name and size of each safetensors file, its config.json."""

    name: str
    files: tuple[tuple[str, int], ...]
    config_sha256: str


@dataclass(frozen=True)
class Manifest:
    """How a checkpoint was made and what its bytes are; scheme by role, tensors by stored name.

    side_files, by name, are what was written beside the weights: config.json, the index, and what was copied from
    the source. Files that are put there later are nobody's business, unless they hold weights.
    """

    ossquant: str
    source: Source
    recipe: str
    scheme: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]
    side_files: Mapping[str, SideFile] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Write it as the file has it."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1).encode() + b"\n"


class TensorHash:
    """Collects the hash of one stored tensor piece by piece, from any thread and in any order."""

    def __init__(self, nbytes: int, piece: int) -> None:
        self._nbytes = nbytes
        self._piece = piece
        self._digests: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def add(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        """Hash the piece that begins at offset. Raises ValueError for data that is not one whole piece."""
        if offset % self._piece or len(data) != min(self._piece, self._nbytes - offset) or not data:
            raise ValueError(f"{len(data)} bytes at {offset} are no piece of {self._piece} of {self._nbytes} bytes")
        digest = hashlib.sha256(data).digest()
        with self._lock:
            self._digests[offset] = digest

    def hexdigest(self) -> str:
        """Give the tensor's hash. Raises ValueError while a piece is missing."""
        missing = len(_pieces(self._nbytes, self._piece)) - len(self._digests)
        if missing:
            raise ValueError(f"{missing} pieces are not hashed yet")
        return _combine(self._digests[offset] for offset in sorted(self._digests))


def make_manifest(
    source: Checkpoint, name: str, recipe: str, plan: Plan, tensors: Mapping[str, TensorEntry]
) -> Manifest:
    """Describe the result of a job: plan and tensors are the result's, name is what the source is called.

    The side files are added as they are written.
    """
    config = (source.folder / "config.json").read_bytes()
    return Manifest(
        ossquant=version("ossquant"),
        source=Source(
            name=name,
            files=tuple((path.name, path.stat().st_size) for path in source.files),
            config_sha256=hashlib.sha256(config).hexdigest(),
        ),
        recipe=recipe,
        scheme={role.value: plan.scheme(role).table() for role in Role},
        versions={package: version(package) for package in ("numpy", "numba")},
        tensors=tensors,
    )


def is_side_file(name: str) -> bool:
    """Whether a file of this name belongs beside the weights: by its suffix, and a name that a terminal can show."""
    shown = name.isprintable() and "/" not in name
    return shown and len(name.encode()) < 256 and Path(name).suffix in SIDE_SUFFIXES


def hash_file(path: Path) -> SideFile:
    """Hash a side file, whatever its size. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return SideFile(file.tell(), digest)


def hash_tensors(
    checkpoint: Checkpoint, pieces: Mapping[str, int], done: Callable[[int], None] = lambda nbytes: None
) -> dict[str, str]:
    """Hash stored tensors, each in pieces of the given bytes, by several threads; memory does not grow with pieces.

    done is told the bytes of each piece. Raises CheckpointError for a file that cannot be read.
    """
    jobs = [
        (name, piece.start, len(piece))
        for name, nbytes in pieces.items()
        for piece in _pieces(checkpoint.stored[name].nbytes, nbytes)
    ]
    digests = in_threads(lambda job: _digest(checkpoint, *job), jobs, lambda job: done(job[2]))
    joined: dict[str, list[bytes]] = {name: [] for name in pieces}
    for (name, _, _), digest in zip(jobs, digests, strict=True):
        joined[name].append(digest)
    return {name: _combine(digests) for name, digests in joined.items()}


def in_threads(work: Callable[[Job], Result], jobs: Sequence[Job], done: Callable[[Job], None]) -> list[Result]:
    """Work on jobs by several threads; gives the results in the jobs' order, as done is told of them."""
    results = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS) + 1) as pool:  # one more, for while another reads
        try:
            for job, result in zip(jobs, pool.map(work, jobs), strict=True):
                results.append(result)
                done(job)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _pieces(nbytes: int, piece: int) -> list[range]:
    return [range(begin, min(begin + piece, nbytes)) for begin in range(0, nbytes, piece)]


def _digest(checkpoint: Checkpoint, name: str, begin: int, nbytes: int) -> bytes:
    """Hash a piece, which may be a whole tensor of a gigabyte, through a small buffer."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(nbytes, _READ_BYTES)))
    for chunk in _pieces(nbytes, _READ_BYTES):
        view = buffer[: len(chunk)]
        checkpoint.read_into(name, view, begin + chunk.start)
        digest.update(view)
    return digest.digest()


def _combine(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest; None if it has none. Raises CheckpointError for what is not one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    if not path.is_file():
        raise _error("no file")
    try:
        return _parse(read_json(path))
    except OSError as error:
        raise _error(str(error.strerror)) from error


def _parse(table: dict[str, Any]) -> Manifest:
    if table.get("format_version") != FORMAT_VERSION:
        raise _error(f"format_version is {str(table.get('format_version'))[:20]}, not {FORMAT_VERSION}")
    _keys(table, {"format_version", *(each.name for each in fields(Manifest))}, "it")
    tensors, side_files = (_object(table[key], key) for key in ("tensors", "side_files"))
    check_count(len(tensors) + len(side_files), MANIFEST)
    return Manifest(
        ossquant=_text(table["ossquant"], "ossquant"),
        source=_source(_object(table["source"], "source")),
        recipe=_text(table["recipe"], "recipe"),
        scheme=_schemes(_object(table["scheme"], "scheme")),
        versions={
            _text(package, "versions"): _text(number, "versions")
            for package, number in _object(table["versions"], "versions").items()
        },
        tensors={_text(name, "a tensor's name"): _entry(_object(entry, "a tensor")) for name, entry in tensors.items()},
        side_files={_side_name(name): _side_file(_object(entry, "a side file")) for name, entry in side_files.items()},
    )


def _source(table: dict[str, Any]) -> Source:
    _keys(table, {"name", "files", "config_sha256"}, "source")
    if not isinstance(table["files"], list):
        raise _error("source.files is not a list")
    files = tuple(_file(pair) for pair in table["files"])
    return Source(_text(table["name"], "source.name"), files, _sha256(table["config_sha256"]))


def _file(pair: object) -> tuple[str, int]:
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int or pair[1] < 0:
        raise _error("source.files holds more than names and sizes")
    return _shard(pair[0]), pair[1]


def _schemes(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    _keys(table, {role.value for role in Role}, "scheme")
    for scheme in table.values():
        _text(_object(scheme, "scheme").get("format"), "scheme.format")
    return table


def _entry(table: dict[str, Any]) -> TensorEntry:
    _keys(table, {"file", "piece", "sha256"}, "a tensor")
    piece = table["piece"]
    if type(piece) is not int or not 0 < piece < 2**63:
        raise _error("a tensor's piece is not a number of bytes")
    return TensorEntry(_shard(table["file"]), piece, _sha256(table["sha256"]))


def _side_name(name: str) -> str:
    if not is_side_file(name):
        raise _error(f"'{name[:120]}' is not the name of a file beside the weights")
    return name


def _side_file(table: dict[str, Any]) -> SideFile:
    _keys(table, {"nbytes", "sha256"}, "a side file")
    if type(table["nbytes"]) is not int or not 0 <= table["nbytes"] < 2**63:
        raise _error("a side file's nbytes is not a number of bytes")
    return SideFile(table["nbytes"], _sha256(table["sha256"]))


def _keys(table: dict[str, Any], keys: set[str], what: str) -> None:
    if set(table) != keys:
        raise _error(f"{what} does not have exactly the keys {', '.join(sorted(keys))}")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(f"{what} is not an object")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 300:
        raise _error(f"{what} is not a line of text")
    return value


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _error("a sha256 is not 64 hexadecimal digits")
    return value


def _shard(value: object) -> str:
    if not isinstance(value, str) or not _SHARD.fullmatch(value):
        raise _error(f"'{str(value)[:120]}' is not the name of a safetensors file beside it")
    return value


def _error(what: str) -> CheckpointError:
    return CheckpointError(f"{MANIFEST}: {what}", hint="make the checkpoint again, or remove this file")
