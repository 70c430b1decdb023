"""Engine: a server or library that runs models, and its version."""

import re
from dataclasses import dataclass

from ossquant.errors import UsageError
from ossquant.units import nearest

LOOPBACK = "127.0.0.1"  # where every server listens unless told otherwise
ENGINES = ("transformers", "vllm", "llama.cpp", "ollama", "mlx")


@dataclass(frozen=True)
class Engine:
    """A server or library that runs models; version as it counts them, llama.cpp's build number as (build,)."""

    name: str
    version: tuple[int, ...] | None = None

    @property
    def offloads_experts(self) -> bool:
        """Whether it can keep experts of some layers in host memory."""
        return self.name in ("llama.cpp", "transformers")


def parse_engine(name: str, version: str | None = None) -> Engine:
    """Read an engine's name and version: ('llama.cpp', 'b8164'), ('vllm', '0.11.0'). Raises UsageError."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine '{name}'", hint=nearest(name, ENGINES))
    if version is None:
        return Engine(name)
    if not re.fullmatch(r"[bv]?\d{1,6}(\.\d{1,6}){0,3}([.+-]?[a-z][\w.+-]{0,60})?", version):
        raise UsageError(f"'{version}' is no version of {name}", hint="write it like 0.11.0, or b8164 for llama.cpp")
    return Engine(name, tuple(int(part) for part in re.findall(r"\d+", version)[:3]))
