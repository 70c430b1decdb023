"""ossquant bench --ab: two commands in turns, until it is decided which is slower."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ossquant.cli.compare import VERDICT_CODES, load_asked
from ossquant.errors import UsageError

if TYPE_CHECKING:
    from ossquant.bench.ab import OnRun
    from ossquant.bench.result import Result

AbOption = Annotated[
    tuple[str, str] | None,
    typer.Option("--ab", metavar="CMD_A CMD_B", help="Instead of a TARGET: two commands, base and head."),
]
PairsOption = Annotated[int, typer.Option(min=2, help="Pairs of runs of --ab up to the first look.")]
MaxPairsOption = Annotated[int | None, typer.Option(help="Pairs in all, if it is not decided before; 12, or --pairs.")]
BudgetOption = Annotated[float | None, typer.Option(help="Seconds after which --ab begins no further pair.")]


def bench_ab(
    commands: tuple[str, str],
    *,
    pairs: int,
    max_pairs: int | None,
    budget: float | None,
    gate: Path | None,
    output: Path | None,
    as_json: bool,
) -> NoReturn:
    """Run, judge, print, and leave with the verdict's code; output keeps every result, and the comparison."""
    from ossquant.bench.ab import Budget, compare_commands
    from ossquant.cli import render

    plan = Budget(pairs, max(pairs, Budget.max_pairs) if max_pairs is None else max_pairs, budget)
    asked = load_asked(gate)
    found = compare_commands(*commands, asked, plan, _keeper(output))
    if output:
        _write(output / "comparison.json", found.to_json())
    if as_json:
        render.print_json(found.to_json())
    else:
        from ossquant.cli.compare_view import print_comparison

        print_comparison(found)
    raise typer.Exit(VERDICT_CODES[found.verdict])


def _keeper(output: Path | None) -> "OnRun":
    """What says of each run how it went, and keeps its result."""
    from ossquant.bench.words import figure
    from ossquant.cli import render

    if output and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", hint="give a new folder")

    def on_run(side: str, pair: int, result: "Result") -> None:
        metrics = result.scenarios[0].metrics if result.scenarios else {}
        shown = [f"{name} {figure(each.value, each.unit)}" for name, each in metrics.items()
                 if name in ("ttft", "output_tokens_per_second")]  # fmt: skip
        render.note(f"pair {pair + 1}, {side}: {', '.join(shown)}")
        if output:
            _write(output / side / f"{pair + 1:04}.json", result.to_json())

    return on_run


def _write(path: Path, value: object) -> None:
    from ossquant.files import write_whole

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(value, indent=2).encode() + b"\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="--output takes a folder you may write") from error
