"""Checkpoints to serve: the trained tiny model, exported by the command that users run."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from servers.case import TINY, Fault, Place, environment

LIMIT = 300.0  # seconds
OSSQUANT = Path(sys.executable).parent / "ossquant"


@cache
def export(place: Place, name: str, *options: str, source: Path = TINY) -> Path:
    """Run `ossquant export` anew; the same export is made once in a run."""
    return _made(place, name, "export", source, *options)


@cache
def quantize(place: Place, name: str, scheme: str, source: Path = TINY) -> Path:
    """Run `ossquant quantize` anew."""
    return _made(place, name, "quantize", source, "--scheme", scheme)


def _made(place: Place, name: str, command: str, source: Path, *options: str) -> Path:
    output = place.folder("exports") / name
    shutil.rmtree(output, ignore_errors=True)
    words = [str(OSSQUANT), command, str(source), str(output), *options]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=LIMIT, check=False)
    if done.returncode:
        raise Fault(f"ossquant {' '.join(words[1:])} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return output


def gguf_of(folder: Path) -> Path:
    """The one GGUF file of an export."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise Fault(f"{folder} holds {len(files)} GGUF files, not one")
    return files[0]


@cache
def with_rounded_rope(place: Place) -> Path:
    """A copy of the tiny model whose config.json says what ggml computes: yarn's bounds are rounded."""
    folder = place.folder("exports") / "tiny-truncate"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"]["truncate"] = True
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def mxfp4_of_drifted(place: Place) -> Path:
    """A bf16 fine-tune on its way back to the published layout."""
    return export(place, "mxfp4-drifted", "--to", "mxfp4", source=drifted(place))


@cache
def drifted(place: Place) -> Path:
    """A stand-in for a bf16 fine-tune: the tiny model in bf16, its experts moved by 2 % of their size."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = place.folder("exports") / "tiny-drifted"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(quantize(place, "tiny-bf16", "bf16"), folder)
    (folder / "ossquant-manifest.json").unlink()  # its hashes are those of the weights before
    torch.manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for key, weight in tensors.items():
            if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
                size = weight.float().square().mean().sqrt()
                tensors[key] = (weight.float() + torch.randn(weight.shape) * 0.02 * size).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
