"""Is a checkpoint whole, and how far is it from its source."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ossquant.checkpoint.manifest import (
    MANIFEST,
    MAX_PIECES,
    Manifest,
    hash_file,
    hash_tensors,
    in_threads,
    read_manifest,
)
from ossquant.checkpoint.reader import JOB, Checkpoint, open_checkpoint, resolve
from ossquant.errors import CheckpointError
from ossquant.jobs import Progress
from ossquant.layout import Role, TensorInfo
from ossquant.plan import Plan

if TYPE_CHECKING:
    from ossquant.codec.expand import Distance

FaultKind = Literal["differs", "not in the manifest", "not in the checkpoint"]


@dataclass(frozen=True)
class Fault:
    """A stored tensor that is not as the manifest has it, and the file it lies, or should lie, in; None: all of it."""

    tensor: str | None
    file: str
    kind: FaultKind


@dataclass(frozen=True)
class Comparison:
    """How far the weights lie from the source's, by role, and by tensor, the worst first."""

    source: Plan
    roles: Mapping[Role, "Distance"]
    tensors: tuple[tuple[TensorInfo, "Distance"], ...]


@dataclass(frozen=True)
class VerifyReport:
    """What was found; manifest is None where there is none, and then no hash was checked."""

    folder: Path
    plan: Plan
    manifest: Manifest | None
    stored: int  # tensors in the files
    faults: tuple[Fault, ...]
    comparison: Comparison | None
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it, as far as could be checked."""
        return not self.faults

    @property
    def hashes_agree(self) -> int:
        """How many tensors have the bytes that the manifest promises."""
        wrong = sum(fault.tensor is not None and fault.kind != "not in the checkpoint" for fault in self.faults)
        return self.stored - wrong if self.manifest else 0

    @property
    def side_files_agree(self) -> int:
        """How many of the manifest's side files are there with the bytes that it promises."""
        listed = self.manifest.side_files if self.manifest else {}
        return len(listed) - sum(fault.tensor is None and fault.file in listed for fault in self.faults)


def verify(source: str | Path, against: str | Path | None = None, progress: Progress | None = None) -> VerifyReport:
    """Check a checkpoint's headers, its coverage of the layout and every hash of its manifest; measure its errors.

    What a header says of names, shapes and places must follow from config.json, so a flipped bit there is found as
    one in the data is; its __metadata__ is not looked at. Config, index, tokenizer and whatever else the manifest
    lists beside the weights must be there, byte for byte; a file that it does not list is a fault only if it would
    be loaded as weights. A checkpoint without a manifest is checked by its headers alone. against: the checkpoint
    that it was made of. Raises UsageError, CheckpointError for headers, files and weights that cannot be read, or a
    source of another shape.
    """
    started = time.monotonic()
    with _open(source) as checkpoint:
        plan, manifest = checkpoint.plan, read_manifest(checkpoint.folder)
        hashed = plan.nbytes if manifest else 0
        if against is None:
            faults = _faults(checkpoint, manifest, meter(hashed, progress))
            comparison = None
        else:
            with open_checkpoint(against) as other:
                _check_shapes(checkpoint, other)
                done = meter(hashed + plan.nbytes + other.plan.nbytes, progress)
                faults = _faults(checkpoint, manifest, done)
                comparison = _compare(checkpoint, other, done)
        return VerifyReport(
            folder=checkpoint.folder,
            plan=plan,
            manifest=manifest,
            stored=len(checkpoint.stored),
            faults=tuple(faults),
            comparison=comparison,
            seconds=time.monotonic() - started,
        )


def _open(source: str | Path) -> Checkpoint:
    """Open a checkpoint and read its plan; if that fails over a changed side file, the error names the file."""
    try:
        checkpoint = open_checkpoint(source)
        checkpoint.plan  # noqa: B018  read here for its errors
        return checkpoint
    except CheckpointError as error:
        changed = _changed_side_files(resolve(source))
        if not changed:
            raise
        raise CheckpointError(
            f"{', '.join(changed[:3])}: not as {MANIFEST} has it; {error.message}",
            hint="fetch it again, or quantize again",
        ) from error


def _changed_side_files(folder: Path) -> list[str]:
    if (folder / JOB).exists():  # the manifest may be that of a checkpoint which is being replaced
        return []
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # nothing to compare with
        return []
    return [fault.file for fault in side_file_faults(folder, manifest)] if manifest else []


def meter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Make of progress, which is told all that is done, something that is told what is newly done."""
    so_far = 0

    def done(nbytes: int) -> None:
        nonlocal so_far
        so_far += nbytes
        if progress:
            progress(min(so_far, total), total)

    return done


def _faults(checkpoint: Checkpoint, manifest: Manifest | None, done: Callable[[int], None]) -> list[Fault]:
    """Compare every tensor's bytes with the manifest's hash, in the order of the plan, then the side files."""
    if manifest is None:
        return []
    names = [part.name for entry in checkpoint.plan.tensors for part in entry.stored]
    pieces = {name: manifest.tensors[name].piece for name in names if name in manifest.tensors}
    for name, piece in pieces.items():
        if checkpoint.stored[name].nbytes > piece * MAX_PIECES:
            raise CheckpointError(f"{MANIFEST}: '{name}' in pieces of {piece} bytes", hint="remove this file")
    found = hash_tensors(checkpoint, pieces, done)
    faults = []
    for name in names:
        file = checkpoint.locations[name].path.name
        if name not in found:
            faults.append(Fault(name, file, "not in the manifest"))
        elif found[name] != manifest.tensors[name].sha256:
            faults.append(Fault(name, file, "differs"))
    known = set(names)
    gone = (name for name in manifest.tensors if name not in known)
    faults += [Fault(name, manifest.tensors[name].file, "not in the checkpoint") for name in gone]
    return faults + side_file_faults(checkpoint.folder, manifest) + _more_weights(checkpoint)


def side_file_faults(folder: Path, manifest: Manifest) -> list[Fault]:
    """What is wrong with the files beside the weights. Raises CheckpointError for one that cannot be read."""
    faults = []
    for name, expected in manifest.side_files.items():
        path = folder / name
        try:
            if not path.is_file():
                faults.append(Fault(None, name, "not in the checkpoint"))
            elif path.stat().st_size != expected.nbytes or hash_file(path) != expected:
                faults.append(Fault(None, name, "differs"))
        except OSError as error:
            raise CheckpointError(f"{name}: {error.strerror}", hint="check the disk, and who may read it") from error
    return faults


def _more_weights(checkpoint: Checkpoint) -> list[Fault]:
    """Files that belong to no tensor of the index, but that a program which takes *.safetensors would load."""
    known = {path.name for path in checkpoint.files}
    found = sorted(path.name for path in checkpoint.folder.iterdir() if path.suffix == ".safetensors")
    return [Fault(None, name, "not in the manifest") for name in found if name not in known]


def _check_shapes(checkpoint: Checkpoint, other: Checkpoint) -> None:
    # both end with norm and head, so the shorter list cannot be the longer one's beginning
    for mine, theirs in zip(checkpoint.plan.tensors, other.plan.tensors, strict=False):
        if mine.tensor != theirs.tensor:
            raise CheckpointError(
                f"{checkpoint.folder} has '{mine.tensor.name}' {list(mine.tensor.shape)} where "
                f"{other.folder} has '{theirs.tensor.name}' {list(theirs.tensor.shape)}",
                hint="--against takes the checkpoint that this one was made of",
            )


def _compare(checkpoint: Checkpoint, other: Checkpoint, done: Callable[[int], None]) -> Comparison:
    """Expand both, piece by piece, and add the errors up in a fixed order."""
    from ossquant.codec.expand import Distance, distance, pieces  # numba takes a moment, hashing need not wait for it

    jobs = [
        (mine, theirs, piece, (mine.nbytes + theirs.nbytes) // len(split))
        for mine, theirs in zip(checkpoint.plan.tensors, other.plan.tensors, strict=True)
        for split in [pieces(mine.tensor)]
        for piece in split
    ]
    found = in_threads(lambda job: distance(checkpoint, job[0], other, job[1], job[2]), jobs, lambda job: done(job[3]))
    roles = dict.fromkeys(Role, Distance())
    tensors = {entry.tensor: Distance() for entry in checkpoint.plan.tensors}
    for (mine, _, _, _), each in zip(jobs, found, strict=True):
        roles[mine.tensor.role] += each
        tensors[mine.tensor] += each
    return Comparison(other.plan, roles, tuple(sorted(tensors.items(), key=lambda item: -item[1].relative)))
