"""scripts/gpu_check without a GPU: what it says, what it writes, and that it can fail."""

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from gpu_check import STARTING, Limits, run_checks
from gpu_check_case import Setting
from gpu_check_full import OFFLOAD_CONTEXT, SMALL_CARD, _cap
from gpu_check_tiny import check_mode
from gpu_check_worker import describe
from gpu_wheels import keep_one_cuda
from ossquant.memory.terms import Workload
from ossquant.place import plan_devices
from ossquant.plan import make_plan
from ossquant.recipe import built_in
from ossquant.spec import ModelSpec
from ossquant.units import GIB

CASES = {case["name"]: case for case in describe()["cases"]}
CHANGED = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # which is faster for tiny models on a busy CPU


def gpu_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts/gpu_check"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dry_run(output: Path, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a run on tiny models on the CPU."""
    result = gpu_check("--device", "cpu", "--output", output, *arguments)
    assert output.exists(), result.stderr
    return result.returncode, json.loads(output.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    """One sentence, exit code 2, and no result."""
    before = set((ROOT / "tests/gpu").rglob("*.json"))
    result = gpu_check()
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "gpu_check: no CUDA GPU that torch can use is on this machine, so nothing was checked"
    ]
    assert set((ROOT / "tests/gpu").rglob("*.json")) == before


def test_a_dry_run_writes_everything(tmp_path: Path) -> None:
    """Placement and the full-size checks on tiny models: versions, and of each check what it found."""
    code, report = dry_run(tmp_path / "dry.json", "--parts", "placement,decode,20b")
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0, [check for check in report["checks"] if check["status"] != "passed"]
    assert report["dry_run"]
    assert report["device"] == "cpu"
    assert report["gpus"] is None or torch.cuda.is_available()
    assert {"torch", "cuda", "driver", "bitsandbytes", "transformers", "python"} <= set(report["versions"])
    assert report["summary"]["passed"] == sum(check["status"] == "passed" for check in checks.values()) >= 14
    assert report["summary"]["failed"] == report["summary"]["not run"] == 0
    assert all(check["reason"] for check in checks.values() if check["status"] == "skipped")
    assert checks["placement/mxfp4/streamed"]["figures"]["computed_on"] == ["lazy"]
    assert checks["placement/mxfp4/host"]["figures"]["computed_on"] == ["cpu"]
    assert checks["placement/mxfp4/host"]["bounds"]["error"] == [0, 1e-5]
    assert checks["placement/mxfp4/ahead"]["bounds"]["difference_ahead"] == [0, 0]
    assert checks["placement/mxfp4/ahead"]["figures"]["said"].startswith("experts on the host: ")
    assert checks["decode/graphs/nf4/float32"]["bounds"] == {"tokens_equal": True, "answers": True}
    assert checks["20b/offload/copies"]["figures"]["bytes_per_second"]["pageable"] > 0
    assert checks["decode/graphs/nf4/float32"]["bounds"] == {"tokens_equal": True, "answers": True}
    assert checks["20b/offload/copies"]["bounds"]["difference_in_turn"] == [0, 0]
    load, prompt = checks["20b/nf4/load"]["figures"], checks["20b/nf4/prompt-8192"]["figures"]
    assert load["parameters_in_4_bits"] is True
    assert load["load_seconds"] > 0 < load["cat_seconds"]
    assert prompt["predicted"]["total"]["low"] < prompt["predicted"]["total"]["high"]
    assert prompt["new_tokens"] == 32
    assert checks["20b/hybrid/rates"]["figures"]["decode_tokens_per_second"] > 0
    assert set(checks["20b/offload/streaming"]["figures"]["seconds"]) == {"streamed", "on_host"}


def test_a_changed_weight_fails(trained: Path, tmp_path: Path) -> None:
    """A model that differs from the reference in one matrix fails the check of its logits, and the exit code is 1."""
    wrong = tmp_path / "wrong"
    shutil.copytree(trained, wrong)
    index = json.loads((wrong / "model.safetensors.index.json").read_text())
    shard = wrong / index["weight_map"][CHANGED]
    tensors = load_file(shard)
    tensors[CHANGED][:, 0] *= 1.5
    save_file(tensors, shard, metadata={"format": "pt"})
    only = ("--only", "tiny/bf16/float32/published", "--tiny", wrong)
    code, report = dry_run(tmp_path / "dry.json", *only)
    assert code == 1
    assert [check["status"] for check in report["checks"]] == ["failed"]
    assert "error is" in report["checks"][0]["reason"]
    right = check_mode(Setting("cpu", trained, tmp_path), scheme="bf16", dtype="float32", source="published")
    assert not right.faults


def test_a_check_that_dies_hides_no_other(trained: Path, tmp_path: Path) -> None:
    """Each check of a checkpoint that cannot be read fails for its own reason, in a process of its own."""
    torn = tmp_path / "torn"
    shutil.copytree(trained, torn)
    with (torn / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.truncate(10**6)
    selected = [CASES["tiny/bf16/float32/published"], CASES["tiny/bf16/float32/ours"]]
    options = ["--device", "cpu", "--tiny", str(torn), "--scratch", str(tmp_path)]
    checks = list(run_checks(selected, options, Limits(time.monotonic() + 300, 5)))
    assert [check["name"] for check in checks] == [case["name"] for case in selected]
    assert all(check["status"] == "failed" for check in checks)
    assert all(check["reason"].startswith("ossquant.errors.CheckpointError: ") for check in checks)


def test_a_check_that_hangs_is_ended(trained: Path, tmp_path: Path) -> None:
    """A check beyond its own limit fails, and one that the minutes leave no time for is not run."""
    hurried = CASES["tiny/bf16/float32/published"] | {"limit": -STARTING}
    options = ["--device", "cpu", "--tiny", str(trained), "--scratch", str(tmp_path)]
    (late,) = run_checks([hurried], options, Limits(time.monotonic() + 300, 5))
    assert late["status"] == "failed"
    assert late["reason"] == "not finished in 0 s"
    (left,) = run_checks([hurried], options, Limits(time.monotonic(), 5))
    assert left == {"name": hurried["name"], "status": "not run", "seconds": 0.0, "reason": "the 5 minutes were over"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cpu"), "needs --output"),
        (("--device", "cpu", "--output", ROOT / "tests/gpu/results/dry.json"), "no result of a GPU"),
        (("--parts", "tiny,40b"), "no part '40b'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[str | Path, ...], said: str) -> None:
    """Before anything is looked at, with exit code 2."""
    result = gpu_check(*arguments)
    assert result.returncode == 2
    assert said in result.stderr


@pytest.mark.parametrize(("size", "on_host"), [("20b", 12), ("120b", 25)])
def test_offload_forces_experts_to_the_host(size: str, on_host: int) -> None:
    """max_memory as it is tried on a GPU: half of the 20b's experts, what 24 GB cannot hold of the 120b's."""
    plan = make_plan(ModelSpec.published(size), built_in("hybrid"))
    cap = _cap(plan)
    devices = plan_devices(plan, {"cuda:0": cap, "cpu": 100 * GIB}, Workload(max_model_len=OFFLOAD_CONTEXT))
    assert cap <= SMALL_CARD
    assert devices.experts.count("cpu") == on_host
    assert devices.nbytes["cuda:0"] < cap


def test_wheels_of_one_cuda(tmp_path: Path) -> None:
    """A reduced wheel holds the CPU's and one CUDA's library, and its RECORD lists what it holds."""
    from zipfile import ZipFile

    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130", "xpu2026")]
    names += ["bitsandbytes/__init__.py", "bitsandbytes-0.50.2.dist-info/RECORD"]
    with ZipFile(tmp_path / "whole.whl", "w") as wheel:
        for name in names:
            record = "".join(f"{name},sha256=x,1\n" for name in names)
            wheel.writestr(name, record if name.endswith("RECORD") else "x")
    keep_one_cuda(tmp_path / "whole.whl", tmp_path / "reduced.whl", "130")
    with ZipFile(tmp_path / "reduced.whl") as wheel:
        kept = wheel.namelist()
        listed = [line.split(",")[0] for line in wheel.read(names[-1]).decode().splitlines()]
    assert kept == listed == [names[0], names[2], *names[4:]]
    with pytest.raises(SystemExit, match=r"has no .*cuda129"):
        keep_one_cuda(tmp_path / "whole.whl", tmp_path / "none.whl", "129")
