"""ossquant export: the checkpoint in the form that a server loads."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossquant.cli.options import CheckpointArgument, JsonOption
from ossquant.cli.quantize import plan_json, report_json, summary
from ossquant.errors import UsageError
from ossquant.export.target import DENSE, EXPERTS, TARGETS, Target, check_formats, find_target
from ossquant.recipe import Recipe
from ossquant.units import parse_size

if TYPE_CHECKING:
    from ossquant.export.gguf import GgufPlan


def export(
    source: CheckpointArgument,
    output: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    to: Annotated[str, typer.Option(help=f"{', '.join(TARGETS)}.")] = "gguf",
    dense: Annotated[
        str | None, typer.Option(help=f"gguf, ollama: attention, embedding and lm_head in {', '.join(DENSE)}; q8_0.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help=f"gguf, ollama: experts in {', '.join(EXPERTS)}; mxfp4, their own.")
    ] = None,
    split_max_size: Annotated[
        str | None, typer.Option(help="Largest file, such as 5GB; gguf: one file if not given, safetensors: 5GB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the export or checkpoint in OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a checkpoint for a server. Needs neither torch nor a GPU.

    Run the same command again after an interruption: it goes on with what is done.
    """
    target = find_target(to)
    size = parse_size(split_max_size) if split_max_size is not None else None
    if size is not None and size < 1:
        raise UsageError("--split-max-size must be at least 1 byte")
    if output is None and not dry_run:
        raise UsageError("OUTPUT is missing", hint="name the folder to write, or --dry-run to see the plan")
    if output is not None and output.suffix == ".gguf":
        raise UsageError(f"OUTPUT is a folder, {output} looks like a file", hint=f"{output.with_suffix('')}-gguf")
    if target.name == "ollama" and size is not None:
        raise UsageError("--split-max-size: Ollama takes one file", hint="leave it out")
    job = _Job(source, None if dry_run else output, target, size, force, as_json)
    if target.recipe is None:
        check_formats(dense or DENSE[0], experts or EXPERTS[0])
        _gguf(job, dense or DENSE[0], experts or EXPERTS[0])
    elif dense is not None or experts is not None:
        raise UsageError(f"--dense and --experts are for gguf and ollama, not for {to}", hint="leave them out")
    else:
        _safetensors(job, target.recipe)


@dataclass(frozen=True)
class _Job:
    """The arguments that every target has."""

    source: str
    output: Path | None
    target: Target
    size: int | None
    force: bool
    as_json: bool


def _gguf(job: _Job, dense: str, experts: str) -> None:
    from ossquant.checkpoint.manifest import MODELFILE
    from ossquant.checkpoint.reader import open_checkpoint
    from ossquant.cli import render
    from ossquant.export.gguf import GgufPlan, export_gguf, model_name, plan_gguf
    from ossquant.export.gguf_tensors import role_counts
    from ossquant.export.ollama import modelfile

    if job.output is None:
        with open_checkpoint(job.source) as checkpoint:
            planned = plan_gguf(
                checkpoint, model_name(job.source), dense=dense, experts=experts, split_max_size=job.size
            )
        if job.as_json:
            render.print_json(_gguf_json(job, planned) | plan_json(planned.plan, role_counts(planned.plan)))
        else:
            render.print_plan(planned.plan, f"{job.source} as {planned.recipe.name}", role_counts(planned.plan))
            render.print_lines(_files(planned))
        _warn(planned.warnings)
        return

    announced: list[GgufPlan] = []

    def announce(planned: GgufPlan) -> None:
        announced.append(planned)
        for file in _files(planned):
            render.note(file)

    def beside(planned: GgufPlan) -> dict[str, bytes]:
        return {MODELFILE: modelfile(planned.files[0].name)} if job.target.name == "ollama" else {}

    with _resumable(job.output), render.byte_progress(job.target.name) as progress:
        report = export_gguf(
            job.source, job.output, dense=dense, experts=experts, split_max_size=job.size, force=job.force,
            progress=progress, announce=announce, made=beside,
        )  # fmt: skip
    (planned,) = announced
    _warn(planned.warnings)
    if job.as_json:
        render.print_json(report_json(report, planned.recipe, role_counts(planned.plan)) | _gguf_json(job, planned))
    else:
        render.print_line(summary(report))
        render.note(_next(job.target, job.output, planned.files[0].name))


def _safetensors(job: _Job, recipe: Recipe) -> None:
    from ossquant.checkpoint.reader import open_checkpoint
    from ossquant.cli import render
    from ossquant.export import safetensors

    if job.output is None:
        with open_checkpoint(job.source) as checkpoint:
            planned = safetensors.plan_export(checkpoint, job.target, recipe, job.source)
        if job.as_json:
            render.print_json(_about(job, planned.warnings) | plan_json(planned.plan))
        else:
            render.print_plan(planned.plan, f"{job.source} for {job.target.name}")
        _warn(planned.warnings)
        return
    announced: list[safetensors.ExportPlan] = []
    with _resumable(job.output), render.byte_progress(job.target.name) as progress:
        report = safetensors.export(
            job.source, job.output, job.target, recipe, max_shard_size=job.size, force=job.force, progress=progress,
            announce=announced.append,
        )  # fmt: skip
    (planned,) = announced
    _warn(planned.warnings)
    if job.as_json:
        written = sorted(job.output.glob("*.safetensors"))
        files = [{"name": path.name, "bytes": path.stat().st_size} for path in written]
        render.print_json(report_json(report, recipe) | _about(job, planned.warnings) | {"files": files})
    else:
        render.print_line(summary(report))
        render.note(_next(job.target, job.output, ""))


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    from ossquant.cli import render

    try:
        yield
    except KeyboardInterrupt:
        render.note(f"interrupted; the same command goes on from here. {output} is not a checkpoint yet.")
        raise typer.Exit(130) from None


def _files(planned: "GgufPlan") -> list[str]:
    return [f"{file.name}: {file.nbytes:,} bytes" for file in planned.files]


def _warn(warnings: Sequence[str]) -> None:
    from ossquant.cli import render

    for warning in warnings:
        render.note(f"warning: {warning}")


def _about(job: _Job, warnings: Sequence[str]) -> dict[str, Any]:
    return {"source": job.source, "target": job.target.name, "warnings": list(warnings)}


def _gguf_json(job: _Job, planned: "GgufPlan") -> dict[str, Any]:
    files = [{"name": file.name, "bytes": file.nbytes} for file in planned.files]
    return _about(job, planned.warnings) | {"files": files}


def _next(target: Target, output: Path, file: str) -> str:
    """What to type next."""
    folder = shlex.quote(str(output))
    lines = {
        "gguf": f"llama-server -m {shlex.quote(str(output / file))} --host 127.0.0.1",
        "ollama": f"ollama create {shlex.quote(output.resolve().name.lower())} -f {folder}/Modelfile",
        "mxfp4": f"vllm serve {folder} --host 127.0.0.1",
        "vllm-int4": f"vllm serve {folder} --host 127.0.0.1",
        "unsloth": f"in Python: FastLanguageModel.from_pretrained({str(output)!r})",
    }
    return f"for {target.servers}. next: {lines[target.name]}"
