"""Is an export to GGUF whole: each file's header and tensors, by the manifest's hashes."""

import time
from collections.abc import Iterator
from pathlib import Path

from ossquant.checkpoint.gguf_export import GgufExport
from ossquant.checkpoint.header import Placed
from ossquant.checkpoint.manifest import MANIFEST, MAX_PIECES, Manifest, hash_tensors, read_manifest
from ossquant.checkpoint.reader import Checkpoint, Location
from ossquant.errors import CheckpointError
from ossquant.export.gguf_tensors import ALIGNMENT, gguf_tensors
from ossquant.jobs import Progress
from ossquant.scheme import StoredTensor
from ossquant.verify import Fault, VerifyReport, meter, side_file_faults

_AGAIN = "export it again"


def verify_gguf(export: GgufExport, progress: Progress | None = None) -> VerifyReport:
    """Hash a GGUF export of ours and what lies beside it; nothing that its headers say is believed.

    Raises CheckpointError where the manifest does not place every tensor.
    """
    started = time.monotonic()
    folder = export.first.parent
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder}: no {MANIFEST}", hint=_AGAIN)
    locations = dict(_locate(export, manifest, folder))
    with Checkpoint(folder, {}, locations) as checkpoint:
        pieces = {name: manifest.tensors[name].piece for name in locations}
        found = hash_tensors(checkpoint, pieces, meter(sum(t.nbytes for t in checkpoint.stored.values()), progress))
    files = {location.path.name for location in locations.values()}  # under whose names their headers stand
    faults = [
        Fault(None if name in files else name, locations[name].path.name, "differs")
        for name, digest in found.items()
        if digest != manifest.tensors[name].sha256
    ]
    gone = (name for name in manifest.tensors if name not in locations)
    faults += [Fault(name, manifest.tensors[name].file, "not in the checkpoint") for name in gone]
    faults += [*side_file_faults(folder, manifest), *_more_files(folder, files)]
    return VerifyReport(
        folder=folder,
        plan=export.plan,
        manifest=manifest,
        stored=len(locations) - len(files),
        faults=tuple(faults),
        comparison=None,
        seconds=time.monotonic() - started,
    )


def _locate(export: GgufExport, manifest: Manifest, folder: Path) -> Iterator[tuple[str, Location]]:
    """Where each file's header and tensors lie: behind each other in the plan's order, as long as the plan says."""
    ends: dict[str, int] = {}
    for tensor in gguf_tensors(export.plan):
        name = tensor.stored.name
        entry = manifest.tensors.get(name)
        header = manifest.tensors.get(entry.file) if entry else None
        if entry is None or header is None or header.file != entry.file:
            raise CheckpointError(f"{MANIFEST}: nothing on '{name}', or on the header of its file", hint=_AGAIN)
        if entry.file not in ends:
            ends[entry.file] = header.piece
            beginning = StoredTensor(entry.file, "U8", (header.piece,))
            yield entry.file, Location(folder / entry.file, Placed(beginning, 0))
        if tensor.stored.nbytes > entry.piece * MAX_PIECES:
            raise CheckpointError(f"{MANIFEST}: '{name}' in pieces of {entry.piece} bytes", hint=_AGAIN)
        yield name, Location(folder / entry.file, Placed(tensor.stored, ends[entry.file]))
        ends[entry.file] += -(-tensor.stored.nbytes // ALIGNMENT) * ALIGNMENT
    for file, end in ends.items():
        nbytes = (folder / file).stat().st_size
        if nbytes != end:
            raise CheckpointError(f"{file}: {nbytes:,} bytes, {end:,} are its header and tensors", hint=_AGAIN)


def _more_files(folder: Path, files: set[str]) -> list[Fault]:
    """GGUF files that a program which takes all of a folder would load, too."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix == ".gguf")
    return [Fault(None, name, "not in the manifest") for name in found if name not in files]
