"""mlx-lm's server on a CPU, which shows harmony's markers."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from servers.case import Check, Place
from servers.chat import Manners, ask_all
from servers.dialogue import markers, tiny_dialogues
from servers.exports import export, mxfp4_of_drifted
from servers.install import make_environment, version_of
from servers.process import LOOPBACK, serving

REQUIREMENTS = ("mlx-lm==0.32.0", "mlx[cpu]==0.32.4")  # PyPI, 2026-11-26
WHAT = "words, markers, finish_reason, usage; whole and streamed"


@cache
def _python(place: Place) -> Path:
    return make_environment(place, "mlx-lm", REQUIREMENTS)


def prepare(place: Place) -> str:
    """Install it; returns its version and that of mlx."""
    return f"{version_of(_python(place), 'mlx-lm')}, mlx {version_of(_python(place), 'mlx')}"


def checks(place: Place) -> Iterator[Check]:
    """The published layout, of the published weights and of a bf16 fine-tune."""
    yield Check("mxfp4", WHAT, lambda: _ask(place, export(place, "mxfp4", "--to", "mxfp4")))
    yield Check("mxfp4 of bf16", WHAT, lambda: _ask(place, mxfp4_of_drifted(place)))


def _ask(place: Place, folder: Path) -> dict[str, Any]:
    def command(port: int) -> list[object]:
        return [_python(place), "-m", "mlx_lm", "server", "--model", folder, "--host", LOOPBACK, "--port", port]

    with serving(command, place.folder("logs") / f"mlx-lm-{folder.name}.log") as server:
        return ask_all(server, Manners(markers, model="default_model"), tiny_dialogues())
