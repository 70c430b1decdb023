"""Gpu: what the machine says it has, before any table is asked."""

import sys
from dataclasses import dataclass
from pathlib import Path

from ossquant.errors import UsageError

_DRM = Path("/sys/class/drm")
_AMD = "0x1002"  # PCI vendor number
# a graphics unit inside a processor has less memory of its own than this, any card we know has more
_INTEGRATED = 4 * 2**30


@dataclass(frozen=True)
class Gpu:
    """One device by its driver's own name and total bytes; None where the driver counts none (shared memory)."""

    vendor: str
    name: str
    nbytes: int | None


def gpus() -> list[Gpu]:
    """Every device of the first vendor whose driver answers; empty if none does.

    Raises UsageError where a driver is there and fails.
    """
    return _nvidia() or _amd(_DRM) or _apple()


def available_host_memory() -> int:
    """Bytes of host memory that programs can take now."""
    import psutil

    return int(psutil.virtual_memory().available)


def _nvidia() -> list[Gpu]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as error:
        raise UsageError(f"NVML does not start: {error}", hint="nvidia-smi says more; or name a device") from error
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [_nvidia_gpu(handle) for handle in handles]
    except pynvml.NVMLError as error:
        raise UsageError(f"NVML fails: {error}", hint="nvidia-smi says more; or name a device") from error
    finally:
        pynvml.nvmlShutdown()


def _nvidia_gpu(handle: object) -> Gpu:
    import pynvml

    name = str(pynvml.nvmlDeviceGetName(handle))
    try:
        in_slices = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError_NotSupported:
        in_slices = False
    if in_slices:
        raise UsageError(f"{name} is divided by MIG", hint="give the size of your slice: --gpu 20GB")
    try:
        return Gpu("nvidia", name, int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    except pynvml.NVMLError_NotSupported:  # GB10 and Jetson share the host's memory
        return Gpu("nvidia", name, None)


def _amd(drm: Path) -> list[Gpu]:
    """What amdgpu says in /sys; cards alone if there are any, else the unit inside the processor."""
    folders = [path.parent for path in sorted(drm.glob("card*/device/mem_info_vram_total"))]
    cards = [folder for folder in folders if _read(folder / "vendor") == _AMD]
    large = [folder for folder in cards if _number(folder / "mem_info_vram_total") >= _INTEGRATED]
    if large:
        return [
            Gpu("amd", _read(folder / "product_name") or "AMD GPU", _number(folder / "mem_info_vram_total"))
            for folder in large
        ]
    return [Gpu("amd", _processor(), _shared(folder)) for folder in cards]


def _shared(folder: Path) -> int:
    return _number(folder / "mem_info_vram_total") + _number(folder / "mem_info_gtt_total")


def _processor() -> str:
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "AMD GPU"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _read(path)
    return int(text) if text.isdecimal() else 0


def _apple() -> list[Gpu]:
    if sys.platform != "darwin":
        return []
    import subprocess

    import psutil

    asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        name = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(f"sysctl does not name the chip: {error}", hint="name it: --gpu 'm4 max 64gb'") from error
    if not name.startswith("Apple"):  # an Intel Mac
        return []
    return [Gpu("apple", name, int(psutil.virtual_memory().total))]
