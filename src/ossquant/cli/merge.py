"""ossquant merge: add a LoRA adapter to its model, and store the result in a form that is served."""

from pathlib import Path
from typing import Annotated

import typer

from ossquant.cli.options import CheckpointArgument, JsonOption
from ossquant.cli.quantize import report_json, summary
from ossquant.errors import UsageError
from ossquant.recipe import BUILT_IN, built_in
from ossquant.units import parse_size

DEFAULT_SCHEME = "mxfp4"
FAINT = 0.5  # a share of the adapter below which most of it is gone


def merge(
    source: CheckpointArgument,
    adapter: Annotated[Path, typer.Argument(help="The folder of a LoRA adapter, as peft saves it.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    scheme: Annotated[str, typer.Option(help=f"What to store it as: {', '.join(BUILT_IN)}.")] = DEFAULT_SCHEME,
    max_shard_size: Annotated[str, typer.Option(help="Largest file, such as 5GB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the checkpoint in OUTPUT.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a LoRA adapter to its model and store the result. Needs neither torch nor a GPU.

    CHECKPOINT is the published or bf16 one, also for an adapter that was trained on NF4. Run the same command again
    after an interruption: it goes on with the files that are done.
    """
    recipe = built_in(scheme)
    shard_size = parse_size(max_shard_size)
    if shard_size < 1:
        raise UsageError("--max-shard-size must be at least 1 byte")
    from ossquant import merge as merger  # numba takes a moment that a wrong option need not wait
    from ossquant.cli import render

    try:
        with render.byte_progress(f"merge to {recipe.name}") as progress:
            report = merger.merge(
                source, adapter, output, recipe, max_shard_size=shard_size, force=force, progress=progress
            )
    except KeyboardInterrupt:
        render.note(f"interrupted; the same command goes on from here. {output} is not a checkpoint yet.")
        raise typer.Exit(130) from None
    kept = {role.value: round(share, 4) for role, share in report.kept.items()}
    if as_json:
        render.print_json(report_json(report.quantize, recipe) | {"adapter_kept": kept})
    else:
        left = ", ".join(f"{share:.0%} in the {role}" for role, share in kept.items())
        render.out.print(f"{summary(report.quantize)}; of the adapter is left: {left}", soft_wrap=True)
    lost = [role for role, share in kept.items() if share < FAINT]
    if lost:
        advice = "" if recipe.name == "bf16" else "; --scheme bf16 keeps more of it"
        render.note(
            f"warning: most of what the adapter adds to the {' and '.join(lost)} is less than half a step of "
            f"{recipe.name} and is rounded away{advice}"
        )
