"""The manifest of a checkpoint: what it was made of, and a hash of every stored tensor."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ossquant.checkpoint.header import parse_json
from ossquant.checkpoint.reader import Checkpoint
from ossquant.errors import CheckpointError
from ossquant.layout import Role
from ossquant.plan import Plan, TensorPlan

MANIFEST = "ossquant-manifest.json"  # beside config.json
FORMAT_VERSION = 1
PIECE_BYTES = 8 * 2**20
MAX_BYTES = 32 * 2**20  # the 120b in nf4 has 65,703 stored tensors, 14.5 MB of manifest
MAX_VALUES = 2**19  # by which parsing takes time and memory; that one has 330,000
MAX_PIECES = 2**16  # of one tensor: half a terabyte in pieces of 8 MiB
MAX_THREADS = 8
_READ_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)

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
class Source:
    """What a checkpoint was made of: its name, the name and size of each safetensors file, its config.json."""

    name: str
    files: tuple[tuple[str, int], ...]
    config_sha256: str


@dataclass(frozen=True)
class Manifest:
    """How a checkpoint was made and what its tensors' bytes are; scheme by role, tensors by stored name."""

    ossquant: str
    source: Source
    recipe: str
    scheme: Mapping[str, Mapping[str, Any]]
    versions: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]

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


def piece_of(nbytes: int, stack: int) -> int:
    """Bytes of a piece of a stored tensor: one expert's of a stack that is written expert by expert, else 8 MiB."""
    return max(nbytes // stack if stack > 1 else min(nbytes, PIECE_BYTES), 1)


def stack_of(entry: TensorPlan) -> int:
    """How many experts lie one behind the other in each of a tensor's stored tensors; 1 if it is no stack."""
    stacked = entry.tensor.role is Role.EXPERTS and entry.scheme.format in ("bf16", "mxfp4")
    return entry.tensor.shape[0] if stacked else 1


def make_manifest(
    source: Checkpoint, name: str, recipe: str, plan: Plan, tensors: Mapping[str, TensorEntry]
) -> Manifest:
    """Describe the result of a job: plan and tensors are the result's, name is what the source is called."""
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


def hash_checkpoint(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Hash every stored tensor of a checkpoint, in the pieces that `quantize` would write."""
    pieces = {
        part.name: piece_of(checkpoint.stored[part.name].nbytes, stack_of(entry))
        for entry in checkpoint.plan.tensors
        for part in entry.stored
    }
    return {
        name: TensorEntry(checkpoint.locations[name].path.name, pieces[name], sha256)
        for name, sha256 in hash_tensors(checkpoint, pieces).items()
    }


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
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise _error("larger than any manifest, or no file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _error(str(error.strerror)) from error
    if sum(map(raw.count, (b"{", b"[", b","))) > MAX_VALUES:
        raise _error("more keys and values than any manifest has")
    return _parse(parse_json(raw, MANIFEST))


def _parse(table: dict[str, Any]) -> Manifest:
    if table.get("format_version") != FORMAT_VERSION:
        raise _error(f"format_version is {str(table.get('format_version'))[:20]}, not {FORMAT_VERSION}")
    _keys(table, {"format_version", "ossquant", "source", "recipe", "scheme", "versions", "tensors"}, "it")
    return Manifest(
        ossquant=_text(table["ossquant"], "ossquant"),
        source=_source(_object(table["source"], "source")),
        recipe=_text(table["recipe"], "recipe"),
        scheme=_schemes(_object(table["scheme"], "scheme")),
        versions={
            _text(package, "versions"): _text(number, "versions")
            for package, number in _object(table["versions"], "versions").items()
        },
        tensors={
            _text(name, "a tensor's name"): _entry(_object(entry, "a tensor"))
            for name, entry in _object(table["tensors"], "tensors").items()
        },
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
