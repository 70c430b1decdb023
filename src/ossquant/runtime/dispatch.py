"""Run a model that lies on several devices: tensors are brought to each part, and experts on the host to theirs.

accelerate would copy a host module's weights to the accelerator for every pass; experts are large, and what goes
through them for a token is small, so they are computed where they lie, unless there are many tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ossquant.place import DISK, HOST, DevicePlan
from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.host_experts import HostExperts, settle
from ossquant.runtime.host_trial import NEVER


def dispatch(model: nn.Module, devices: DevicePlan, say: Callable[[str], None] = lambda line: None) -> None:
    """Have every part of a model that is loaded by this plan bring its inputs to where it lies.

    say hears what becomes of experts that lie on the host.
    """
    if not devices.crosses:
        return
    placed = devices.device_map()
    model.hf_device_map = placed
    stream_from = _settle(model, devices, say)
    for part, device in placed.items():
        module = model.get_submodule(part)
        module.register_forward_pre_hook(_Bring(device, below=stream_from.get(part, NEVER)), with_kwargs=True)
        if device != _owner(placed, part):
            module.register_forward_hook(_Return(_owner(placed, part)))


def _settle(model: nn.Module, devices: DevicePlan, say: Callable[[str], None]) -> dict[str, int]:
    """From how many tokens on experts on the host are copied over, by part; bitsandbytes' never are."""
    placed, layers = devices.device_map(), {}
    for part, device in placed.items():
        module, owner = model.get_submodule(part), _owner(placed, part)
        if device == HOST != owner and isinstance(module, NativeMxfp4Experts):
            layers[part] = HostExperts(module, owner, in_files=devices.devices[part] == DISK)
    stream_from: dict[str, int] = {}
    for settled in settle(list(layers.values())):
        say(str(settled))
        stream_from |= {part: settled.stream_from for part, layer in layers.items() if layer in settled.layers}
    return stream_from


def _owner(placed: Mapping[str, str], part: str) -> str:
    """The device that asks a part for what it computes."""
    return placed.get(part.removesuffix(".mlp.experts"), placed[part])


class _Bring:
    """Moves the tensors of a call to a device; calls of many tokens stay where they are, and fetch the weights."""

    def __init__(self, device: str, below: int = NEVER) -> None:
        self.device = torch.device(device)
        self.below = below

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.below < NEVER and args[0].shape[0] >= self.below:
            return None
        return _moved(args, self.device), {name: _moved(value, self.device) for name, value in kwargs.items()}


class _Return:
    """Moves what a module gives back to the device that asked."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self.device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value  # a cache, which lies beside each layer already
