"""Virtual environments below the scratch folder, one a server, at pinned versions; kept and used again."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from servers.case import ROOT, Missing, Place, environment

CONSTRAINTS = ROOT / "scripts/constraints.txt"
LONGEST = 3600.0  # seconds, for one step of an installation


def make_environment(
    place: Place, name: str, requirements: Sequence[str], without: Sequence[str] = (), **variables: str
) -> Path:
    """Install requirements into an environment of its own and remove what hinders it; returns its python."""
    folder = place.folder(name)
    python, done = folder / "venv/bin/python", folder / "installed.json"
    wanted = {"requirements": [*requirements], "without": [*without]}
    if done.exists() and json.loads(done.read_text()) == wanted:
        return python
    run([sys.executable, "-m", "venv", "--clear", folder / "venv"], folder / "install.log")
    pip = [python, "-m", "pip"]
    run([*pip, "install", "--progress-bar", "off", *requirements], folder / "install.log", **variables)
    if without:
        run([*pip, "uninstall", "--yes", *without], folder / "install.log")
    done.write_text(json.dumps(wanted))
    return python


def add_beside(place: Place, name: str, requirements: Sequence[str]) -> Path:
    """Install requirements into a folder, for PYTHONPATH, at versions that suit the project's own environment."""
    folder = place.folder(name)
    site, done = folder / "site", folder / "installed.json"
    if done.exists() and json.loads(done.read_text()) == [*requirements]:
        return site
    pip = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--upgrade", "--target", site]
    run([*pip, "--constraint", CONSTRAINTS, *requirements], folder / "install.log")
    done.write_text(json.dumps([*requirements]))
    return site


def version_of(python: Path | str, package: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(command: Sequence[object], log: Path, cwd: Path | None = None, **variables: str) -> None:
    """Run a step of an installation, its output kept in log. Raises Missing with its last words."""
    words = [str(word) for word in command]
    with log.open("a") as said:
        said.write(f"\n$ {' '.join(words)}\n")
        said.flush()
        begun = said.tell()
        try:
            code = subprocess.run(
                words, stdout=said, stderr=subprocess.STDOUT, cwd=cwd, env=environment(**variables), timeout=LONGEST,
                check=False,
            ).returncode  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Missing(f"{' '.join(words[:4])}: {error}") from error
    if code:
        raise Missing(f"{' '.join(words[:4])} … ended with {code}: {_last_words(log, begun)}; see {log}")


def _last_words(log: Path, begun: int) -> str:
    """The error that a program closed with."""
    with log.open() as said:
        said.seek(begun)
        lines = [line.strip() for line in said if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1]
