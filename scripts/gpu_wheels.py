#!/usr/bin/env python3
"""Gather the wheels that a GPU machine without a network lacks, in a folder to carry there.

    scripts/gpu_wheels.py wheels                                   17 MB
    scripts/gpu_wheels.py wheels --cuda 132 --python 3.13
    scripts/gpu_wheels.py wheels --also peft --also psutil         more packages, at the versions that are tested

It is meant for a machine that has PyTorch with CUDA 13 and its usual company (numpy, numba, accelerate, safetensors,
huggingface-hub, jinja2, psutil, nvidia-ml-py), and lacks bitsandbytes and a recent transformers. bitsandbytes has a
library for each CUDA; only the one named is kept, beside its CPU one. Kernels of the extra `flash` are not gathered, so
attention that is not there already is skipped. On the GPU machine, in the repository:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site scripts/gpu_check
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
PACKAGES = ("transformers", "bitsandbytes")
LIBRARIES = "bitsandbytes/libbitsandbytes_"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
CARRIED = 64 * 2**20


def download(names: list[str], folder: Path, python: str) -> None:
    """Fetch wheels for Linux on x86-64, at the versions of constraints.txt, without what they need."""
    pinned = dict(line.split("==") for line in CONSTRAINTS.read_text().split() if "==" in line)
    wanted = [f"{name}=={pinned[name]}" if name in pinned else name for name in names]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run(
        [*pip, "--implementation", "cp", "--python-version", python, *platforms, "--dest", str(folder), *wanted],
        check=True,
    )


def keep_one_cuda(wheel: Path, output: Path, cuda: str) -> None:
    """Copy a bitsandbytes wheel with the libraries of one CUDA and of the CPU alone."""
    kept = {f"{LIBRARIES}cuda{cuda}.so", f"{LIBRARIES}cpu.so"}
    with zipfile.ZipFile(wheel) as source:
        names = source.namelist()
        if missing := kept.difference(names):
            found = ", ".join(name.removeprefix(LIBRARIES) for name in names if name.startswith(f"{LIBRARIES}cuda"))
            sys.exit(f"gpu_wheels: {wheel.name} has no {missing.pop()}; it has {found}")
        with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as target:
            for name in names:
                if name.endswith(".dist-info/RECORD"):
                    target.writestr(name, "".join(_records(source.read(name).decode(), kept)))
                elif _stays(name, kept):
                    target.writestr(source.getinfo(name), source.read(name))


def _records(record: str, kept: set[str]) -> Iterator[str]:
    return (line for line in record.splitlines(keepends=True) if _stays(line.split(",")[0], kept))


def _stays(name: str, kept: set[str]) -> bool:
    return not name.startswith(LIBRARIES) or name in kept


def main() -> None:
    """Gather wheels, and say how large they are together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a folder that is new or empty")
    parser.add_argument("--python", default="3.12", help="the GPU machine's (default 3.12)")
    parser.add_argument("--cuda", default="130", help="of its PyTorch, without the dot (default 130)")
    parser.add_argument("--also", action="append", default=[], metavar="NAME", help="one more package")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty")
    with TemporaryDirectory() as folder:
        download([*PACKAGES, *arguments.also], Path(folder), arguments.python)
        for wheel in sorted(Path(folder).glob("*.whl")):
            output = arguments.output / wheel.name
            if wheel.name.startswith("bitsandbytes-"):
                keep_one_cuda(wheel, output, arguments.cuda)
            else:
                output.write_bytes(wheel.read_bytes())
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(arguments.output.glob("*.whl"))}
    for name, nbytes in sizes.items():
        print(f"{nbytes / 1e6:6.1f} MB  {name}")
    total = sum(sizes.values())
    print(f"{total / 1e6:6.1f} MB together, {'within' if total <= CARRIED else 'MORE than'} 64 MiB")


if __name__ == "__main__":
    main()
