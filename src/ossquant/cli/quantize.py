"""ossquant quantize: make the 4-bit checkpoint."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ossquant.cli.options import CheckpointArgument, JsonOption
from ossquant.errors import UsageError
from ossquant.layout import Role
from ossquant.recipe import BUILT_IN, Recipe, built_in, load_recipe
from ossquant.units import count, parse_size, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ossquant.checkpoint.reader import Checkpoint
    from ossquant.plan import Plan
    from ossquant.quantize import QuantizeReport

DEFAULT_SCHEME = "hybrid"
FOR_UNSLOTH = (
    "this layout is for unsloth and ossquant. Stock transformers opens it without an error and fills the experts with "
    "random numbers; without --to-unsloth it would refuse."
)


def quantize(
    source: CheckpointArgument,
    output: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    scheme: Annotated[str | None, typer.Option(help=f"{', '.join(BUILT_IN)}; {DEFAULT_SCHEME} if not given.")] = None,
    recipe_file: Annotated[Path | None, typer.Option("--recipe", help="A TOML recipe in place of a scheme.")] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="nf4 and fp4: absmax in 8 bits, or fp32."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint in OUTPUT.")] = False,
    to_unsloth: Annotated[
        bool, typer.Option("--to-unsloth", help="nf4 under the names of unsloth's 4-bit checkpoints, for unsloth.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run on a Ray cluster over a shared disk: auto, or HOST:PORT."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a 4-bit checkpoint. Needs neither torch nor a GPU.

    Run the same command again after an interruption: it goes on with the files that are done.
    """
    recipe = _recipe(scheme, recipe_file, double_quant)
    recipe = recipe.for_unsloth() if to_unsloth else recipe
    shard_size = parse_size(max_shard_size)
    if shard_size < 1:
        raise UsageError("--max-shard-size must be at least 1 byte")
    if dry_run:
        _print_plan(source, recipe, as_json)
    elif output is None:
        raise UsageError("OUTPUT is missing", hint="name the folder to write, or --dry-run to see the plan")
    else:
        _write(source, output, recipe, shard_size, force, ray, as_json)


def _recipe(scheme: str | None, recipe_file: Path | None, double_quant: bool | None) -> Recipe:
    if scheme and recipe_file:
        raise UsageError("--scheme and --recipe exclude each other", hint="give one of them")
    recipe = load_recipe(recipe_file) if recipe_file else built_in(scheme or DEFAULT_SCHEME)
    return recipe if double_quant is None else recipe.with_double_quant(double_quant)


def _print_plan(source: str, recipe: Recipe, as_json: bool) -> None:
    from ossquant.checkpoint.reader import open_checkpoint
    from ossquant.cli import render
    from ossquant.quantize import plan_quantize

    with open_checkpoint(source) as checkpoint:
        plan = plan_quantize(checkpoint, recipe)
        if as_json:
            render.print_json({"source": source, "scheme": recipe.name, **plan_json(plan)})
            return
        render.note(_costs(checkpoint, recipe))
        if recipe.unsloth:
            render.note(f"warning: {FOR_UNSLOTH}")
    render.print_plan(plan, f"{source} as {recipe.name}")


def _write(
    source: str, output: Path, recipe: Recipe, shard_size: int, force: bool, ray: str | None, as_json: bool
) -> None:
    from ossquant.checkpoint.reader import open_checkpoint
    from ossquant.cli import render

    with open_checkpoint(source) as checkpoint:
        render.note(_costs(checkpoint, recipe))
    write_quantized = _quantizer(ray)
    try:
        with render.byte_progress(recipe.name) as progress:
            report = write_quantized(source, output, recipe, max_shard_size=shard_size, force=force, progress=progress)
    except KeyboardInterrupt:
        render.note(f"interrupted; the same command goes on from here. {output} is not a checkpoint yet.")
        raise typer.Exit(130) from None
    if recipe.unsloth:
        render.note(f"warning: {FOR_UNSLOTH}")
    if as_json:
        render.print_json(report_json(report, recipe))
    else:
        render.print_line(summary(report))


def _quantizer(ray: str | None) -> "Callable[..., QuantizeReport]":
    """What does the work; loaded late, for numba takes a moment that a wrong SOURCE need not wait."""
    if ray is None:
        from ossquant.quantize import quantize as here

        return here
    from ossquant.quantize_ray import quantize_on_ray

    return partial(quantize_on_ray, ray)


def _costs(checkpoint: "Checkpoint", recipe: Recipe) -> str:
    """One line: why this scheme, and what each one costs on this model."""
    from ossquant.plan import make_plan

    plans = [(each, make_plan(checkpoint.spec, each)) for each in BUILT_IN.values()]
    costs = ", ".join(f"{each.name} {size(plan.nbytes)} ({each.loss})" for each, plan in plans)
    rounded = checkpoint.plan.scheme(Role.EXPERTS).format == "bf16" and recipe.scheme(Role.EXPERTS).format == "mxfp4"
    warning = (
        " The experts are bf16 here and are rounded to MXFP4: exact only if they were MXFP4 before." if rounded else ""
    )
    return f"{recipe.name}: {recipe.why}. Stored now: {size(checkpoint.plan.nbytes)}; would be: {costs}.{warning}"


def summary(report: "QuantizeReport") -> str:
    """One line: what was made, in what time, and what rounding lost."""
    result = report.result
    resumed = ", resumed" if report.resumed else ""
    return (
        f"{report.output}: {size(result.nbytes)} in {report.files} file{'s' * (report.files > 1)}, "
        f"{count(result.parameters_4bit)} of {count(result.parameters)} parameters in 4 bits; "
        f"{report.seconds:.1f} s, {size(report.bytes_per_second)}/s of source{resumed}{_rounding(report.mxfp4_error)}"
    )


def _rounding(error: float | None) -> str:
    if error is None:
        return ""
    lost = f"a relative error of {error:.4f}" if error else "no error: they were MXFP4 values"
    return f"; experts rounded to MXFP4 with {lost}"


def plan_json(plan: "Plan", counts: "Mapping[Role, int] | None" = None) -> dict[str, Any]:
    """What a plan holds, by role; counts are its tensors in a file that does not have the plan's own."""
    roles = {
        total.role.value: {
            "format": total.scheme.format,
            "tensors": counts[total.role] if counts else total.tensors,
            "parameters": total.parameters,
            "bits_per_weight": round(total.bits_per_weight, 4),
            "bytes": total.nbytes,
        }
        for total in plan.by_role()
    }
    return {
        "parameters": plan.parameters,
        "parameters_4bit": plan.parameters_4bit,
        "bytes": plan.nbytes,
        "roles": roles,
    }


def report_json(report: "QuantizeReport", recipe: Recipe, counts: "Mapping[Role, int] | None" = None) -> dict[str, Any]:
    """What was made, for --json."""
    return {
        "output": str(report.output),
        "scheme": recipe.name,
        "files": report.files,
        "resumed": report.resumed,
        "source_bytes": report.source.nbytes,
        "seconds": round(report.seconds, 3),
        "cpu_seconds": round(report.cpu_seconds, 3),
        "mxfp4_error": report.mxfp4_error,
        **plan_json(report.result, counts),
    }
