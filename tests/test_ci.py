"""The workflows for self-hosted GPU runners, and what recipes/ci gives to others."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from made_documents import loaded_result
from ossquant.bench.gate import load_gate

ROOT = Path(__file__).parent.parent
CI = ROOT / "recipes/ci"
WORKFLOWS = (ROOT / ".github/workflows/gpu-bench.yml", CI / "gpu-bench.yml")
BIN = Path(sys.executable).parent


def read(path: Path) -> dict[str, Any]:
    # YAML takes the key `on` for true
    return {"on" if key is True else key: value for key, value in yaml.safe_load(path.read_text()).items()}


def steps(path: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = read(path)["jobs"]["ab"]["steps"]
    return made


def schema_holds(path: Path) -> bool:
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=["ours", "recipe"])
def test_schema(path: Path, tmp_path: Path) -> None:
    """Each is a workflow by GitHub's schema; the same with a misspelt key is none."""
    assert schema_holds(path)
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(path.read_text().replace("runs-on:", "run-on:"))
    assert not schema_holds(wrong)


@pytest.mark.parametrize("path", WORKFLOWS, ids=["ours", "recipe"])
def test_forks_are_blocked(path: Path) -> None:
    """The job runs by hand or for a branch of the repository itself that has the label; nothing may be written."""
    workflow = read(path)
    assert set(workflow["on"]) == {"pull_request", "workflow_dispatch"}
    condition = " ".join(workflow["jobs"]["ab"]["if"].split())
    assert condition == (
        "github.event_name == 'workflow_dispatch' || "
        "(github.event.pull_request.head.repo.full_name == github.repository && "
        "contains(github.event.pull_request.labels.*.name, 'gpu-bench'))"
    )
    assert workflow["permissions"] == {"contents": "read"}
    assert list(workflow["jobs"]) == ["ab"]
    assert workflow["jobs"]["ab"]["timeout-minutes"] <= 180


@pytest.mark.parametrize("path", WORKFLOWS, ids=["ours", "recipe"])
def test_actions_are_pinned(path: Path) -> None:
    """Every action is pinned to a whole commit, leaves no credentials, and no shell line is made of an event's text."""
    used = [step for step in steps(path) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in used)
    checkouts = [step for step in used if "checkout" in step["uses"]]
    assert len(checkouts) == 2
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    assert not any("${{" in step.get("run", "") for step in steps(path))


@pytest.mark.parametrize("path", WORKFLOWS, ids=["ours", "recipe"])
def test_shell(path: Path) -> None:
    """Every shell step is a script that bash reads."""
    for step in steps(path):
        if "run" in step:
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)


def test_gate() -> None:
    """The gate that comes along can be read and has relative limits."""
    gate = load_gate(CI / "gate.toml")
    assert [rule.name for rule in gate.rules if rule.max_regression] == ["output_tokens_per_second", "ttft"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture
def workspace(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A runner's workspace with both checkouts, of a server of known speed, and its environment."""
    for side in ("base", "head"):
        shutil.copytree(CI, tmp_path / side / "ci")
    (tmp_path / "out").mkdir()
    port = free_port()
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "PORT": str(port), "READY": "/v1/models",
        "SERVER": f"{sys.executable} -m ossquant.bench.truth {port}",
        "LOAD": "--requests 3 --new-tokens 8 --model reasoning", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
    }  # fmt: skip
    return tmp_path, env


def run_step(name: str, workspace: Path, env: dict[str, str]) -> int:
    """Run a step of the recipe as a runner does."""
    (script,) = (step["run"] for step in steps(CI / "gpu-bench.yml") if step["name"] == name)
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(command, cwd=workspace, env=env, check=False, timeout=300).returncode


@pytest.mark.parametrize(("slower", "code", "said"), [(1.2, 1, "❌ regressed"), (1.0, 0, "✅ ok")])
def test_the_recipe(slower: float, code: int, said: str, workspace: tuple[Path, dict[str, str]]) -> None:
    """A head that is 20 % slower fails the job with 1, one that is not passes; the summary and the artefacts say so."""
    folder, env = workspace
    for side, factor in (("base", 1.0), ("head", slower)):
        (folder / f"{side}/result.json").write_text(json.dumps(loaded_result(factor).to_json()))
        (folder / f"{side}/ci/bench.sh").write_text(f"#!/bin/sh\ncat {side}/result.json\n")
    assert run_step("A and B in turns", folder, env) == code
    assert run_step("Report", folder, env) == 0
    assert (folder / "summary.md").read_text().startswith(f"## Comparison: {said}")
    kept = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*.*")}
    assert {"junit.xml", "report.html", "benchmark.json", "ab/comparison.json", "ab/base/0005.json"} <= kept


def test_the_script_leaves_no_server(workspace: tuple[Path, dict[str, str]]) -> None:
    """On stdout is one result; its server is gone, so that the next run has the port; it does not measure another's."""
    folder, env = workspace
    script = str(folder / "base/ci/bench.sh")
    done = subprocess.run([script], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode in (0, 5), done.stderr  # 5: this machine was too busy for the run to count
    assert json.loads(done.stdout)["target"]["model"] == "reasoning"
    with socket.socket() as other:
        other.settimeout(10)
        assert other.connect_ex(("127.0.0.1", int(env["PORT"])))  # nobody listens
    with subprocess.Popen([*shlex.split(env["SERVER"])], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline().startswith("http://")
        again = subprocess.run([script], env=env, capture_output=True, text=True, check=False, timeout=120)
        server.terminate()
    assert (again.returncode, again.stdout) == (6, "")
    assert again.stderr.startswith("another server answers at")


def test_a_server_that_does_not_start(workspace: tuple[Path, dict[str, str]]) -> None:
    """A server that ends before it answers is a failed command, and there is nothing to report."""
    folder, env = workspace
    assert run_step("A and B in turns", folder, env | {"SERVER": "false"}) == 6
    assert run_step("Report", folder, env) == 0
    assert not (folder / "summary.md").exists()
