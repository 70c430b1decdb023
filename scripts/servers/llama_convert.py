"""llama.cpp's own convert_hf_to_gguf.py, an implementation apart from ours: the same keys, the same bytes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from servers import llama_build
from servers.case import ROOT, TINY, Check, Fault, Place, demand, environment
from servers.exports import export, gguf_of

LIMIT = 300.0  # seconds
KINDS = ("bf16", "f32", "q8_0")
FREE = ("general.name",)  # what a file is called is no property of the model
# The converter writes the type of the dense weights; ours is "MXFP4 experts, q8_0 else", as in the published files.
FILE_TYPES = {"q8_0": {"general.file_type": [7, 38]}}


def prepare(place: Place) -> str:
    """Unpack it; returns the sdist that it is from."""
    llama_build.source(place)
    return f"of {llama_build.NAME}"


def checks(place: Place) -> Iterator[Check]:
    """One check for each type of the dense weights; the experts stay MXFP4."""
    for kind in KINDS:
        yield Check(f"gguf, {kind} dense", "every tensor byte for byte, every key", partial(_compare, place, kind))


def _compare(place: Place, kind: str) -> dict[str, Any]:
    ours = gguf_of(export(place, f"convert-{kind}", "--to", "gguf", "--dense", kind))
    theirs = _convert(place, kind)
    (our_keys, our_tensors), (their_keys, their_tensors) = _read(ours), _read(theirs)
    names = sorted(their_keys.keys() | our_keys.keys())
    pairs = {name: [their_keys.get(name), our_keys.get(name)] for name in names}
    keys = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    tensors = [name for name in their_tensors | our_tensors if their_tensors.get(name) != our_tensors.get(name)]
    demand(not tensors, f"{len(tensors)} of {len(their_tensors)} tensors differ: {', '.join(tensors[:8])}")
    expected = FILE_TYPES.get(kind, {})
    wrong = [name for name, pair in keys.items() if name not in FREE and _values(pair) != expected.get(name)]
    differences = {name: _values(pair) for name, pair in keys.items()}
    demand(not wrong, f"keys differ, theirs and ours: {differences}")
    return {"tensors_equal": len(their_tensors), "keys_equal": len(names) - len(keys), "keys_that_differ": differences}


def _values(pair: list[Any]) -> list[Any]:
    """Theirs and ours without their types; None where there is no such key."""
    return [found and found[1] for found in pair]


def _convert(place: Place, kind: str) -> Path:
    """Run the converter on the tiny model."""
    tree, output = llama_build.source(place), place.folder("exports") / f"llama-convert-{kind}.gguf"
    command = [sys.executable, ROOT / "scripts/servers/llama_convert_tiny.py", TINY, "--outtype", kind, "--outfile",
               output]  # fmt: skip
    paths = os.pathsep.join((str(tree), str(tree / "gguf-py")))
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment(PYTHONPATH=paths),
        timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Fault(f"convert_hf_to_gguf.py ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return output


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys with their values, and tensors with their type, shape and bytes."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = {key: (field.types[-1].name, field.contents()) for key, field in reader.fields.items()}
    tensors = {
        tensor.name: (tensor.tensor_type.name, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    return keys, tensors
