"""A checkpoint folder: its config, the place of every tensor, and their bytes."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from ossquant.checkpoint.header import Placed, check_count, read_header, read_json, uncollected
from ossquant.errors import CheckpointError, UnsupportedError, UsageError
from ossquant.plan import Plan, read_plan
from ossquant.scheme import StoredTensor
from ossquant.spec import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JOB = "ossquant-job.json"  # stands in a folder while it is being written
SIDE_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # config, tokenizer, chat template
CHECKPOINT_SUFFIXES = (".safetensors", *SIDE_SUFFIXES)
HUB_FILES = [f"*{suffix}" for suffix in CHECKPOINT_SUFFIXES]
HUB_SKIPPED = ["original/*", "metal/*"]  # the same weights in two other layouts
# owner/name as the hub allows them
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)\w[\w.-]*(?<![.-])/\w[\w.-]*(?<![.-])", re.ASCII)


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes lie."""

    path: Path
    placed: Placed


class Checkpoint:
    """An opened checkpoint. Reading is thread-safe; use it as a context manager to close its files."""

    def __init__(self, folder: Path, config: dict[str, Any], locations: Mapping[str, Location]) -> None:
        self.folder = folder
        self.config = config
        self.locations = locations
        self.origin: Mapping[str, Any] = {}  # what its bytes come from beside its files
        self._files: dict[Path, int] = {}

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        return ModelSpec.from_config(self.config)

    @cached_property
    def stored(self) -> dict[str, StoredTensor]:
        """The stored tensors by name."""
        return {name: location.placed.tensor for name, location in self.locations.items()}

    @cached_property
    def plan(self) -> Plan:
        """How the checkpoint stores its model; reading it checks that nothing is missing. Raises CheckpointError."""
        return read_plan(self.spec, self.stored)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({location.path for location in self.locations.values()})

    def read_into(self, name: str, buffer: memoryview, offset: int = 0) -> None:
        """Fill buffer with a tensor's bytes from offset on. Raises CheckpointError if the file has shrunk."""
        location = self.locations[name]
        file = self._open(location.path)
        position = location.placed.offset + offset
        while buffer:
            try:
                done = os.preadv(file, [buffer], position)
            except OSError as error:
                raise CheckpointError(f"{location.path.name}: {error.strerror}", hint="check the disk") from error
            if not done:
                raise CheckpointError(f"{location.path.name}: ends inside '{name}'", hint="fetch this file again")
            buffer, position = buffer[done:], position + done

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror}", hint="the source must stay in place") from error
        return self._files[path]

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local folder or a hub id by its headers alone. Raises UsageError, CheckpointError."""
    folder = resolve(source)
    try:
        return _open_folder(folder)
    except OSError as error:
        where = error.filename or folder
        raise CheckpointError(f"{where}: {error.strerror}", hint="check the disk, and who may read it") from error


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / JOB).exists():
        raise CheckpointError(
            f"{folder}: an unfinished job, not a checkpoint",
            hint="run its `ossquant quantize` again to finish it",
        )
    refuse_strangers(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json", hint="a checkpoint is a folder with config.json")
    config = read_json(folder / "config.json")
    ModelSpec.from_config(config)
    return Checkpoint(folder, config, _locate(folder))


def refuse_strangers(folder: Path) -> None:
    """Raise CheckpointError for links out of the folder; the hub's cache links to the blobs beside its snapshots."""
    real = folder.resolve()  # `.` has no parent to ask
    allowed = [real, *([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])]
    for path in folder.iterdir():
        if path.is_symlink() and path.suffix in CHECKPOINT_SUFFIXES:
            try:
                target = path.resolve()
            except (OSError, RuntimeError) as error:  # RuntimeError before Python 3.13
                raise CheckpointError(f"{path.name}: a link to itself", hint="fetch this file again") from error
            if not any(place in target.parents for place in allowed):
                raise CheckpointError(
                    f"{path.name}: a link out of its folder", hint="copy the file there if you trust it"
                )


@uncollected()
def _locate(folder: Path) -> dict[str, Location]:
    if (folder / INDEX).is_file():
        weight_map = parse_weight_map(read_json(folder / INDEX))
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        weight_map, shards = None, [SINGLE]
    else:
        if any(folder.glob("*.gguf")):
            raise UnsupportedError(f"{folder}: a GGUF file, for llama.cpp and Ollama", hint="name what it was made of")
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}", hint="only safetensors are read")
    files: set[tuple[int, int]] = set()

    def read(shard: str) -> list[Placed]:
        if not (folder / shard).is_file():
            raise CheckpointError(f"{shard}: named in {INDEX}, not in {folder}", hint="fetch this file")
        status = (folder / shard).stat()
        if (status.st_dev, status.st_ino) in files:  # else one large header could be read a thousand times
            raise CheckpointError(f"{shard}: another of the shards under a second name", hint="fetch this file")
        files.add((status.st_dev, status.st_ino))
        return read_header(folder / shard)

    return locate(folder, shards, read, weight_map)


def locate(
    folder: Path, shards: Iterable[str], read: Callable[[str], list[Placed]], weight_map: Mapping[str, str] | None
) -> dict[str, Location]:
    """Find every tensor by its name in the shards' headers; the index, if there is one, must say the same.

    read gives a shard's header. Raises CheckpointError, and reads no further, for more tensors than a model has.
    """
    locations: dict[str, Location] = {}
    for shard in shards:
        path, header = folder / shard, read(shard)
        check_count(len(locations) + len(header), shard)
        for placed in header:
            name = placed.tensor.name
            if name in locations:
                raise CheckpointError(
                    f"{shard}: '{name}' stands in another file too", hint="fetch the checkpoint again"
                )
            locations[name] = Location(path, placed)
    if weight_map is not None:
        _compare(weight_map, locations)
    return locations


def parse_weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Read which file holds which tensor; a file's name must be one beside the index. Raises CheckpointError."""
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{INDEX}: no weight_map", hint="fetch this file again")
    check_count(len(table), INDEX)
    for shard in set(map(str, table.values())):
        # ASCII, for a file name may have 255 bytes
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard, re.ASCII):
            raise CheckpointError(
                f"{INDEX}: '{shard[:120]}' is not a file name beside it", hint="do not trust this checkpoint"
            )
    return {name: str(shard) for name, shard in table.items()}


def _compare(weight_map: Mapping[str, str], locations: Mapping[str, Location]) -> None:
    for name, shard in weight_map.items():
        if name not in locations or locations[name].path.name != shard:
            raise CheckpointError(f"{shard}: '{name}' is not in it, {INDEX} says it is", hint="fetch this file again")
    extra = next((name for name in locations if name not in weight_map), None)
    if extra:
        raise CheckpointError(
            f"{INDEX}: does not name '{extra}' of {locations[extra].path.name}", hint="fetch it again"
        )


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, owner/name."""
    return _HUB_ID.fullmatch(text) is not None


def resolve(source: str | Path) -> Path:
    """Find a checkpoint's folder; a hub id is fetched, or taken from the cache when offline. Raises UsageError."""
    path = Path(source)
    try:
        found, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # no path can be so long, or hold such characters
        found = is_folder = False
    if is_folder:
        return path
    if found:
        raise UsageError(f"{path} is a file, not a checkpoint folder", hint=f"try {path.parent}")
    if not is_hub_id(str(source)):
        raise UsageError(f"no checkpoint at {source}", hint="give a folder, or a hub id such as openai/gpt-oss-20b")
    return _fetch(str(source))


def _fetch(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(repo_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UsageError(
            f"no folder '{repo_id}', and the hub has not given it: {_first_line(error)}",
            hint=f"when online: hf download {repo_id}",
        ) from error
    except HfHubHTTPError as error:  # pragma: no cover - subclass of OSError in today's versions
        raise UsageError(f"the hub refuses '{repo_id}': {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
