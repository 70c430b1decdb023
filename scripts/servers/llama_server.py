"""llama-server, which parses harmony: three GGUF exports, and the file that Ollama's Modelfile names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from servers import llama_build
from servers.case import Check, Fault, Place, demand
from servers.chat import Manners, ask_all
from servers.dialogue import channels, tiny_dialogues
from servers.exports import export, gguf_of
from servers.process import LOOPBACK, serving

WHAT = "words, channels, finish_reason, usage; whole and streamed"
EXPORTS = {"gguf": ("--to", "gguf"), "gguf, bf16 dense": ("--to", "gguf", "--dense", "bf16")}


def prepare(place: Place) -> str:
    """Build it; returns its version."""
    return llama_build.version(place)


def checks(place: Place) -> Iterator[Check]:
    """One check for each export, and Ollama's."""
    for number, (name, options) in enumerate(EXPORTS.items()):
        folder = f"llama-{number}"
        yield Check(name, WHAT, lambda folder=folder, options=options: _ask(place, export(place, folder, *options)))
    yield Check("ollama", f"Modelfile's FROM is the file loaded; {WHAT}", lambda: _ask_ollama(place))


def _ask(place: Place, folder: Path) -> dict[str, Any]:
    file = gguf_of(folder)
    program = llama_build.binaries(place) / "llama-server"
    options = ["--ctx-size", 2048, "--parallel", 1, "--threads", 1]

    def command(port: int) -> list[object]:
        return [program, "--model", file, "--host", LOOPBACK, "--port", port, *options]

    with serving(command, place.folder("logs") / f"llama-server-{folder.name}.log") as server:
        return {"file": file.name, "bytes": file.stat().st_size} | ask_all(server, Manners(channels), tiny_dialogues())


def _ask_ollama(place: Place) -> dict[str, Any]:
    folder = export(place, "ollama", "--to", "ollama")
    lines = (folder / "Modelfile").read_text("utf-8").splitlines()
    named = [line.split(maxsplit=1)[1] for line in lines if line.upper().startswith("FROM ")]
    if len(named) != 1:
        raise Fault(f"Modelfile has {len(named)} FROM lines")
    found = (folder / named[0]).resolve()
    demand(found == gguf_of(folder).resolve(), f"Modelfile's FROM {named[0]} is not {gguf_of(folder).name}")
    return _ask(place, folder) | {"from": named[0]}
