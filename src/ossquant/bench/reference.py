"""Reference: what candidates are held against, run once and kept as a folder.

manifest.json names the checkpoint and the settings it stands for; states.safetensors holds token ids and last hidden
states. The folder gets its name when it is whole.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ossquant.bench.text import Text
from ossquant.checkpoint.header import read_header, read_json
from ossquant.checkpoint.manifest import hash_file
from ossquant.errors import CheckpointError, OssquantError, UsageError
from ossquant.files import write_whole

MANIFEST, STATES = "manifest.json", "states.safetensors"
FORMAT_VERSION = 1
DTYPES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
_AGAIN = "remove the folder; it is made again"


@dataclass(frozen=True)
class Request:
    """All that a reference depends on.

    checkpoint and tokenizer are hashes, as is text: of the file of conversations, prompts or plain text. kind is what
    the text is. Prompts that the reference answers are sampled with temperature and seed up to max_new_tokens.
    """

    checkpoint: str
    tokenizer: str
    dtype: str
    kind: str
    text: str
    prompts: int
    max_new_tokens: int
    temperature: float
    seed: int
    reasoning_effort: str
    window: int


@dataclass(frozen=True)
class Reference:
    """A reference run: texts, and hidden (scored, hidden) where their scored tokens are predicted.

    name is what the checkpoint was called, stops are the tokens that end an answer, device is where it ran.
    """

    request: Request
    name: str
    device: str
    stops: tuple[int, ...]
    texts: tuple[Text, ...]
    hidden: torch.Tensor

    @property
    def scored(self) -> torch.Tensor:
        """The scored tokens, one behind the other."""
        return torch.tensor([token for text in self.texts for token in text.token_ids[text.begin :]])

    @property
    def answered(self) -> tuple[Text, ...]:
        """The texts that the reference answered itself."""
        return tuple(text for text in self.texts if text.answered)


def save_reference(folder: Path, reference: Reference) -> None:
    """Write a reference beside its place, then rename it there. Raises UsageError where something else stands."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        _write(partial, reference)
        partial.rename(folder)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}", hint="--reference takes a folder that is new") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, reference: Reference) -> None:
    token_ids = torch.tensor([token for text in reference.texts for token in text.token_ids], dtype=torch.int32)
    save_file({"token_ids": token_ids, "hidden_states": reference.hidden.contiguous()}, folder / STATES)
    with (folder / STATES).open("rb") as file:
        os.fsync(file.fileno())
    manifest = {
        "format_version": FORMAT_VERSION,
        "request": asdict(reference.request),
        "name": reference.name,
        "device": reference.device,
        "stops": list(reference.stops),
        "texts": [[len(text.token_ids), text.begin, int(text.answered)] for text in reference.texts],
        "states": asdict(hash_file(folder / STATES)),
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")


def load_reference(folder: Path, request: Request, vocab_size: int, hidden_size: int) -> Reference | None:
    """Read a reference back; None where there is no folder, or an empty one.

    Raises UsageError for one that was made by another request, CheckpointError for one that is damaged.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} is no reference run: it has no {MANIFEST}", hint="--reference takes a new folder")
    try:
        return _load(folder, request, vocab_size, hidden_size)
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise _damaged(folder, f"{MANIFEST} is not what it should be") from error
    except OSError as error:
        raise _damaged(folder, str(error.strerror)) from error


def _load(folder: Path, request: Request, vocab_size: int, hidden_size: int) -> Reference:
    manifest = read_json(folder / MANIFEST)
    if manifest["format_version"] != FORMAT_VERSION:
        raise UsageError(f"{folder} has another format_version than {FORMAT_VERSION}", hint=_AGAIN)
    _check_request(folder, manifest["request"], request)
    shapes = [_shape(*entry) for entry in manifest["texts"]]
    scored = sum(length - begin for length, begin, _ in shapes)
    _check_states(folder, manifest["states"], {
        "token_ids": ("I32", (sum(length for length, _, _ in shapes),)),
        "hidden_states": (DTYPES[request.dtype], (scored, hidden_size)),
    })  # fmt: skip
    states = load_file(folder / STATES)
    ids, stops = states["token_ids"].tolist(), [int(stop) for stop in manifest["stops"]]
    if not 0 <= min(ids + stops) <= max(ids + stops) < vocab_size:
        raise _damaged(folder, "token ids that the checkpoint does not have")
    return Reference(
        request, str(manifest["name"]), str(manifest["device"]), tuple(stops), _texts(ids, shapes),
        states["hidden_states"],
    )  # fmt: skip


def _check_request(folder: Path, found: Mapping[str, Any], wanted: Request) -> None:
    names = [each.name for each in fields(Request)]
    if set(found) != set(names):
        raise _damaged(folder, "its request has other keys")
    differs = [name for name in names if found[name] != getattr(wanted, name)]
    if not differs:
        return
    if differs[0] in ("checkpoint", "tokenizer"):
        raise UsageError(f"{folder} is the reference run of another {differs[0]}",
                         hint="give --reference another folder")  # fmt: skip
    name = differs[0]
    raise UsageError(
        f"{folder} was made with {name} {str(found[name])[:40]}, not {getattr(wanted, name)}",
        hint="give --reference another folder, or the options it was made with",
    )


def _check_states(folder: Path, stated: Mapping[str, Any], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    if asdict(hash_file(folder / STATES)) != stated:
        raise _damaged(folder, f"{STATES} is not as {MANIFEST} has it")
    stored = {placed.tensor.name: placed.tensor for placed in read_header(folder / STATES)}
    if {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} != shapes:
        raise _damaged(folder, f"{STATES} holds other tensors than {MANIFEST} says")


def _shape(length: int, begin: int, answered: int) -> tuple[int, int, bool]:
    if not all(type(value) is int for value in (length, begin, answered)) or not 0 < begin < length:
        raise ValueError(f"a text of {length} tokens that is scored from {begin} on")
    return length, begin, bool(answered)


def _texts(token_ids: Sequence[int], shapes: Sequence[tuple[int, int, bool]]) -> tuple[Text, ...]:
    texts, at = [], 0
    for length, begin, answered in shapes:
        texts.append(Text(tuple(token_ids[at : at + length]), begin, answered))
        at += length
    return tuple(texts)


def _damaged(folder: Path, what: str) -> OssquantError:
    return CheckpointError(f"{folder}: {what}", hint=_AGAIN)
