"""Whether a model's MXFP4 experts run on the kernels of transformers: where those are there, agree, and are faster.

They come from a hub package and were written for GPUs that we do not know; so on every device that has experts they
are first held against our own experts, on one of its layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations import mxfp4
from transformers.integrations.hub_kernels import get_kernel
from transformers.utils import import_utils, is_kernels_available, is_triton_available

from ossquant.detect import available_host_memory
from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.hub_experts import empty_experts, kernel_mlp
from ossquant.runtime.hub_trial import TOLERANCE, Trial, try_kernels
from ossquant.runtime.kernels import check_alive, first_line
from ossquant.units import size

# what transformers 5.23 asks for: replace_with_mxfp4_linear and Mxfp4HfQuantizer.validate_environment
HUB_KERNELS, HUB_VERSION = "kernels-community/gpt-oss-triton-kernels", 1
CAPABILITY, TRITON = (7, 5), "3.4.0"

# the CUDA compute capability of a device, None if it has none
CapabilityOf = Callable[[torch.device], tuple[int, int] | None]


def cuda_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a device, None if it is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def use_mxfp4_kernels(
    model: Any, reserve: int, announce: Callable[[str], None], *, capability_of: CapabilityOf = cuda_capability
) -> None:
    """Put the layers of a loaded model on the kernels, device by device, where they agree with ours and are faster.

    Only experts that lie beside their router are looked at. reserve is what has to stay free on a device, in bytes;
    announce hears what was decided, and why, where a GPU is new enough for it to be a question. What the kernels
    raise leaves our experts in place. Raises UnsupportedError if they leave the GPU in no state to go on.
    """
    for device, names in _layers(model).items():
        capability = capability_of(device)
        if capability is not None and capability >= CAPABILITY:
            announce(f"MXFP4 kernels of transformers on {device}: {_decide(model, device, names, reserve, capability)}")


def obstacle(capability: tuple[int, int] | None, dtype: torch.dtype, mlp: nn.Module, config: Any) -> str:
    """Why the kernels cannot compute a layer on a device of this compute capability; empty if they can."""
    if capability is None:
        return "they need a CUDA GPU"
    if capability < CAPABILITY:
        return f"they need compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if dtype != torch.bfloat16:
        return f"they compute in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if not is_triton_available(TRITON):
        return f"they need triton: pip install 'triton>={TRITON}'"
    if not is_kernels_available():
        return f"they need the package kernels: pip install '{_kernels_requirement()}'"
    theirs, ours = empty_experts(config), mlp.experts.gate
    if not hasattr(theirs, "forward_routed"):
        return "they need transformers 5.23 or later"
    if (theirs.alpha, theirs.limit) != (ours.alpha, ours.limit):
        return (
            f"their gate has alpha {theirs.alpha} and limit {theirs.limit}, the model's {ours.alpha} and {ours.limit}"
        )
    return ""


def _decide(model: Any, device: torch.device, names: list[str], reserve: int, capability: tuple[int, int]) -> str:
    """Put the layers on the kernels, or leave them; says which, and why."""
    reason = obstacle(capability, model.dtype, model.get_submodule(names[0]), model.config)
    if reason:
        return f"not used: {reason}"
    replaced: list[str] = []
    try:
        said = _replace(model, device, names, reserve, replaced)
    except Exception as error:  # noqa: BLE001  the network, the compiler and the driver each have errors of their own
        said = f"used for {len(replaced)} of {len(names)} layers: " if replaced else "not used: "
        said += first_line(error)
    _settle(device, said)
    return said


def _replace(model: Any, device: torch.device, names: list[str], reserve: int, replaced: list[str]) -> str:
    """Try the first layer, then put them all on the kernels; replaced takes the names of those that are."""
    mxfp4.triton_kernels_hub = get_kernel(HUB_KERNELS, version=HUB_VERSION)
    layer, trial = try_kernels(model.get_submodule(names[0]), model.config, device)
    objection = _objection(trial, len(names), device, reserve)
    if objection:
        return f"not used: {objection}"
    for name in names:
        model.set_submodule(name, kernel_mlp(model.get_submodule(name), model.config) if replaced else layer)
        replaced.append(name)
    return f"{trial}, used"


def _objection(trial: Trial, layers: int, device: torch.device, reserve: int) -> str:
    if not trial.error <= TOLERANCE:  # which catches NaN
        return f"they disagree with ours (error {trial.error:.1%}, {TOLERANCE:.1%} is what bf16 explains)"
    if not trial.faster:
        return f"they are not faster ({trial})"
    needed = trial.growth * layers
    if needed > 0 and needed > _free(device) - reserve:
        return f"their layout takes {size(needed)} more, which are not free beside the cache"
    return ""


def _layers(model: nn.Module) -> dict[torch.device, list[str]]:
    """The names of layers whose MXFP4 experts lie beside their router, by device."""
    found: dict[torch.device, list[str]] = {}
    for name, mlp in model.named_modules():
        experts = getattr(mlp, "experts", None)
        if isinstance(experts, NativeMxfp4Experts) and experts.down_proj_blocks.device == mlp.router.weight.device:
            found.setdefault(experts.down_proj_blocks.device, []).append(name)
    return found


def _free(device: torch.device) -> int:
    """Bytes free on a device, with what torch holds of it unused."""
    if device.type != "cuda":
        return available_host_memory()
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _settle(device: torch.device, said: str) -> None:
    """See that a device still works, and give back what the trial took."""
    check_alive(device, f"transformers' MXFP4 kernels ({said})", "own")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _kernels_requirement() -> str:
    """The versions of the package kernels that this transformers works with."""
    low, high = (getattr(import_utils, f"KERNELS_{end}_VERSION", None) for end in ("MIN", "MAX"))
    return f"kernels>={low},<{high}" if low and high else "kernels"
