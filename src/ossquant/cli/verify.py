"""ossquant verify: is a checkpoint whole, and how far is it from its source."""

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossquant.cli.options import CheckpointArgument, JsonOption
from ossquant.errors import UsageError
from ossquant.units import size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ossquant.codec.expand import Distance
    from ossquant.layout import Role
    from ossquant.plan import Plan
    from ossquant.verify import Comparison, VerifyReport

NOT_WHOLE = 3  # as for any other bad checkpoint
FAULTS_SHOWN = 20


def verify(
    checkpoint: CheckpointArgument,
    against: Annotated[
        str | None, typer.Option(help="The checkpoint it was made of: measure how far the weights are from it.")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst tensors to list.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Check that a checkpoint is whole; with --against, measure its error. Exit code 3 if it is not whole."""
    from ossquant.checkpoint.gguf_export import read_gguf_export
    from ossquant.cli import render

    export = read_gguf_export(checkpoint)
    if export and against is not None:
        raise UsageError("--against measures safetensors, not GGUF", hint="leave it out, or verify what it was made of")
    with render.byte_progress("verify") as progress:
        if export:
            from ossquant.export.gguf_tensors import role_counts
            from ossquant.export.verify_gguf import verify_gguf

            report, counts = verify_gguf(export, progress), role_counts(export.plan)
        else:
            from ossquant.verify import verify as verify_checkpoint

            report, counts = verify_checkpoint(checkpoint, against, progress), None
    if as_json:
        render.print_json(_report_json(report, checkpoint, against, worst))
    else:
        _print(report, checkpoint, worst, counts)
    if not report.whole:
        raise typer.Exit(NOT_WHOLE)


def _print(report: "VerifyReport", checkpoint: str, worst: int, counts: "Mapping[Role, int] | None") -> None:
    from ossquant.cli import render

    if report.comparison:
        _print_errors(report.plan, report.comparison, checkpoint, worst)
    else:
        render.print_plan(report.plan, checkpoint, counts)
    if report.manifest:
        made = report.manifest
        render.print_line(f"made of {made.source.name} by recipe {made.recipe}, ossquant {made.ossquant}")
    for fault in report.faults[:FAULTS_SHOWN]:
        tensor = f"'{fault.tensor}' " if fault.tensor else ""
        render.print_line(f"{fault.file}: {tensor}{fault.kind}")
    if len(report.faults) > FAULTS_SHOWN:
        render.print_line(f"… and {len(report.faults) - FAULTS_SHOWN} more")
    render.print_line(_verdict(report))


def _verdict(report: "VerifyReport") -> str:
    if report.manifest is None:
        return f"whole by its headers: {report.stored} tensors; no manifest, so no hash is checked"
    hashes = (
        f"{report.stored} tensors, {report.hashes_agree} hashes agree; "
        f"{len(report.manifest.side_files)} files beside them, {report.side_files_agree} agree"
    )
    if report.whole:
        return f"whole: {hashes}"
    return f"not whole: {hashes}; {_cure(report)}"


def _cure(report: "VerifyReport") -> str:
    added = sorted({fault.file for fault in report.faults if not fault.tensor and fault.kind == "not in the manifest"})
    if added:
        return f"remove what was added: {', '.join(added[:3])}"
    files = ", ".join(sorted({fault.file for fault in report.faults})[:3])
    if any(fault.tensor for fault in report.faults):
        return f"fetch or make again: {files}"
    return f"fetch again: {files}; or, if you changed it on purpose, change it in the source and quantize again"


def _print_errors(plan: "Plan", comparison: "Comparison", title: str, worst: int) -> None:
    from ossquant.cli import render

    rows = []
    for total in plan.by_role():
        error = comparison.roles[total.role]
        rows.append([total.role, total.scheme.format, comparison.source.scheme(total.role).format,
                     f"{total.bits_per_weight:.3f}", size(total.nbytes), *_figures(error)])  # fmt: skip
    columns = ("role", "format", "source", "bits/weight", "bytes", "relative error", "max error")
    bits = 8 * plan.nbytes / plan.parameters
    total_row = ("total", "", "", f"{bits:.3f}", size(plan.nbytes), "", "")
    render.print_table(title, columns, rows, total_row, texts=3)
    off = [(tensor.name, *_figures(error)) for tensor, error in comparison.tensors[:worst] if error.squares]
    if off:
        render.print_table("worst tensors", ("tensor", "relative error", "max error"), off)


def _figures(error: "Distance") -> tuple[str, str]:
    return (f"{error.relative:.5f}", f"{error.largest:.4g}") if error.squares else ("exact", "0")


def _report_json(report: "VerifyReport", checkpoint: str, against: str | None, worst: int) -> dict[str, Any]:
    made = report.manifest
    result: dict[str, Any] = {
        "checkpoint": checkpoint,
        "whole": report.whole,
        "tensors": report.stored,
        "bytes": report.plan.nbytes,
        "manifest": made and {"source": made.source.name, "recipe": made.recipe, "ossquant": made.ossquant},
        "hashes_agree": report.hashes_agree,
        "side_files": len(made.side_files) if made else 0,
        "side_files_agree": report.side_files_agree,
        "faults": [{"tensor": f.tensor, "file": f.file, "kind": f.kind} for f in report.faults],
        "roles": {
            total.role.value: {"format": total.scheme.format, "bits_per_weight": round(total.bits_per_weight, 4)}
            for total in report.plan.by_role()
        },
        "seconds": round(report.seconds, 3),
    }
    if report.comparison:
        result["against"] = against
        for role, error in report.comparison.roles.items():
            result["roles"][role.value] |= _error_json(error)
        result["worst"] = [
            {"tensor": tensor.name, **_error_json(error)} for tensor, error in report.comparison.tensors[:worst]
        ]
    return result


def _error_json(error: "Distance") -> dict[str, Any]:
    """Null stands for an error relative to weights that are all zero."""
    relative = error.relative if math.isfinite(error.relative) else None
    return {"relative_error": relative, "max_error": error.largest}
