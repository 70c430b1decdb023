"""load_model: a checkpoint to a model that is really in four bits, or an error."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.errors import CheckpointError, DoesNotFitError, UnsupportedError, UsageError
from ossquant.layout import Role
from ossquant.plan import QUANTIZED, Plan
from ossquant.quantize import plan_quantize, quantization_config
from ossquant.recipe import Recipe, built_in
from ossquant.runtime.quantizer import METHOD, parameters_4bit
from ossquant.units import count, nearest, size

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
NO_SINKS = {
    "sdpa": "PyTorch's attention knows no sinks",
    "flash_attention_2": "flash-attn 2 knows no attention sinks",
    "flex_attention": "its sinks are not supported by transformers' gpt-oss on every device",
}


@dataclass(frozen=True)
class Placement:
    """What a loaded model holds, and where: bytes by device."""

    parameters: int
    parameters_4bit: int
    formats: Mapping[str, int]  # parameters by format
    bytes_by_device: Mapping[str, int]

    def __str__(self) -> str:
        formats = ", ".join(f"{name} {count(number)}" for name, number in self.formats.items())
        where = ", ".join(f"{size(nbytes)} on {device}" for device, nbytes in self.bytes_by_device.items())
        return f"{count(self.parameters_4bit)} of {count(self.parameters)} parameters in 4 bits ({formats}); {where}"


def load_model(
    path: str | Path,
    *,
    scheme: str | None = None,
    device_map: Any = "auto",
    max_memory: dict[Any, Any] | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
) -> tuple[Any, Any]:
    """Load a gpt-oss checkpoint in four bits. Returns (model, tokenizer).

    path is a folder or a hub id. scheme None takes a checkpoint of ours as it is stored and the published one
    as 'hybrid'; a name quantizes on load, to the very weights that `ossquant quantize` writes. dtype is what
    is computed in. Raises UsageError, CheckpointError, DoesNotFitError; it never warns and goes on.
    """
    with open_checkpoint(path) as checkpoint:
        recipe = _choose(checkpoint, scheme)
        plan = plan_quantize(checkpoint, recipe)
        arguments = {
            "device_map": _device_map(device_map, max_memory, plan),
            "max_memory": max_memory,
            "dtype": _dtype(dtype),
            "attn_implementation": _attention(attn_implementation),
        }
        model = _load(checkpoint, plan, arguments)
        tokenizer = _tokenizer(checkpoint.folder)
    return model, tokenizer


def placement(model: nn.Module) -> Placement:
    """Look at a loaded model's tensors: how many are in four bits, and on which device."""
    plan: Plan | None = getattr(getattr(model, "hf_quantizer", None), "plan", None)
    four_bit = parameters_4bit(model)
    formats: dict[str, int] = {}
    if plan is not None:
        for role in plan.by_role():
            name = role.scheme.format if role.scheme.is_4bit else str(model.dtype).removeprefix("torch.")
            formats[name] = formats.get(name, 0) + role.parameters
    total = plan.parameters if plan else sum(p.numel() for p in model.parameters())
    by_device: dict[str, int] = {}
    for tensor in _tensors(model):
        device = str(tensor.device)
        by_device[device] = by_device.get(device, 0) + tensor.numel() * tensor.element_size()
    return Placement(total, four_bit, formats or {str(model.dtype).removeprefix("torch."): total}, by_device)


# the schemes to run a checkpoint in; the others are for servers
LOADABLE = ("hybrid", "nf4", "fp4", "bf16")


def _choose(checkpoint: Checkpoint, scheme: str | None) -> Recipe:
    stored = checkpoint.plan
    experts, attention = stored.scheme(Role.EXPERTS), stored.scheme(Role.ATTENTION)
    if experts.format == "int4":
        raise UnsupportedError(
            f"{checkpoint.folder}: INT4 experts are for vLLM", hint=f"vllm serve {checkpoint.folder}"
        )
    if scheme is not None and scheme not in LOADABLE:
        raise UsageError(f"scheme '{scheme}' is not one to run", hint=nearest(scheme, LOADABLE))
    if stored.has_bnb:
        as_stored = Recipe("as stored", "", {role: stored.scheme(role) for role in QUANTIZED})
        if scheme and any(built_in(scheme).scheme(role) != as_stored.scheme(role) for role in QUANTIZED):
            raise UnsupportedError(
                f"{checkpoint.folder}: experts are {experts.format}, attention {attention.format}, not '{scheme}'",
                hint="leave --scheme out, or quantize from the checkpoint it was made of",
            )
        return as_stored
    if scheme is None and experts.format == "bf16":
        raise UsageError(
            f"{checkpoint.folder}: its experts are in bf16, and no scheme says what they should become",
            hint="scheme 'nf4' or 'hybrid' quantizes on load, 'bf16' keeps them",
        )
    return built_in(scheme or "hybrid")


def _load(checkpoint: Checkpoint, plan: Plan, arguments: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if checkpoint.plan.has_bnb:
        _check_ours(checkpoint)  # its own quantization_config stands, and is held against the files
    elif plan.has_bnb:
        config.quantization_config = quantization_config(*(plan.scheme(role) for role in QUANTIZED))
    elif checkpoint.plan.scheme(Role.EXPERTS).format == "mxfp4":
        arguments = arguments | {"quantization_config": Mxfp4Config(dequantize=True)}
    on_load = checkpoint.plan.tensors != plan.tensors
    with _one_tensor_at_a_time(on_load), _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, config=config, local_files_only=True, use_safetensors=True,
            output_loading_info=True, **arguments,
        )  # fmt: skip
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise CheckpointError(
                f"{checkpoint.folder}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}",
                hint="the checkpoint does not belong to this version of transformers; report it",
            )
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if devices & {"cpu", "disk"} and len(devices) > 1:
        raise DoesNotFitError(
            f"{size(plan.nbytes)} do not fit the accelerator, and running across host and device is not supported yet",
            hint="choose a smaller scheme, raise max_memory, or device_map='cpu'",
        )
    return model


def _check_ours(checkpoint: Checkpoint) -> None:
    stated = checkpoint.config.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are in 4 bits, its config.json does not say so",
            hint="restore the config.json that was written with it",
        )


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: no usable tokenizer", hint="copy the model's tokenizer files there"
        ) from error


def _device_map(device_map: Any, max_memory: Mapping[Any, Any] | None, plan: Plan) -> Any:
    """Resolve 'auto' where there is no choice, and see that the weights fit."""
    if isinstance(device_map, dict):
        if "disk" in device_map.values():
            raise UnsupportedError("device_map: 4-bit weights cannot be spilled to disk", hint="use device_map='auto'")
        return device_map
    if device_map != "auto":
        return {"": device_map}
    if torch.cuda.device_count() > 1 or (torch.cuda.is_available() and max_memory):
        return "auto"
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else _host_memory()
    if free is not None and plan.nbytes > free:
        raise DoesNotFitError(
            f"the weights take {size(plan.nbytes)}, {size(free)} of {'GPU' if on_gpu else 'host'} memory are free",
            hint=f"see `ossquant fit --gpu {max(1, plan.nbytes // 10**9 + 2)}GB`",
        )
    return {"": 0 if on_gpu else "cpu"}


def _host_memory() -> int | None:
    """Bytes of host memory that can be had without swapping, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(available) * 1024 if available else None


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", hint=nearest(dtype, [*DTYPES, "auto"]))
    return DTYPES[dtype]


def _attention(implementation: str) -> str:
    if implementation in NO_SINKS:
        raise UnsupportedError(
            f"attn_implementation '{implementation}': {NO_SINKS[implementation]}",
            hint="use 'auto', 'eager', or 'flash_attention_4' on Hopper and Blackwell",
        )
    return "eager" if implementation == "auto" else implementation


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                yield part.absmax
                yield part.code


@contextmanager
def _one_tensor_at_a_time(wanted: bool) -> Iterator[None]:
    """Keep transformers from reading ahead of a slower quantization, which would hold the source in memory."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    if wanted:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if wanted:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own bar and reports: what they would tell is an error of ours."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
