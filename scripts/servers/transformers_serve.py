"""transformers serve, of the project's own environment; it parses no harmony and leaves the markers out."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from servers.case import Check, Place
from servers.chat import Manners, ask_all
from servers.dialogue import bare, tiny_dialogues
from servers.exports import export, mxfp4_of_drifted
from servers.install import add_beside, version_of
from servers.process import LOOPBACK, serving

WHAT = "words of both channels, finish_reason, usage; whole and streamed"
# what transformers' extra `serving` adds to what the project has; PyPI, 2026-11-26
REQUIREMENTS = ("fastapi==0.165.0", "uvicorn==0.54.0", "openai==3.57.0")


def prepare(place: Place) -> str:
    """Install what `serve` needs beside transformers; returns transformers' version."""
    add_beside(place, "transformers", REQUIREMENTS)
    return version_of(sys.executable, "transformers")


def checks(place: Place) -> Iterator[Check]:
    """The published layout, of the published weights and of a bf16 fine-tune."""
    yield Check("mxfp4", WHAT, lambda: _ask(place, export(place, "mxfp4", "--to", "mxfp4")))
    yield Check("mxfp4 of bf16", WHAT, lambda: _ask(place, mxfp4_of_drifted(place)))


def _ask(place: Place, folder: Path) -> dict[str, Any]:
    site = add_beside(place, "transformers", REQUIREMENTS)
    command = partial(_command, Path(sys.executable).parent / "transformers", folder)
    log = place.folder("logs") / f"transformers-{folder.name}.log"
    with serving(command, log, PYTHONPATH=str(site)) as server:
        return ask_all(server, Manners(bare, model=str(folder), says_done=False), tiny_dialogues())


def _command(program: Path, folder: Path, port: int) -> list[object]:
    return [program, "serve", folder, "--host", LOOPBACK, "--port", port, "--device", "cpu", "--dtype", "bfloat16"]
