#!/usr/bin/env python3
"""Runs checks of scripts/gpu_check in a process of their own, and prints a JSON line for each as it ends.

With no names it prints one line that says what the machine has and which checks there are.
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bitsandbytes.cextension
import psutil
import pynvml
import torch

import gpu_check_decode
import gpu_check_full
import gpu_check_tiny
from gpu_check_case import Case, Setting, SkipCase

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "triton", "numpy", "numba", "safetensors",
            "flash-attn-4", "kernels")  # fmt: skip


def cases() -> dict[str, Case]:
    """Every check by name, in the order in which they are worth having."""
    every = (*gpu_check_tiny.cases(), *gpu_check_decode.cases(), *gpu_check_full.cases())
    return {case.name: case for case in every}


def describe() -> dict[str, Any]:
    """What the machine has, cuda being null where there is no CUDA GPU, and the checks."""
    return {
        "versions": {name: _version(name) for name in PACKAGES}
        | {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "bitsandbytes_library": "cuda" if bitsandbytes.cextension.lib.compiled_with_cuda else "cpu",
        },
        "host": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "cuda": _gpus() if torch.version.cuda and torch.cuda.is_available() else None,
        "cases": [{"name": case.name, "worker": case.worker, "limit": case.limit, "part": case.part}
                  for case in cases().values()],
    }  # fmt: skip


def run(case: Case, setting: Setting) -> dict[str, Any]:
    """Run a check and say what came out."""
    started = time.monotonic()
    try:
        findings = case.run(setting)
    except SkipCase as reason:
        return {"name": case.name, "status": "skipped", "seconds": time.monotonic() - started, "reason": str(reason)}
    return {
        "name": case.name,
        "status": "failed" if findings.faults else "passed",
        "seconds": time.monotonic() - started,
        "reason": "; ".join(findings.faults),
        "figures": findings.figures,
        "bounds": findings.bounds,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _gpus() -> list[dict[str, Any]]:
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_bytes": gpu.total_memory, "compute_capability": [gpu.major, gpu.minor]}
        for gpu in found
    ]


def main() -> None:
    """Run the checks that are named."""
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no result
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", type=Path)
    parser.add_argument("--scratch", type=Path)
    arguments = parser.parse_args()
    if not arguments.names:
        results.write(json.dumps(describe()) + "\n")
        return
    setting = Setting(arguments.device, arguments.tiny, arguments.scratch)
    gpu_check_tiny.prepare(setting)
    known = cases()
    for name in arguments.names:
        results.write(json.dumps(run(known[name], setting), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
