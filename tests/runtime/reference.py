"""An independent reference: transformers' own GptOss modules, given the weights that 4 bits leave.

Nothing of ossquant is used: MXFP4 is expanded by transformers, NF4 and FP4 are rounded by bitsandbytes.
"""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors import safe_open
from transformers import AutoConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

ATTENTION = {"hybrid": "nf4", "nf4": "nf4", "fp4": "fp4", "mxfp4": None, "bf16": None}
EXPERTS = {"hybrid": None, "nf4": "nf4", "fp4": "fp4", "mxfp4": None, "bf16": None}


def reference_model(source: Path, scheme: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model that a published checkpoint becomes in a scheme, unquantized in dtype, eager attention."""
    config = AutoConfig.from_pretrained(source)
    del config.quantization_config
    config._attn_implementation = "eager"
    model = GptOssForCausalLM(config).to(dtype).eval()
    stored = _read(source)
    weights = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            scales = stored[name.replace("_blocks", "_scales")]
            stack = convert_moe_packed_tensors(tensor, scales, dtype=torch.bfloat16)  # (expert, in, out)
            rounded = [_round(expert.t(), EXPERTS[scheme]).t() for expert in stack]
            weights[name.removesuffix("_blocks")] = torch.stack(rounded)
        elif "self_attn" in name and name.endswith("proj.weight"):
            weights[name] = _round(tensor, ATTENTION[scheme])
        elif not name.endswith("_scales"):
            weights[name] = tensor
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=True)
    return model


def _round(weight: torch.Tensor, quant_type: str | None) -> torch.Tensor:
    """A matrix (out, in) after a trip through bitsandbytes' 4 bits."""
    if quant_type is None:
        return weight.float()
    codes, state = quantize_4bit(weight.contiguous(), blocksize=64, quant_type=quant_type, compress_statistics=True)
    state.dtype = torch.float32
    return dequantize_4bit(codes, state)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
