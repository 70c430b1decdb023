"""load_model: a checkpoint to a model that is really in four bits, or an error."""

import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging
from transformers.utils.quantization_config import Mxfp4Config

from ossquant.checkpoint.reader import Checkpoint, open_checkpoint
from ossquant.errors import CheckpointError, UnsupportedError, UsageError
from ossquant.layout import Role
from ossquant.memory.terms import Workload
from ossquant.memory.transformers import kv_cache_bytes, working_bytes
from ossquant.place import DISK, DevicePlan
from ossquant.plan import QUANTIZED, Plan
from ossquant.quantize import plan_quantize, quantization_config
from ossquant.recipe import Recipe, built_in
from ossquant.runtime.attention import choose_attention
from ossquant.runtime.bnb_config import recipe_from_bitsandbytes
from ossquant.runtime.decode_kernels import use_decode_kernels
from ossquant.runtime.decoder import attach_decoder
from ossquant.runtime.devices import place
from ossquant.runtime.dispatch import dispatch
from ossquant.runtime.hub_experts import KernelExperts
from ossquant.runtime.hub_kernels import use_mxfp4_kernels
from ossquant.runtime.quantizer import METHOD, parameters_4bit
from ossquant.units import count, nearest, size

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
KERNELS = ("auto", "own", "never")
DEFAULT_CONTEXT = 8192  # tokens that the planned cache has room for

# hears what is about to be done, a line each
Announce = Callable[[str], None]


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
    quantization_config: Any = None,
    device_map: Any = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    max_model_len: int = DEFAULT_CONTEXT,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    kernels: str = "auto",
    announce: Announce | None = None,
    progress: bool = False,
) -> tuple[Any, Any]:
    """Load a gpt-oss checkpoint in four bits. Returns (model, tokenizer).

    path is a folder or a hub id. scheme None takes a checkpoint of ours as it is stored and the published one
    as 'hybrid'; a name quantizes on load, to the very weights that `ossquant quantize` writes.
    quantization_config, in place of scheme, is a transformers BitsAndBytesConfig with load_in_4bit; here it holds
    for the experts, too. device_map 'auto' plans: what is dense goes to the accelerators with as many experts as
    there is room for beside a cache of max_model_len tokens, the other experts to the host. max_memory caps
    what a device may hold, as in {0: "20GiB", "cpu": "60GiB"}; accelerators that it does not name are not used.
    dtype is what is computed in. kernels 'auto' takes, on a GPU, our Triton kernels for few tokens and transformers'
    for MXFP4 where these, tried there, agree with the plain way and are faster; 'own' leaves transformers' out, which
    come from the hub and with which a model cannot be saved or trained; 'never' takes neither, and no CUDA graphs.
    announce hears the plan before anything is read, and what it took; progress draws a bar on stderr.
    Raises UsageError, CheckpointError, UnsupportedError, DoesNotFitError; it never warns and goes on.
    """
    say = announce or (lambda line: None)
    if kernels not in KERNELS:
        raise UsageError(f"unknown kernels '{kernels}'", hint=nearest(kernels, KERNELS))
    with open_checkpoint(path) as checkpoint:
        recipe, dtype = _wanted(checkpoint, scheme, quantization_config, dtype)
        plan = plan_quantize(checkpoint, recipe)
        computed = _dtype(dtype)
        workload = Workload(max_model_len=min(max_model_len, plan.spec.max_position_embeddings))
        devices = place(
            plan,
            device_map,
            max_memory,
            workload,
            dtype_bytes=computed.itemsize,
            mapped=_stays_mapped(checkpoint, plan),
        )
        attention = choose_attention(attn_implementation, devices.layers[0], computed)
        say(f"plan: {devices}")
        say(str(attention))
        if DISK in devices.experts:
            say(f"host memory is too small for {size(devices.nbytes[DISK])} of the experts: they are read from disk "
                "for every token, which is slow")  # fmt: skip
        started = time.monotonic()
        model = _load(checkpoint, plan, devices, computed, attention.implementation, progress, say)
        if kernels != "never":
            use_decode_kernels(model, say)
        if kernels == "auto":
            use_mxfp4_kernels(model, working_bytes(plan, workload) + kv_cache_bytes(plan, workload), say)
        if not devices.crosses:
            attach_decoder(model, workload.max_model_len, say)
        seconds = time.monotonic() - started
        tokenizer = load_tokenizer(checkpoint.folder)
        say(f"loaded in {seconds:.1f} s; peak host memory {size(_peak_host_memory())}, mapped files included")
    return model, tokenizer


def _wanted(
    checkpoint: Checkpoint, scheme: str | None, quantization_config: Any, dtype: str | torch.dtype
) -> tuple[Recipe, str | torch.dtype]:
    """The recipe to load by, and the dtype to compute in."""
    if quantization_config is None:
        return _choose(checkpoint, scheme), dtype
    if scheme is not None:
        raise UsageError("scheme and quantization_config exclude each other", hint="give one of them")
    recipe, compute_dtype = recipe_from_bitsandbytes(quantization_config)
    if checkpoint.plan.has_bnb:
        stored = {role: checkpoint.plan.scheme(role) for role in QUANTIZED}
        if any(recipe.scheme(role) != stored[role] for role in QUANTIZED):
            raise UnsupportedError(
                f"{checkpoint.folder} is quantized already, and not as quantization_config says",
                hint="leave quantization_config out, or load the checkpoint it was made of",
            )
    return recipe, compute_dtype if dtype == "auto" else dtype


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
LOADABLE = ("hybrid", "nf4", "fp4", "mxfp4", "bf16")


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


def _load(
    checkpoint: Checkpoint,
    plan: Plan,
    devices: DevicePlan,
    dtype: torch.dtype,
    attn_implementation: str,
    progress: bool,
    say: Announce,
) -> Any:
    arguments: dict[str, Any] = {}
    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if checkpoint.plan.has_bnb and not checkpoint.plan.unsloth:
        _check_ours(checkpoint)  # its own quantization_config stands, and is held against the files
    elif plan.parameters_4bit:
        config.quantization_config = quantization_config(*(plan.scheme(role) for role in QUANTIZED))
    elif checkpoint.plan.scheme(Role.EXPERTS).format == "mxfp4":
        arguments = {"quantization_config": Mxfp4Config(dequantize=True)}
    on_load = checkpoint.plan.tensors != plan.tensors
    with _one_tensor_at_a_time(on_load), _quiet(progress), _own_dispatch():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
            dtype=dtype, device_map=devices.device_map(), attn_implementation=attn_implementation, **arguments,
        )  # fmt: skip
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise CheckpointError(
                f"{checkpoint.folder}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[0]}",
                hint="the checkpoint does not belong to this version of transformers; report it",
            )
    dispatch(model, devices, say)
    return model


def _check_ours(checkpoint: Checkpoint) -> None:
    stated = checkpoint.config.get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are in 4 bits, its config.json does not say so",
            hint="restore the config.json that was written with it",
        )


def load_tokenizer(folder: Path) -> Any:
    """Load a checkpoint's tokenizer. Raises CheckpointError."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: no usable tokenizer", hint="copy the model's tokenizer files there"
        ) from error


def _stays_mapped(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether experts are computed on as they lie in the files."""
    experts = plan.scheme(Role.EXPERTS)
    return experts.format == "mxfp4" and checkpoint.plan.scheme(Role.EXPERTS) == experts


def _peak_host_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", hint=nearest(dtype, [*DTYPES, "auto"]))
    return DTYPES[dtype]


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, KernelExperts):
            yield from module.packed()
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
def _own_dispatch() -> Iterator[None]:
    """Keep transformers from giving a model on several devices accelerate's hooks, in place of our own."""
    name = "accelerate_dispatch"
    before = getattr(transformers.modeling_utils, name)
    setattr(transformers.modeling_utils, name, lambda *args: None)
    try:
        yield
    finally:
        setattr(transformers.modeling_utils, name, before)


@contextmanager
def _quiet(bar_wanted: bool) -> Iterator[None]:
    """Silence transformers' own reports: what they would tell is an error of ours. Its bar stays if it is wanted."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not bar_wanted:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
