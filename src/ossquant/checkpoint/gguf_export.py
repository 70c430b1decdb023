"""GgufExport: a model that ossquant wrote as GGUF, by the config.json and the manifest beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ossquant.checkpoint.header import read_json
from ossquant.checkpoint.manifest import MANIFEST, MODELFILE, read_manifest
from ossquant.checkpoint.reader import JOB, refuse_strangers
from ossquant.errors import CheckpointError, UsageError
from ossquant.layout import Role
from ossquant.plan import Plan, make_plan
from ossquant.recipe import Recipe
from ossquant.scheme import GGML_FORMATS, Scheme
from ossquant.spec import ModelSpec
from ossquant.units import size

SUFFIX = ".gguf"
_FORMATS = ("mxfp4", "bf16", "f32", *GGML_FORMATS)


@dataclass(frozen=True)
class GgufExport:
    """What a folder holds. first is the file that a server is given: of a split export the first.

    modelfile is Ollama's recipe for it, None if there is none.
    """

    spec: ModelSpec
    plan: Plan
    first: Path
    modelfile: Path | None


def read_gguf_export(source: str) -> GgufExport | None:
    """Read an export's folder, or the folder of one of its files; None if no GGUF is meant.

    Raises UsageError for a GGUF that ossquant did not write, CheckpointError for an export that is not whole.
    """
    path = Path(source)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # no path can be so long, or hold such characters
        return None
    try:
        if is_file and path.suffix == SUFFIX:
            return _read(path.parent, path.name)
        return _read(path) if is_folder else None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror}", hint="check the disk, and who may read it"
        ) from error


def _read(folder: Path, asked: str = "") -> GgufExport | None:
    found = [path for path in folder.iterdir() if path.suffix == SUFFIX]
    if not found:
        return None
    if (folder / JOB).exists():
        raise CheckpointError(f"{folder}: an unfinished job, not an export", hint="run its `ossquant export` again")
    refuse_strangers(folder)
    manifest = read_manifest(folder)
    names = sorted({entry.file for entry in manifest.tensors.values()}) if manifest else []
    if manifest is None or not all(name.endswith(SUFFIX) for name in names) or (asked and asked not in names):
        if not asked and any(folder.glob("*.safetensors")):
            return None  # a checkpoint that somebody put a GGUF beside
        raise _foreign(folder / (asked or min(path.name for path in found)))
    spec = ModelSpec.from_config(read_json(folder / "config.json"))
    plan = make_plan(spec, _recipe(manifest.scheme))
    _check_files(folder, names, plan)
    modelfile = folder / MODELFILE
    return GgufExport(spec, plan, folder / names[0], modelfile if modelfile.is_file() else None)


def _foreign(path: Path) -> UsageError:
    return UsageError(
        f"{path.name}: no {MANIFEST} beside it describes this GGUF, so that its memory cannot be counted",
        hint="name what it was made of, 20b or a checkpoint folder; `ossquant export --to gguf` writes GGUF it knows",
    )


def _recipe(schemes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    for role, table in schemes.items():
        if table["format"] not in _FORMATS:
            raise CheckpointError(
                f"{MANIFEST}: {role} in '{str(table['format'])[:40]}', which no GGUF of ossquant has",
                hint=f"known: {', '.join(_FORMATS)}",
            )
    return Recipe("as exported", "", {Role(role): Scheme(table["format"]) for role, table in schemes.items()})


def _check_files(folder: Path, names: list[str], plan: Plan) -> None:
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing or not names:
        raise CheckpointError(f"{missing or SUFFIX}: named in {MANIFEST}, not in {folder}", hint="fetch this file")
    nbytes = sum((folder / name).stat().st_size for name in names)
    if nbytes < plan.nbytes:
        raise CheckpointError(
            f"{names[0]}: {size(nbytes)} of {size(plan.nbytes)} and more", hint="fetch it, or export it, again"
        )
