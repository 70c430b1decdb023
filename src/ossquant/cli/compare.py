"""ossquant compare: runs of one thing beside runs of another, and a verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossquant.cli.options import GateOption, JsonOption

if TYPE_CHECKING:
    from ossquant.bench.comparison import Verdict
    from ossquant.bench.gate import Gate

VERDICT_CODES: "dict[Verdict, int]" = {"ok": 0, "regressed": 1, "failed": 1, "inconclusive": 5}


def compare(
    base: Annotated[Path, typer.Argument(help="A result.json, or a folder of them, paired by the order of names.")],
    head: Annotated[Path, typer.Argument(help="The same, of what is to be judged.")],
    gate: GateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge results of head beside results of base.

    A change is judged by pairs of runs that were taken in turns, as `bench --ab` takes them: the interval of the mean
    log ratio by Student's t. regressed: shown to be worse than max_regression allows, by Holm's method over all that
    is gated; ok: shown to be no worse, all of it; else inconclusive. One file a side shows the differences and
    applies absolute limits, but no test of a change is possible.

    Exit codes: 0 ok, 1 regressed or a limit not kept, 5 inconclusive or an invalid run.
    """
    from ossquant.bench.compare import compare as judge
    from ossquant.bench.documents import load_runs
    from ossquant.bench.runs import taken_in_turns
    from ossquant.cli import render

    asked = load_asked(gate)
    one, other = load_runs(base, "base"), load_runs(head, "head")
    found = judge(one, other, asked, in_turns=taken_in_turns(one.results, other.results))
    if as_json:
        render.print_json(found.to_json())
    else:
        from ossquant.cli.compare_view import print_comparison

        print_comparison(found)
    raise typer.Exit(VERDICT_CODES[found.verdict])


def load_asked(path: Path | None) -> "Gate":
    """The gate of a file, or the one for those who give none."""
    from ossquant.bench.gate import DEFAULT, load_gate

    return DEFAULT if path is None else load_gate(path)
