"""Which device of this machine holds what: device_map and max_memory, as users write them, to a DevicePlan."""

from collections.abc import Mapping
from typing import Any

import torch

from ossquant.detect import available_host_memory
from ossquant.errors import DoesNotFitError, UnsupportedError, UsageError
from ossquant.memory.terms import Workload
from ossquant.place import DISK, HOST, DevicePlan, part_bytes, plan_devices, read_device_map
from ossquant.plan import Plan
from ossquant.units import parse_size, size

SPREAD = ("auto", "balanced", "sequential")  # transformers' words for a device_map that is to be found


def place(
    plan: Plan,
    device_map: Any,
    max_memory: Mapping[int | str, int | str] | None,
    workload: Workload,
    *,
    dtype_bytes: int,
    mapped: bool,
) -> DevicePlan:
    """Find where everything goes, or check what the user says of it; mapped as in plan_devices.

    Raises UsageError, UnsupportedError, DoesNotFitError.
    """
    if isinstance(device_map, str) and device_map in SPREAD:
        return plan_devices(plan, free_memory(max_memory), workload, dtype_bytes=dtype_bytes, mapped=mapped)
    by_module = device_map if isinstance(device_map, Mapping) else {"": device_map}
    devices = read_device_map(plan, by_module, dtype_bytes)
    for device in devices.nbytes:
        _check_device(device)
    if DISK in devices.experts and not mapped:
        raise UnsupportedError(
            "device_map: only experts in MXFP4, as they are stored, can stay on disk",
            hint="use scheme 'hybrid' or 'mxfp4', of a checkpoint that has MXFP4 experts",
        )
    _check_room(devices, part_bytes(plan, dtype_bytes), mapped)
    return devices


def free_memory(max_memory: Mapping[int | str, int | str] | None = None) -> dict[str, int]:
    """Bytes free by device, accelerators first, and no more than max_memory says.

    Raises UsageError for a device that is not there, and for no size.
    """
    free = {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    free[HOST] = available_host_memory()
    if max_memory is None:
        return free
    caps = {
        f"cuda:{device}" if isinstance(device, int) else device: parse_size(cap) if isinstance(cap, str) else cap
        for device, cap in max_memory.items()
    }
    for device in caps:
        if device not in (*free, DISK):
            raise UsageError(f"max_memory: there is no device '{device}'", hint=f"torch sees {', '.join(free)}")
    return {
        device: min(nbytes, caps.get(device, nbytes))
        for device, nbytes in free.items()
        if device in caps or device == HOST
    }


def _check_room(devices: DevicePlan, sizes: Mapping[str, int], mapped: bool) -> None:
    """See that what the user has placed goes there; mapped experts take no memory that cannot be had back."""
    for device, free in free_memory().items():
        here = [part for part, placed in devices.devices.items() if placed == device]
        if device == HOST and mapped:
            here = [part for part in here if not part.endswith(".experts")]
        needed = sum(sizes[part] for part in here)
        if needed > free:
            raise DoesNotFitError(
                f"device_map: {size(needed)} of weights are to go to {device}, {size(free)} are free",
                hint="use device_map='auto', or a smaller scheme",
            )


def _check_device(device: str) -> None:
    try:
        found = torch.device(HOST if device == DISK else device)
    except RuntimeError as error:
        raise UsageError(f"device_map: there is no device '{device}'", hint="such as cpu, cuda:0 or 0") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device_map: there is no device '{device}'", hint=f"torch sees {torch.cuda.device_count()} CUDA devices"
        )
