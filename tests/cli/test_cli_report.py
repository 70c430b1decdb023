"""`ossquant report` as a user runs it."""

import json
from pathlib import Path
from xml.etree.ElementTree import parse

import pytest

from conftest import run_cli
from made_documents import comparison, hostile_result, loaded_result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A result, an invalid one, and a comparison that regressed."""
    for name, made in (("r", loaded_result()), ("h", hostile_result()), ("c", comparison())):
        (tmp_path / f"{name}.json").write_text(json.dumps(made.to_json()))
    return tmp_path


def test_all_forms(folder: Path) -> None:
    """Every form is written from one call; a comparison's verdict is the exit code."""
    forms = {"--markdown": "s.md", "--junit": "j.xml", "--html": "p.html", "--custom-bigger-is-better": "b.json"}
    options = [each for option, name in forms.items() for each in (option, folder / name)]
    done = run_cli("report", folder / "c.json", folder / "r.json", *options)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert (folder / "s.md").read_text().startswith("## Comparison: ❌ regressed")
    assert parse(folder / "j.xml").getroot().get("failures") == "2"  # noqa: S314  our own
    assert (folder / "p.html").read_text().startswith("<!doctype html>")
    assert all(each["value"] > 0 for each in json.loads((folder / "b.json").read_text()))


def test_markdown_is_what_no_form_means(folder: Path) -> None:
    """Without an option Markdown goes to stdout; a result of which nothing was asked ends with 0."""
    done = run_cli("report", folder / "r.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("## Bench\n")
    assert run_cli("report", folder / "r.json", "--markdown", "-").stdout == done.stdout


@pytest.mark.parametrize(("bound", "code"), [(0.5, 0), (0.1, 1)])
def test_gate(folder: Path, bound: float, code: int) -> None:
    """With a gate a single result is held against absolute limits."""
    (folder / "gate.toml").write_text(f"[ttft]\nmax = {bound}\n")
    done = run_cli("report", folder / "r.json", "--gate", folder / "gate.toml")
    assert done.returncode == code
    assert f"≤ {bound * 1000:.0f} ms" in done.stdout


def test_an_invalid_run_is_reported(folder: Path) -> None:
    """A gate on an invalid run ends with 5, and the report is written all the same, with the reason."""
    (folder / "gate.toml").write_text("[ttft]\nmax = 1\n")
    done = run_cli("report", folder / "h.json", "--gate", folder / "gate.toml", "--html", folder / "p.html")
    assert done.returncode == 5
    assert "is no valid run" in (folder / "p.html").read_text()


def test_errors(folder: Path) -> None:
    """What is no document, and a place that cannot be written, end with 2 and one sentence."""
    (folder / "x.json").write_text("{}")
    for arguments, said in (
        ([folder / "x.json"], "is no result of ossquant bench"),
        ([folder / "away.json"], "No such file"),
        ([folder / "r.json", "--html", folder / "no/p.html"], "No such file"),
        ([folder / "r.json", "--gate", folder / "no.toml"], "no gate at"),
        ([], "Missing argument"),
    ):
        done = run_cli("report", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
