"""Device and Machine: what a model can run on, by the name people type or as the machine says."""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ossquant.detect import Gpu, available_host_memory, gpus
from ossquant.errors import UsageError
from ossquant.units import GIB, MIB, parse_size

ENGINES = ("llama.cpp", "vllm", "transformers")
MAX_COUNT = 1024

# words in front of a model number that people write or leave out
_PREFIXES = re.compile(r"^(nvidia|geforce|gtx|rtx|tesla|amd|radeon|rx|instinct|ryzen|intel|arc|apple)+")
_FILLERS = re.compile(r"\((r|tm)\)|\b(generation|gpu|graphics)\b")
_GB = re.compile(r"(\d)\s*gi?b?(?![a-z0-9])")
_SIZE = re.compile(r"\s*\d+(\.\d+)?\s*[GT]I?B?\s*", re.IGNORECASE)
_SIZED = re.compile(r"(.+?)[\s_(-]*(?<!\d)(\d{1,4})\s*GI?B?\)?\s*", re.IGNORECASE)
_COUNTED = re.compile(r"\s*(\d{1,9})\s*[x×*]\s*(\S.*)", re.IGNORECASE)
_EXAMPLE = "write it like 'rtx 4090', or as a plain size like 24GB"

# of what NVML says, where the table does not know what CUDA has: see `share` in hardware.toml, 2026-11-22
_CUDA_SHARE = 0.981
# totals of one kind of card differ by a few MiB from driver to driver
_SAME_TOTAL = 0.005
# how far a driver's total may be from the table's and still be the same card: ECC takes up to 6 % of GDDR6
_SAME_MEMORY = 0.065


@dataclass(frozen=True)
class Device:
    """One accelerator, or the memory a machine shares with it.

    memory_gb is the vendor's figure, in the vendor's sense of GB; nvml_bytes is the total by NVML or another
    driver; usable_bytes is what a program can have through CUDA, HIP or Metal, known as usable_basis says.
    bandwidth_gbps is 10**9 bytes a second; rates are dense. mxfp4_kernels says by engine (ENGINES) whether it
    computes on MXFP4 here, or by which kernel; sink_attention names the attention kernels that know sinks.
    sources says what each figure rests on: memory, nvml, usable, bandwidth, rates, fp4, kernels, power, price.
    None: not known.
    """

    name: str
    aliases: tuple[str, ...]
    vendor: str
    memory_gb: float
    nvml_bytes: int | None
    usable_bytes: int
    usable_basis: str
    bandwidth_gbps: float | None
    bf16_tflops: float | None
    fp8_tflops: float | None
    fp4_tflops: float | None
    compute_capability: tuple[int, int] | None
    arch: str
    mxfp4_kernels: Mapping[str, str | bool | None] = field(hash=False)
    sink_attention: tuple[str, ...]
    unified_memory: bool
    tdp_w: int | None
    usd_per_hour: float | None
    sources: Mapping[str, str] = field(hash=False)
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """What the user runs on: count equal devices; host_memory in bytes, None if not known."""

    device: Device
    count: int
    host_memory: int | None


def find_machine(text: str) -> Machine:
    """Find what is meant by `4090`, `4xA100-80G`, `2x24GB` or `auto`, which asks this machine.

    Raises UsageError as find_device does, for a count out of 1 to MAX_COUNT, and if `auto` finds nothing.
    """
    if text.strip().lower() == "auto":
        return machine_of(gpus(), available_host_memory())
    counted = _counted(text)
    count, name = (int(counted[1]), counted[2]) if counted else (1, text)
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"'{text}' is {count} devices", hint=f"1 to {MAX_COUNT} can be counted on")
    return Machine(find_device(name), count, None)


def _counted(text: str) -> re.Match[str] | None:
    # a 7900xtx is a device, not 7900 of them
    return None if matching_devices(text) else _COUNTED.fullmatch(text)


def find_machines(text: str) -> tuple[Machine, ...]:
    """The same, and for a name that several devices share all of them."""
    counted = _counted(text)
    shared = matching_devices(counted[2] if counted else text)
    if len(shared) < 2:
        return (find_machine(text),)
    count = find_machine(f"{counted[1]}x{shared[0].name}").count if counted else 1
    return tuple(Machine(device, count, None) for device in shared)


def find_device(text: str) -> Device:
    """Find the device meant by `4090`, `RTX-4090` or `m4 max 64gb`, or one of a plain size, `24GB`.

    Raises UsageError naming the candidates of a name that several share, or the nearest to an unknown one.
    """
    found = matching_devices(text)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"'{text}' is more than one device", hint=f"say which: {_names(found)}")
    if _SIZE.fullmatch(text) and parse_size(text):
        return _of_size(text.strip())
    raise UsageError(f"unknown device '{text}'", hint=_nearest(text))


@cache
def devices() -> tuple[Device, ...]:
    """Every device known by name, in the order of hardware.toml."""
    table = tomllib.loads(Path(__file__).with_name("hardware.toml").read_text("utf-8"))
    archs = {arch["name"]: arch for arch in table["arch"]}
    return tuple(_device(row, archs[row["arch"]], table["source"]) for row in table["device"])


def machine_of(found: Sequence[Gpu], host_memory: int | None) -> Machine:
    """Make a Machine of what the drivers say; of different devices, the kind with the most memory together.

    Raises UsageError if there are none.
    """
    kinds: dict[Gpu, list[Gpu]] = {}
    for gpu in found:
        kinds.setdefault(replace(gpu, nbytes=gpu.nbytes and round(gpu.nbytes / GIB)), []).append(gpu)
    if not kinds:
        raise UsageError("no GPU found on this machine", hint="name one: --gpu 4090, or give a size: --gpu 24GB")
    best = max(kinds.values(), key=lambda kind: sum(gpu.nbytes or 0 for gpu in kind))
    device = _detected(best[0])
    if rest := [f"{len(kind)} x {kind[0].name}" for kind in kinds.values() if kind is not best]:
        device = replace(device, note=_join(device.note, f"not counted: {', '.join(rest)}"))
    return Machine(device, len(best), host_memory)


def _device(row: Mapping[str, Any], arch: Mapping[str, Any], texts: Mapping[str, str]) -> Device:
    capability = arch.get("compute_capability")
    # a source is a key of [source], or the text itself where only one device has it
    sources = {figure: texts.get(source, source) for figure, source in row["source"].items()}
    return Device(
        name=row["name"],
        aliases=tuple(row["aliases"]),
        vendor=arch["vendor"],
        memory_gb=row["memory_gb"],
        nvml_bytes=row["nvml_mib"] * MIB if "nvml_mib" in row else None,
        usable_bytes=row["usable_mib"] * MIB if "usable_mib" in row else _metal_bytes(row["memory_gb"]),
        usable_basis=sources["usable"],
        bandwidth_gbps=row.get("bandwidth_gbps"),
        bf16_tflops=row.get("bf16_tflops"),
        fp8_tflops=row.get("fp8_tflops"),
        fp4_tflops=row.get("fp4_tflops"),
        compute_capability=(capability[0], capability[1]) if capability else None,
        arch=row["arch"],
        mxfp4_kernels={engine: arch["kernels"].get(engine) for engine in ENGINES},
        sink_attention=tuple(arch["sink_attention"]),
        unified_memory=row.get("unified_memory", False),
        tdp_w=row.get("tdp_w"),
        usd_per_hour=row.get("usd_per_hour"),
        sources=sources | {"kernels": texts.get(arch["source"], arch["source"])},
        note=_join(row.get("note", ""), arch.get("note", "")),
    )


def _metal_bytes(memory_gb: float) -> int:
    """What Metal lets a program have by default: see `metal` in hardware.toml."""
    memory = int(memory_gb * GIB)
    return memory * 2 // 3 if memory_gb <= 36 else memory * 3 // 4


def _unknown(name: str, vendor: str, memory_gb: float, nvml_bytes: int | None, usable: int, basis: str) -> Device:
    """A device of which only the memory is known."""
    return Device(
        name=name,
        aliases=(),
        vendor=vendor,
        memory_gb=memory_gb,
        nvml_bytes=nvml_bytes,
        usable_bytes=usable,
        usable_basis=basis,
        bandwidth_gbps=None,
        bf16_tflops=None,
        fp8_tflops=None,
        fp4_tflops=None,
        compute_capability=None,
        arch="",
        mxfp4_kernels=dict.fromkeys(ENGINES),
        sink_attention=(),
        unified_memory=False,
        tdp_w=None,
        usd_per_hour=None,
        sources={"memory": basis, "usable": basis},
    )


def _of_size(text: str) -> Device:
    nbytes = parse_size(text)
    basis = "the size as given, all of it usable; a real device keeps some back"
    return _unknown(text, "", nbytes / 1e9, None, nbytes, basis)


def matching_devices(text: str) -> tuple[Device, ...]:
    """The devices of this name; of `name 64gb` those of that memory, which shared memory comes in any of."""
    if found := _by_key().get(_key(text)):
        return found
    sized = _SIZED.fullmatch(text)
    if not sized or not int(sized[2]):
        return ()
    found, memory_gb = _by_key().get(_key(sized[1]), ()), int(sized[2])
    equal = tuple(device for device in found if device.memory_gb == memory_gb)
    return equal or tuple(_with_memory(device, memory_gb) for device in found if device.unified_memory)


def _with_memory(device: Device, memory_gb: int) -> Device:
    """The same chip sold with another memory; bandwidth and rates stay."""
    if device.vendor == "apple":
        usable, basis = _metal_bytes(memory_gb), device.usable_basis
    else:
        usable = int(device.usable_bytes * memory_gb / device.memory_gb)
        basis = f"the share of its memory that '{device.name}' can use"
    return replace(
        device,
        name=_name_with(device, memory_gb),
        aliases=(),
        memory_gb=float(memory_gb),
        nvml_bytes=None,
        usable_bytes=usable,
        usable_basis=basis,
        sources={**device.sources, "memory": "as given", "usable": basis},
        note=_join(device.note, f"bandwidth and rates of '{device.name}'"),
    )


def _name_with(device: Device, memory_gb: int) -> str:
    return re.sub(rf" {device.memory_gb:g}GB| \(\d+c\)", "", device.name) + f" {memory_gb}GB"


def _detected(gpu: Gpu) -> Device:
    """The row of a device by its driver's name and memory, with the memory that the driver says."""
    if gpu.nbytes is None:
        return find_device(gpu.name)
    nbytes, memory_gb = gpu.nbytes, round(gpu.nbytes / GIB)
    found = matching_devices(f"{gpu.name} {memory_gb}GB") or matching_devices(gpu.name)
    if not found:
        usable, basis = _usable(gpu, nbytes)
        note = "not in the table: only its memory is known; name it to know more"
        return replace(_unknown(gpu.name, gpu.vendor, memory_gb, nbytes, usable, basis), note=note)
    row = min(found, key=lambda device: abs(_total(device) - nbytes))
    if gpu.vendor == "apple":
        return row
    if row.unified_memory or abs(_total(row) - nbytes) <= _SAME_MEMORY * _total(row):
        return _with_driver(row, gpu, nbytes)
    sources = {figure: text for figure, text in row.sources.items() if figure != "price"}
    other = replace(
        row,
        name=_name_with(row, memory_gb),
        aliases=(),
        memory_gb=float(memory_gb),
        nvml_bytes=None,
        usd_per_hour=None,
        sources={**sources, "memory": "as the driver says on this machine"},
        note=_join(row.note, f"has {memory_gb} GiB, unlike '{row.name}'"),
    )
    return _with_driver(other, gpu, nbytes)


def _with_driver(row: Device, gpu: Gpu, nbytes: int) -> Device:
    """A row with the driver's total in place of the table's; what is usable changes if the two differ."""
    usable, basis = _usable(gpu, nbytes)
    if row.nvml_bytes and abs(row.nvml_bytes - nbytes) <= _SAME_TOTAL * nbytes:
        usable, basis = min(row.usable_bytes, nbytes), row.usable_basis
    sources = {**row.sources, "nvml": "as the driver says on this machine", "usable": basis}
    return replace(row, nvml_bytes=nbytes, usable_bytes=usable, usable_basis=basis, sources=sources)


def _usable(gpu: Gpu, nbytes: int) -> tuple[int, str]:
    if gpu.vendor == "nvidia":
        return int(nbytes * _CUDA_SHARE), f"{_CUDA_SHARE} of what NVML says on this machine"
    if gpu.vendor == "apple":
        return _metal_bytes(nbytes / GIB), "Metal's default: 2/3 of the memory up to 36 GB, 3/4 above"
    return nbytes, "what the driver says on this machine"


def _total(device: Device) -> int:
    return device.nvml_bytes or int(device.memory_gb * GIB)


@cache
def _by_key() -> Mapping[str, tuple[Device, ...]]:
    index: dict[str, tuple[Device, ...]] = {}
    for device in devices():
        for key in {_key(name) for name in (device.name, *device.aliases)}:
            index[key] = (*index.get(key, ()), device)
    return index


def _key(text: str) -> str:
    words = _FILLERS.sub("", _GB.sub(r"\1g", text.lower()))
    return _PREFIXES.sub("", re.sub(r"[^a-z0-9]", "", words))


def _nearest(text: str) -> str:
    keys = difflib.get_close_matches(_key(text), _by_key(), n=3)
    found = {device.name: device for key in keys for device in _by_key()[key]}
    return f"did you mean {_names(tuple(found.values()))}?" if found else _EXAMPLE


def _names(found: Sequence[Device]) -> str:
    return " or ".join(f"'{device.name}'" for device in found)


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
