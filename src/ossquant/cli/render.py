"""How things look in a terminal; the one module that knows rich."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ossquant.layout import Role
from ossquant.plan import Plan
from ossquant.units import count, size, size_both

if TYPE_CHECKING:
    from ossquant.jobs import Progress as ProgressCallback

NARROWEST = 80  # below it the terminal may wrap lines, but no figure is cut


def _console(stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.width = max(NARROWEST, console.width)
    return console


out, err = _console(stderr=False), _console(stderr=True)


def print_json(value: Any) -> None:
    """Print one object, and nothing else, on stdout."""
    out.file.write(json.dumps(value, indent=2) + "\n")


def note(text: str) -> None:
    """Say a line on stderr."""
    err.print(text, soft_wrap=True)


VERDICT_STYLES = {
    "fits": "green", "tight": "yellow", "offload": "cyan", "no": "red",
    "ok": "green", "regressed": "red", "failed": "red", "inconclusive": "yellow",
}  # fmt: skip


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    total: Sequence[str] = (),
    texts: int = 1,
    dense: bool = False,
) -> None:
    """Print a plain table on stdout: the first columns (texts of them) are text, the others are figures.

    dense leaves one space between columns.
    """
    result = Table(
        box=None, pad_edge=False, padding=(0, 1), collapse_padding=dense, show_footer=bool(total),
        show_header=any(columns),
    )  # fmt: skip
    for index, column in enumerate(columns):
        footer = total[index] if total else ""
        result.add_column(Text(column), Text(footer), justify="left" if index < texts else "right", no_wrap=True)
    for row in rows:
        result.add_row(*(Text(cell, VERDICT_STYLES.get(cell.partition(" ")[0], "")) for cell in row))
    with out.capture() as captured:
        out.print(title)
        out.print(result)
    # rich fills lines with blanks
    out.file.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def width() -> int:
    """Columns of the terminal."""
    return out.width


def print_line(text: str) -> None:
    """Print a line on stdout, unbroken, to be copied."""
    out.print(text, soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines on stdout."""
    for line in lines:
        print_line(line)


def bar(part: float, width: int) -> str:
    """Draw a share as a bar; what is above the whole fills it and adds a plus."""
    full, empty = ("█", "░") if out.encoding.lower().startswith("utf") else ("#", ".")
    filled = min(width, max(0, round(part * width)))
    return (full * filled + empty * (width - filled))[: width - (part > 1)] + "+" * (part > 1)


def print_plan(plan: Plan, title: str, counts: Mapping[Role, int] | None = None) -> None:
    """Print a plan by role; counts are its tensors in a file that does not have the plan's own."""
    counts = counts or {total.role: total.tensors for total in plan.by_role()}
    rows = [
        [total.role, total.scheme.format, f"{counts[total.role]:,}", count(total.parameters),
         f"{total.bits_per_weight:.3f}", size(total.nbytes)]
        for total in plan.by_role()
    ]  # fmt: skip
    bits = 8 * plan.nbytes / plan.parameters
    print_table(
        title,
        ("role", "format", "tensors", "parameters", "bits/weight", "bytes"),
        rows,
        ("total", "", f"{sum(counts.values()):,}", count(plan.parameters), f"{bits:.3f}", size_both(plan.nbytes)),
    )


@contextmanager
def byte_progress(what: str) -> Iterator["ProgressCallback"]:
    """A bar on stderr with bytes, rate and time left; silent where stderr is not a terminal."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=err, disable=not err.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Bars on stderr, one at a time: called with what begins, it gives what to call with done and total."""
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   console=err, transient=True, disable=not err.is_terminal)  # fmt: skip

    def begin(what: str) -> Callable[[int, int], None]:
        for task in bar.task_ids:
            bar.remove_task(task)
        task = bar.add_task(what, total=None)
        return lambda done, total: bar.update(task, completed=done, total=total)

    with bar:
        yield begin


@contextmanager
def load_progress() -> Iterator[Callable[[str, int, int, int, int, int], None]]:
    """One line on stderr for the load of a scenario: requests done, in flight, failed, chunks a second."""
    line = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"), console=err, transient=True, disable=not err.is_terminal,
        auto_refresh=False,  # a thread of its own would hold up the streams' clock
    )  # fmt: skip
    last = ("", 0.0, 0)

    def tell(name: str, done: int, total: int, in_flight: int, failed: int, pieces: int) -> None:
        nonlocal last
        now = line.get_time()
        rate = (pieces - last[2]) / (now - last[1]) if last[0] == name and now > last[1] else 0.0
        last = (name, now, pieces)
        said = f"{in_flight} in flight, {rate:.0f} chunks/s" + (f", {failed} failed" if failed else "")
        if name not in [task.description for task in line.tasks]:
            for task in line.task_ids:
                line.remove_task(task)
            line.add_task(name, total=total, said=said)
        line.update(line.task_ids[0], completed=done, total=total, said=said, refresh=True)

    with line:
        yield tell
