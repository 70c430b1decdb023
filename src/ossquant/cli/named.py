"""What users name: a model, a machine."""

from dataclasses import dataclass, replace
from pathlib import Path

from ossquant.engine import Engine
from ossquant.errors import UsageError
from ossquant.fit import FORMATS
from ossquant.hardware import MAX_COUNT, Machine
from ossquant.plan import Plan, make_plan
from ossquant.spec import ModelSpec
from ossquant.units import parse_size

PUBLISHED = {"20b": "20b", "120b": "120b", "openai/gpt-oss-20b": "20b", "openai/gpt-oss-120b": "120b"}
_PUBLISHED_GGUF = {f"ggml-org/gpt-oss-{size}-GGUF": size for size in ("20b", "120b")}


@dataclass(frozen=True)
class NamedModel:
    """A model by what it is called, and how it is stored: None for the published ones, which are in every form.

    path is the file that a server is given, where the name does not say it; modelfile says whether Ollama's lies
    beside it.
    """

    name: str
    spec: ModelSpec
    stored: Plan | None = None
    path: str = ""
    modelfile: bool = False

    def serves(self, engine: Engine) -> bool:
        """Whether all that an engine's server is given is there: Ollama takes a GGUF by its Modelfile."""
        return engine.name != "ollama" or not self.path or self.modelfile


def named_model(which: str) -> NamedModel:
    """Find `20b`, a hub id, a checkpoint folder or a GGUF of ours; of weights only headers are read.

    Raises UsageError, CheckpointError.
    """
    if not which.strip():
        raise UsageError("the model's name is empty", hint="20b, 120b, a checkpoint folder or a hub id")
    if which in PUBLISHED:
        return NamedModel(PUBLISHED[which], ModelSpec.published(PUBLISHED[which]))
    if which in _PUBLISHED_GGUF:
        spec = ModelSpec.published(_PUBLISHED_GGUF[which])
        return NamedModel(_PUBLISHED_GGUF[which], spec, make_plan(spec, FORMATS["gguf-q8"]))
    from ossquant.checkpoint.gguf_export import read_gguf_export
    from ossquant.checkpoint.remote import read_headers

    if export := read_gguf_export(which):
        folder = which if Path(which).is_dir() else str(export.first.parent)
        return NamedModel(folder, export.spec, export.plan, str(export.first), export.modelfile is not None)
    return NamedModel(which, *read_headers(which))


def no_modelfile(named: NamedModel) -> UsageError:
    """Say that Ollama's recipe is missing, and what writes it."""
    return UsageError(
        f"{named.name}: no Modelfile for Ollama", hint="ossquant export … --to ollama writes one; or --engine llama.cpp"
    )


def sized(machine: Machine, gpus: int, host_memory: str | None) -> Machine:
    """The machine with a number of devices, and with host memory that is known better. Raises UsageError."""
    if not 1 <= gpus <= MAX_COUNT:
        raise UsageError(f"--gpus {gpus}", hint=f"1 to {MAX_COUNT}")
    if gpus > 1 and machine.count > 1:
        raise UsageError(f"--gpus {gpus} of {machine.count} x {machine.device.name}", hint="say the number once")
    host = parse_size(host_memory) if host_memory is not None else machine.host_memory
    return replace(machine, count=machine.count * gpus, host_memory=host)
