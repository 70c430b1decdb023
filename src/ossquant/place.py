"""DevicePlan: which device holds what, decided before a byte is read.

Attention, routers, embeddings, the cache and what is computed go to accelerators, and the experts of as many
layers as there is room for; those of the first layers lie in host memory, or stay in the files where that is full.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ossquant.errors import DoesNotFitError, UsageError
from ossquant.memory import transformers as memory
from ossquant.memory.terms import Workload
from ossquant.plan import Plan
from ossquant.units import GIB, nearest, size

HOST, DISK = "cpu", "disk"
HOST_RESERVE = GIB  # what a loading process takes beside weights, torch itself aside

_HEAD, _EXPERTS = "lm_head", ".mlp.experts"


@dataclass(frozen=True)
class DevicePlan:
    """The device of each part by torch's names, "disk" for experts that stay in the files.

    The parts are model.embed_tokens, model.layers.N, model.layers.N.mlp.experts, model.norm and lm_head.
    nbytes counts what each device will hold of the weights.
    """

    devices: Mapping[str, str]
    nbytes: Mapping[str, int]

    @cached_property
    def experts(self) -> tuple[str, ...]:
        """The device of each layer's experts."""
        return tuple(device for part, device in self.devices.items() if part.endswith(_EXPERTS))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The device of each layer's attention, router and norms."""
        return tuple(device for part, device in self.devices.items() if part.startswith("model.layers.")
                     and not part.endswith(_EXPERTS))  # fmt: skip

    @property
    def crosses(self) -> bool:
        """Whether tensors must go from one device to another."""
        return len(set(self.device_map().values())) > 1

    def device_map(self) -> dict[str, str]:
        """The same for a loader: what stays in the files is mapped into the host's address space."""
        return {part: HOST if device == DISK else device for part, device in self.devices.items()}

    def __str__(self) -> str:
        return "; ".join(f"{size(nbytes)} on {device}{self._whose(device)}" for device, nbytes in self.nbytes.items())

    def _whose(self, device: str) -> str:
        count = self.experts.count(device)
        return f" (experts of {count} of {len(self.layers)} layers)" if count and device not in self.layers else ""


def plan_devices(
    plan: Plan, free: Mapping[str, int], workload: Workload, *, dtype_bytes: int = 2, mapped: bool = False
) -> DevicePlan:
    """Spread a model over devices.

    free is bytes by device, accelerators in the order in which they are filled, then "cpu". dtype_bytes are those
    of a weight that is not quantized. mapped: whether experts can stay in the files, being computed on as they are
    stored. Raises DoesNotFitError.
    """
    sizes = part_bytes(plan, dtype_bytes)
    accelerators = {device: nbytes for device, nbytes in free.items() if device != HOST}
    if not accelerators:
        computing = memory.activation_bytes(plan, workload) + memory.kv_cache_bytes(plan, workload)
        return _with_host(sizes, dict.fromkeys(sizes, HOST), free[HOST] - computing, mapped)
    for on_host in range(plan.spec.num_hidden_layers + 1):
        devices = _spread(plan, sizes, accelerators, on_host, workload)
        if devices:
            return _with_host(sizes, devices, free.get(HOST, 0), mapped)
    dense = sum(nbytes for part, nbytes in sizes.items() if not part.endswith(_EXPERTS))
    working = memory.working_bytes(plan, workload) + memory.streaming_bytes(plan)
    needed = dense + memory.kv_cache_bytes(plan, workload) + len(accelerators) * working
    room = sum(accelerators.values())
    raise DoesNotFitError(
        f"with all experts on the host {size(needed)} are needed on {', '.join(accelerators)}, {size(room)} are free",
        hint=_advice(room),
    )


def read_device_map(plan: Plan, device_map: Mapping[str, object], dtype_bytes: int = 2) -> DevicePlan:
    """Take a device_map as users write them, by module. Raises UsageError for one that cannot be carried out."""
    sizes = part_bytes(plan, dtype_bytes)
    named = {name: _device_name(device) for name, device in device_map.items()}
    for name in named:
        if name not in {"", "model", "model.layers", *sizes}:
            raise UsageError(f"device_map: '{name}' cannot be placed by itself", hint=nearest(name, list(sizes)))
    devices = {}
    for part in sizes:
        owner = max((name for name in named if _holds(name, part)), key=len, default=None)
        if owner is None:
            raise UsageError(f"device_map: nothing says where '{part}' goes", hint="'' stands for all others")
        devices[part] = named[owner]
        if devices[part] == DISK and not part.endswith(_EXPERTS):
            raise UsageError(f"device_map: '{part}' cannot stay on disk", hint="only model.layers.N.mlp.experts can")
    return DevicePlan(devices, _totals(sizes, devices))


def part_bytes(plan: Plan, dtype_bytes: int = 2) -> dict[str, int]:
    """Bytes that each part takes once it is loaded, in the order in which a forward pass meets them."""
    sizes: dict[str, int] = {}
    for entry in plan.tensors:
        part = _part(entry.tensor.name)
        loaded = entry.nbytes if entry.scheme.format != "bf16" else entry.tensor.numel * dtype_bytes
        sizes[part] = sizes.get(part, 0) + loaded
    return sizes


def _part(name: str) -> str:
    if not name.startswith("model.layers."):
        return name.rpartition(".")[0]
    layer, inside = ".".join(name.split(".")[:3]), name.split(".")[3:]
    return layer + _EXPERTS if inside[:2] == ["mlp", "experts"] else layer


def _holds(owner: str, part: str) -> bool:
    return not owner or part == owner or part.startswith(f"{owner}.")


def _device_name(device: object) -> str:
    if isinstance(device, int) or str(device).isdecimal():
        return f"cuda:{device}"
    return "cuda:0" if str(device) == "cuda" else str(device)


def _spread(
    plan: Plan, sizes: Mapping[str, int], accelerators: Mapping[str, int], on_host: int, workload: Workload
) -> dict[str, str] | None:
    """Fill the accelerators in order, the experts of the first on_host layers left out; None if that fails."""
    working = memory.working_bytes(plan, workload) + (memory.streaming_bytes(plan) if on_host else 0)
    room = iter([(device, nbytes - working) for device, nbytes in accelerators.items()])
    device, left = next(room)
    devices: dict[str, str] = {}
    for parts in _together(sizes):
        here = [part for part in parts if not _left_out(part, on_host)]
        needed = sum(sizes[part] for part in here) + _cache_bytes(plan, workload, parts[0])
        while left < needed:
            following = next(room, None)
            if following is None:
                return None
            device, left = following
        left -= needed
        devices |= {part: device if part in here else HOST for part in parts}
    return devices


def _together(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The parts in order, a layer with its experts, the norm with the head."""
    group: list[str] = []
    for part in sizes:
        if group and not part.endswith(_EXPERTS) and part != _HEAD:
            yield group
            group = []
        group.append(part)
    yield group


def _left_out(part: str, on_host: int) -> bool:
    return part.endswith(_EXPERTS) and int(part.split(".")[2]) < on_host


def _cache_bytes(plan: Plan, workload: Workload, part: str) -> int:
    if not part.startswith("model.layers."):
        return 0
    return memory.kv_cache_bytes_of_layer(plan, workload, int(part.split(".")[2]))


def _with_host(sizes: Mapping[str, int], devices: dict[str, str], free: int, mapped: bool) -> DevicePlan:
    """See that the host holds its part; the experts that it does not hold stay in the files, if they can."""
    on_host = [part for part, device in devices.items() if device == HOST]
    lacking = sum(sizes[part] for part in on_host) - (free - HOST_RESERVE)
    for part in (part for part in on_host if mapped and part.endswith(_EXPERTS)):
        if lacking <= 0:
            break
        devices[part] = DISK
        lacking -= sizes[part]
    if on_host and lacking > 0:
        needed = sum(sizes[part] for part in on_host)
        raise DoesNotFitError(
            f"{size(needed)} of weights do not go into host memory: beside what computing takes "
            f"{size(max(free - HOST_RESERVE, 0))} are free",
            hint=_advice(free),
        )
    return DevicePlan(devices, _totals(sizes, devices))


def _totals(sizes: Mapping[str, int], devices: Mapping[str, str]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for part, device in devices.items():
        totals[device] = totals.get(device, 0) + sizes[part]
    return totals


def _advice(free: int) -> str:
    return f"see what fits: ossquant fit --gpu {max(1, free // GIB)}GiB"
