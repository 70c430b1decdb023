#!/usr/bin/env python3
"""Load an INT4 checkpoint with vLLM's own loader and hold every parameter against the file; runs in vLLM's environment.

vllm_int4.py CHECKPOINT PORT DEQUANTIZED

No CPU kernel of vLLM computes W4A16 experts with gpt-oss' activation, so `select_wna16_moe_backend` refuses them on a
CPU; that is reported. It is then told "emulation", which any GPU would accept, to have the parameters made, loaded by
`load_weights` and read by vLLM's own dequantization. DEQUANTIZED becomes a bf16 checkpoint of what vLLM read.
Prints one JSON object as its last line.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.oracle import int_wna16 as oracle
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as method,
)
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

# vLLM's own defaults, which no gpt-oss checkpoint has: scales of an 8-bit cache, and shapes that nothing reads
NOT_STORED = ("_scale", "_zero_point", "_weight_shape")
EXPERTS = "mlp.experts."
ROUTED = "mlp.experts.routed_experts."


def make_model(config: Any) -> Any:
    """Instantiate the model's parameters, filled with what no checkpoint holds."""
    config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(vllm_config=config)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan if parameter.is_floating_point() else -1)
    return model


def execution_on_cpu(config: Any) -> str:
    """What vLLM says when asked to run it on this machine."""
    try:
        make_model(config)
    except NotImplementedError as refusal:
        return f"refused: {refusal}"
    return "accepted"


def expected(name: str, ours: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the file holds for a parameter of vLLM's: q, k, v one after the other, experts stacked; empty if nothing."""
    name = name.replace(".attn.", ".self_attn.").replace("model.embedding.", "model.embed_tokens.")
    if ".qkv_proj." in name:
        return torch.cat([ours[name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
    layer, routed, part = name.partition(ROUTED)
    if not routed:
        return ours[name]
    if part.endswith("_bias"):
        return ours[layer + EXPERTS + {"w13_bias": "gate_up_proj_bias", "w2_bias": "down_proj_bias"}[part]]
    count = len([key for key in ours if key.startswith(layer + EXPERTS) and key.endswith(f".{part}")])
    experts = [ours[f"{layer}{EXPERTS}{expert}.{part}"] for expert in range(count)]
    return torch.stack(experts) if experts else torch.empty(0)


def write_dequantized(folder: Path, output: Path, layers: dict[str, Any], ours: dict[str, torch.Tensor]) -> None:
    """Write what vLLM's dequantization makes of the loaded experts, in the bf16 layout."""
    tensors = {key: value for key, value in ours.items() if EXPERTS not in key or key.endswith("proj_bias")}
    for prefix, experts in layers.items():
        w13, w2, *_ = oracle.convert_to_wna16_moe_kernel_format(
            backend=oracle.WNA16MoEBackend.EMULATION, layer=experts, quant_config=None, input_dtype=torch.bfloat16,
            w13=experts.w13_weight_packed, w2=experts.w2_weight_packed,
            w13_scale=experts.w13_weight_scale, w2_scale=experts.w2_weight_scale,
        )  # fmt: skip
        tensors[f"{prefix}gate_up_proj"] = w13.mT.contiguous()
        tensors[f"{prefix}down_proj"] = w2.mT.contiguous()
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors*", "ossquant-manifest.json"))
    save_file({key: value.contiguous() for key, value in tensors.items()}, output / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Load, compare, dequantize."""
    folder, port, output = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    config = EngineArgs(model=str(folder), max_model_len=1024, enforce_eager=True).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        refusal = execution_on_cpu(config)
        method.select_wna16_moe_backend = lambda **_: (oracle.WNA16MoEBackend.EMULATION, None)
        model = make_model(config)
        loader = get_model_loader(config.load_config)
        loaded = model.load_weights(loader.get_all_weights(config.model_config, model))
    ours = {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    stored = {name: parameter.data for name, parameter in model.named_parameters()
              if name in loaded or not name.endswith(NOT_STORED) or name.endswith("_weight_scale")}  # fmt: skip
    experts = {name.removesuffix("routed_experts"): module for name, module in model.named_modules()
               if name.endswith("routed_experts")}  # fmt: skip
    write_dequantized(folder, output, experts, ours)
    print(json.dumps({
        "execution_on_cpu": refusal,
        "parameters": len(stored),
        "not_loaded": sorted(set(stored) - loaded),
        "differing": [name for name, data in stored.items() if not torch.equal(data, expected(name, ours))],
        "bytes_equal": sum(data.nbytes for data in stored.values()),
        "bytes_in_file": sum(value.nbytes for value in ours.values()),
        "vllm_defaults": len(dict(model.named_parameters())) - len(stored),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
