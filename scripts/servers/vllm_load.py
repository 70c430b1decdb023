"""An INT4 export in vLLM's own loader: what it holds afterwards, and what it reads as values."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from servers import vllm_process
from servers.case import Place, demand
from servers.exports import export
from servers.process import free_port

READ = "vllm-int4-read"
FUSED = {"w13": "gate_up_proj", "w2": "down_proj"}


def load_int4(place: Place) -> dict[str, Any]:
    """Every parameter is loaded, as in the file, and every byte of the file; values are ours."""
    found = _loaded(place)
    demand(not found["not_loaded"], f"not loaded: {found['not_loaded']}")
    demand(not found["differing"], f"not as in the file: {found['differing']}")
    demand(found["bytes_equal"] == found["bytes_in_file"],
           f"{found['bytes_equal']} of {found['bytes_in_file']} bytes were loaded")  # fmt: skip
    alike, matrices = _dequantized_alike(*(place.folder("exports") / name for name in ("vllm-int4", READ)))
    demand(alike == matrices, f"vLLM dequantizes {matrices - alike} of {matrices} experts' matrices to other values")
    return found | {"dequantized_alike": alike}


def _dequantized_alike(stored: Path, read: Path) -> tuple[int, int]:
    """How many of the experts' matrices vLLM dequantizes to our own values, and how many there are."""
    import torch
    from safetensors.torch import load_file

    from ossquant.codec.int4 import dequantize

    ours, theirs = ({key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
                    for folder in (stored, read))  # fmt: skip
    alike, packed = 0, [key for key in ours if key.endswith("_packed")]
    for key in packed:
        layer, expert, name = re.fullmatch(r"(.*experts\.)(\d+)\.(w13|w2)_weight_packed", key).groups()
        scales = ours[key.replace("_packed", "_scale")].view(torch.uint16).numpy()
        values = torch.from_numpy(dequantize(ours[key].numpy(), scales)).bfloat16()
        alike += torch.equal(values, theirs[layer + FUSED[name]][int(expert)].mT)
    return alike, len(packed)


@cache
def _loaded(place: Place) -> dict[str, Any]:
    folder = export(place, "vllm-int4", "--to", "vllm-int4")
    said = vllm_process.run(place, "vllm_int4.py", folder, free_port(), place.folder("exports") / READ)
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def dequantized(place: Place) -> Path:
    """The bf16 checkpoint of what vLLM read."""
    _loaded(place)
    return place.folder("exports") / READ
