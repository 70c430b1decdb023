"""`ossquant compare` and `ossquant bench --ab` as a user runs them."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import run_cli
from made_documents import HOSTILE, hostile_result, loaded_result
from made_results import result, scenario
from ossquant.bench.result import Result

GATE = '[output_tokens_per_second]\nmax_regression = 0.05\nscenarios = ["concurrency=16"]\n[ttft]\nmax = 0.5\n'


def write(path: Path, made: Result, **changes: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made.to_json() | changes))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pairs in turns, of base, of head that is 10 % slower, and of one that is the same; and a gate."""
    for pair, (first, second) in enumerate(((0, 1), (3, 2), (4, 5))):
        write(tmp_path / "base" / f"{pair}.json", loaded_result(1.0, first))
        write(tmp_path / "slower" / f"{pair}.json", loaded_result(1.1, second))
        write(tmp_path / "same" / f"{pair}.json", loaded_result(1.0, second))
    (tmp_path / "gate.toml").write_text(GATE)
    return tmp_path


@pytest.mark.parametrize(("head", "code", "said"), [("slower", 1, "regressed:"), ("same", 0, "ok:")])
def test_pairs(folder: Path, head: str, code: int, said: str) -> None:
    """Folders of runs in turns give a verdict, its exit code, and a row a gated metric and limit."""
    done = run_cli("compare", folder / "base", folder / head, "--gate", folder / "gate.toml")
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines()[-1].startswith(said)
    assert "gate gate.toml, 3 pairs, intervals of 90 %" in done.stdout
    assert "…" not in done.stdout.replace(" … ", "")  # no cell is cut
    row = next(line for line in done.stdout.splitlines() if line.startswith("output_tokens_per_second"))
    assert row.split()[-1] == said.removesuffix(":")
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith(("base:", "head:", "!")))


def test_json(folder: Path) -> None:
    """One object, nothing else; it is what a report reads."""
    done = run_cli("compare", folder / "base", folder / "slower", "--gate", folder / "gate.toml", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert (found["kind"], found["schema_version"], found["verdict"], found["pairs"]) == (
        "comparison",
        1,
        "regressed",
        3,
    )
    (folder / "c.json").write_text(done.stdout)
    reported = run_cli("report", folder / "c.json")
    assert reported.returncode == 1
    assert reported.stdout.startswith("## Comparison: ❌ regressed")


def test_single_files(folder: Path) -> None:
    """Two single results: differences, the reason why there is no verdict, and 5; a limit that is broken: 1."""
    base, head = folder / "base/0.json", folder / "slower/0.json"
    done = run_cli("compare", base, head)
    assert done.returncode == 5
    assert "! one run a side: no test of a change is possible." in done.stdout
    assert "−9." in done.stdout
    assert done.stdout.splitlines()[-1].startswith("inconclusive:")
    (folder / "gate.toml").write_text("[ttft]\nmax = 0.1\n")
    broken = run_cli("compare", base, head, "--gate", folder / "gate.toml")
    assert broken.returncode == 1
    assert broken.stdout.splitlines()[-1].startswith("failed:")
    (folder / "gate.toml").write_text("[ttft]\nmax = 0.5\n")
    assert run_cli("compare", base, head, "--gate", folder / "gate.toml").returncode == 0


def test_stored_runs_are_not_judged(folder: Path) -> None:
    """Runs that were taken one side after the other end with 5, and it says why."""
    for pair in range(3):
        write(folder / "base" / f"{pair}.json", loaded_result(1.0, pair))
        write(folder / "slower" / f"{pair}.json", loaded_result(1.1, 10 + pair))
    done = run_cli("compare", folder / "base", folder / "slower")
    assert done.returncode == 5
    assert "! the runs were not taken in turns" in done.stdout


def another_version(path: Path) -> str:
    write(path, loaded_result(), schema_version=2)
    return "has schema version 2, this ossquant reads 1"


def another_kind(path: Path) -> str:
    path.write_text('{"kind": "fit"}')
    return "is no result of ossquant bench"


def no_json(path: Path) -> str:
    path.write_text("<html>")
    return "is not JSON"


def missing(path: Path) -> str:
    path.unlink()
    return "No such file"


def a_missing_key(path: Path) -> str:
    raw = loaded_result().to_json()
    del raw["scenarios"][0]["metrics"]["ttft"]["value"]
    path.write_text(json.dumps(raw))
    return "metrics ttft has no 'value'"


@pytest.mark.parametrize("damage", [another_version, another_kind, no_json, missing, a_missing_key])
def test_a_baseline_that_cannot_be_read(folder: Path, damage: Any) -> None:
    """A baseline of another version, another kind, or damaged: one sentence with its name, and 2."""
    said = damage(folder / "base/0.json")
    done = run_cli("compare", folder / "base/0.json", folder / "same/0.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {folder}/base/0.json")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_invalid_and_partial_runs(folder: Path) -> None:
    """A run that is no result ends with 5, its side, scenario and reason in one sentence."""
    write(folder / "bad.json", result(scenario(invalid="8 of 8 requests failed", ttft=0.1)))
    done = run_cli("compare", folder / "bad.json", folder / "same/0.json")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.splitlines()[0] == "error: base: 'single' is no valid run: 8 of 8 requests failed"
    write(folder / "bad.json", loaded_result(), partial=True)
    done = run_cli("compare", folder / "base/0.json", folder / "bad.json")
    assert done.returncode == 5
    assert done.stderr.startswith("error: head: the run was interrupted")


def test_a_wrong_gate(folder: Path) -> None:
    """An unknown key in a gate names the nearest, and ends with 2."""
    (folder / "gate.toml").write_text("[ttft]\nmax_regresion = 0.1\n")
    done = run_cli("compare", folder / "base", folder / "same", "--gate", folder / "gate.toml")
    assert done.returncode == 2
    assert "gate.toml: [ttft]: unknown key 'max_regresion'" in done.stderr
    assert "did you mean 'max_regression'?" in done.stderr


def test_hostile_names(folder: Path) -> None:
    """Names in a result neither steer the terminal nor add lines."""
    made = hostile_result()
    valid = json.loads(json.dumps(made.to_json()))
    valid["scenarios"][0] |= {"valid": True, "invalid": []}
    (folder / "h.json").write_text(json.dumps(valid))
    done = run_cli("compare", folder / "h.json", folder / "h.json")
    assert done.returncode == 5
    assert "\x1b" not in done.stdout + done.stderr
    assert "\u202e" not in done.stdout
    assert HOSTILE[:40] in done.stdout


# prints a result with a throughput of its own; what a bench command is to --ab
PRINTS = "import json, sys; raw = json.load(open(sys.argv[1])); print(json.dumps(raw, indent=2))"


def prints(path: Path) -> str:
    return shlex.join([sys.executable, "-c", PRINTS, str(path)])


def test_ab(folder: Path) -> None:
    """Two commands in turns: each run is told on stderr, kept in the output, and a folder of them compares again."""
    base, head = prints(folder / "base/0.json"), prints(folder / "slower/0.json")
    done = run_cli("bench", "--ab", base, head, "--pairs", "2", "--gate", folder / "gate.toml",
                   "--output", folder / "out", "--json")  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["pairs"], found["base"]["source"]) == ("regressed", 2, base)
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        "pair 1, base", "pair 1, head", "pair 2, head", "pair 2, base"
    ]  # fmt: skip
    kept = sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.json"))
    assert kept == ["base/0001.json", "base/0002.json", "comparison.json", "head/0001.json", "head/0002.json"]
    assert json.loads((folder / "out/comparison.json").read_text()) == found
    again = run_cli("bench", "--ab", base, head, "--output", folder / "out")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


def test_ab_ok(folder: Path) -> None:
    """Two commands that do the same end with 0, and the verdict is the last line."""
    base = prints(folder / "base/0.json")
    done = run_cli("bench", "--ab", base, base, "--pairs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok:")


@pytest.mark.parametrize(
    ("head", "options", "code", "said"),
    [
        ("false", [], 6, "error: head: the command ended with 1"),
        ("nowhere-at-all", [], 6, "error: head: 'nowhere-at-all' cannot be run"),
        ("echo hello", [], 6, "error: head: the command printed no result"),
        ("'", [], 2, "is no command"),
        ("true", ["--max-pairs", "3", "--pairs", "4"], 2, "4 to 3 pairs are no plan"),
        ("true", ["--budget", "-1"], 2, "a budget is seconds above 0"),
        ("true", ["--gate", "nowhere.toml"], 2, "no gate at nowhere.toml"),
        ("true", ["checkpoint"], 2, "either a TARGET or --ab"),
    ],
)
def test_ab_errors(folder: Path, head: str, options: list[str], code: int, said: str) -> None:
    """A command that fails ends with 6, options that cannot be meant with 2; one sentence each."""
    done = run_cli("bench", "--ab", prints(folder / "base/0.json"), head, *options)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--gate", "g.toml"], ["--budget", "3"], ["--max-pairs", "9"]])
def test_options_of_ab_alone(options: list[str]) -> None:
    """What only --ab knows is refused without it."""
    done = run_cli("bench", "http://127.0.0.1:9", *options)
    assert done.returncode == 2
    assert "go with --ab" in done.stderr
