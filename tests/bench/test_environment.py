import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from ossquant.bench.environment import devices, environment, git


def test_the_machine_is_described() -> None:
    """Python, processor, memory, packages and devices: what a figure depends on."""
    told = environment()
    assert told["python"].count(".") == 2
    assert told["cpu"]
    assert told["host_memory_bytes"] > 10**8
    assert told["packages"]["aiohttp"] == version("aiohttp")
    assert told["devices"] == devices()


def test_the_commit_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean repository, one with a change, and a folder that is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git() is None
    for command in (
        ["init", "-q"], ["config", "user.email", "a@b.example"], ["config", "user.name", "a"],
        ["commit", "-q", "--allow-empty", "-m", "One"],
    ):  # fmt: skip
        subprocess.run(["git", *command], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run(["git", "add", "file"], check=True)
    told = git()
    assert told is not None
    assert len(told["commit"]) == 40
    assert told["dirty"] is True
    subprocess.run(["git", "commit", "-q", "-m", "Two"], check=True)
    assert (git() or {})["dirty"] is False
