"""llama.cpp, built from the source that llama-cpp-python's sdist brings, and that package on top of it."""

import os
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

from servers.case import Missing, Place
from servers.install import make_environment, run

VERSION = "0.3.36"  # llama-cpp-python, PyPI, 2026-11-26
NAME = f"llama_cpp_python-{VERSION}"
TARGETS = ("llama-server",)
OPTIONS = ("LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "BUILD_SHARED_LIBS=ON", "LLAMA_BUILD_TESTS=OFF",
           "LLAMA_BUILD_EXAMPLES=OFF")  # fmt: skip


@cache
def source(place: Place) -> Path:
    """The unpacked source of llama.cpp."""
    folder = place.folder("llama.cpp")
    vendored = folder / NAME / "vendor/llama.cpp"
    if not vendored.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        run([*pip, "--dest", folder, f"llama-cpp-python=={VERSION}"], folder / "install.log")
        with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return vendored


@cache
def binaries(place: Place) -> Path:
    """The folder of llama.cpp's programs and libraries; building them takes some minutes."""
    tree, build, log = source(place), place.folder("llama.cpp") / "build", place.folder("llama.cpp") / "install.log"
    if not all((build / "bin" / target).exists() for target in TARGETS):
        run(["cmake", "-S", tree, "-B", build, *(f"-D{option}" for option in OPTIONS)], log)
        run(["cmake", "--build", build, "--parallel", os.cpu_count() or 1, "--target", *TARGETS], log)
    return build / "bin"


@cache
def version(place: Place) -> str:
    """What llama-server calls itself; the sdist has no git history, so the commit that it prints says nothing."""
    said = subprocess.run([binaries(place) / "llama-server", "--version"], capture_output=True, text=True, check=False)
    words = (said.stdout + said.stderr).partition("version: ")[2].split()
    if not words:
        raise Missing(f"llama-server --version says {said.stdout + said.stderr!r}")
    return f"{words[0]} of {NAME}"


@cache
def python(place: Place) -> Path:
    """The python of an environment with llama-cpp-python, which needs LLAMA_CPP_LIB_PATH to find the libraries."""
    requirements = (f"llama-cpp-python[server]=={VERSION}", "--no-binary", "llama-cpp-python")
    return make_environment(place, "llama-cpp-python", requirements, CMAKE_ARGS="-DLLAMA_BUILD=OFF")


def libraries(place: Place) -> dict[str, str]:
    """The variable that says where llama-cpp-python finds llama.cpp."""
    return {"LLAMA_CPP_LIB_PATH": str(binaries(place))}
