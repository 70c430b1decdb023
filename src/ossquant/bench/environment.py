"""Environment: what of machine, driver, packages and code a figure depends on."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ossquant.bench.devices import nvidia_handles

PACKAGES = ("ossquant", "aiohttp", "torch", "transformers", "bitsandbytes", "accelerate", "numpy")
GIT_SECONDS = 10


def created() -> str:
    """The time, as a result has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Describe this machine and what is installed on it."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "host_memory_bytes": _host_memory(),
        "devices": devices(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "git": git(),
    }


def devices() -> list[dict[str, Any]]:
    """The NVIDIA devices, with driver, clocks (MHz) and power limit (W)."""
    import pynvml

    def told(ask: Any, *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except pynvml.NVMLError:
            return None

    with nvidia_handles() as handles:
        driver = told(pynvml.nvmlSystemGetDriverVersion) if handles else None
        rows = []
        for handle in handles:
            limit, memory = (
                told(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle),
                told(pynvml.nvmlDeviceGetMemoryInfo, handle),
            )
            rows.append({
                "name": told(pynvml.nvmlDeviceGetName, handle),
                "memory_bytes": int(memory.total) if memory else None,
                "driver": driver,
                "sm_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "max_sm_clock_mhz": told(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "memory_clock_mhz": told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
                "power_limit_watts": limit / 1000 if limit else None,
                "persistence_mode": told(pynvml.nvmlDeviceGetPersistenceMode, handle),
            })  # fmt: skip
        return rows


def git() -> dict[str, Any] | None:
    """The commit of the working folder, and whether it was changed since; None outside of a repository."""
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _host_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _version(name: str) -> str | None:
    if name != "ossquant" and name == "torch" and "torch" in sys.modules:
        return str(sys.modules["torch"].__version__)  # with its CUDA, which the metadata leaves out
    try:
        return version(name)
    except PackageNotFoundError:
        return None
