"""`ossquant merge` as a user runs it: answers, warnings, exit codes, interruptions."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conftest import run_cli
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.spec import alternating_layer_types
from ossquant.verify import verify

Q, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.gate_up_projs.3"  # both (256, 192)
BY_PEFT = {
    "peft_type": "LORA", "peft_version": "0.21.2", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
    "init_lora_weights": True, "inference_mode": True, "fan_in_fan_out": False, "rank_pattern": {},
    "alpha_pattern": {}, "target_modules": ["q_proj"], "modules_to_save": None, "target_parameters": None,
}  # fmt: skip


def write_adapter(folder: Path, strength: float = 0.1, modules: tuple[str, ...] = (Q, EXPERT)) -> Path:
    """An adapter on matrices of 256 by 192, in the form that peft saves."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    (folder / "adapter_config.json").write_text(json.dumps(BY_PEFT))
    halves = {}
    for module in modules:
        halves[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, 192)
        halves[f"base_model.model.{module}.lora_B.weight"] = strength * torch.randn(256, 4)
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A strong adapter."""
    return write_adapter(tmp_path / "adapter")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def refused(code: int, words: str, *arguments: str | Path) -> None:
    done = run_cli("merge", *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert "Traceback" not in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert words in error


def test_merged(trained: Path, adapter: Path, tmp_path: Path) -> None:
    """One line says what was made and what is left; the result is whole, and MXFP4, with the tokenizer beside it."""
    done = run_cli("merge", trained, adapter, tmp_path / "out")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert "of the adapter is left: 100% in the attention, " in done.stdout
    assert "warning" not in done.stderr
    assert verify(tmp_path / "out").whole
    with open_checkpoint(tmp_path / "out") as merged, open_checkpoint(trained) as source:
        assert merged.plan == source.plan
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (trained / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "out").glob("adapter*"))


def test_json(trained: Path, adapter: Path, tmp_path: Path) -> None:
    """--json is one object with the shares that are left."""
    done = run_cli("merge", trained, adapter, tmp_path / "out", "--scheme", "bf16", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["scheme"] == "bf16"
    assert report["output"] == str(tmp_path / "out")
    assert report["adapter_kept"] == {"attention": pytest.approx(1, abs=0.01), "experts": pytest.approx(1, abs=0.01)}


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_faint(options: list[str], trained: Path, tmp_path: Path) -> None:
    """Of an adapter that MXFP4 rounds away a warning says so, on stderr, with --json too."""
    write_adapter(tmp_path / "adapter", strength=1e-5)
    done = run_cli("merge", trained, tmp_path / "adapter", tmp_path / "out", *options)
    assert done.returncode == 0
    warning = next(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert "experts" in warning
    assert warning.endswith("--scheme bf16 keeps more of it")


def test_faint_in_bf16(trained: Path, tmp_path: Path) -> None:
    """What bf16 itself rounds away is warned of without the advice to use bf16."""
    write_adapter(tmp_path / "adapter", strength=1e-8, modules=(Q,))
    done = run_cli("merge", trained, tmp_path / "adapter", tmp_path / "out", "--scheme", "bf16")
    warning = next(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert warning.endswith("the attention is less than half a step of bf16 and is rounded away")


def no_adapter(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def dora(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(BY_PEFT | {"use_dora": True}))


def cut(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)


def not_finite(adapter: Path) -> None:
    write_adapter(adapter, strength=float("nan"))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (no_adapter, 2, "not an adapter"),
        (dora, 3, "'use_dora' is True"),
        (cut, 3, "adapter_model.safetensors"),
        (not_finite, 3, "NaN or infinity in "),
    ],
)
def test_exit_codes(
    damage: Callable[[Path], None], code: int, words: str, trained: Path, adapter: Path, tmp_path: Path
) -> None:
    """2 for what is no adapter, 3 for one that is damaged or not understood."""
    damage(adapter)
    refused(code, words, trained, adapter, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_wrong_arguments(trained: Path, adapter: Path, tmp_path: Path) -> None:
    """What is wrong on the command line is exit code 2, and nothing is written."""
    out = tmp_path / "out"
    refused(2, "no checkpoint at ", tmp_path / "none", adapter, out)
    refused(2, "int5", trained, adapter, out, "--scheme", "int5")
    refused(2, "--max-shard-size", trained, adapter, out, "--max-shard-size", "0")
    refused(2, "lies inside the source", trained, adapter, trained)
    refused(2, "not an adapter", trained, trained, out)
    assert not out.exists()


def test_source_in_nf4(quantized: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """The NF4 checkpoint that it was trained on is not one to merge into: exit code 3."""
    refused(3, "to which nothing can be added", quantized["nf4"], adapter, tmp_path / "out")


def test_output_exists(trained: Path, quantized: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """A checkpoint in OUTPUT is replaced with --force alone, a folder of anything else not even so."""
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(quantized["bf16"], out)
    other.mkdir()
    (other / "thesis.txt").write_text("ten years of work")
    before = digests(out), digests(other), digests(adapter)
    refused(2, "not empty", trained, adapter, out)
    refused(2, "holds no checkpoint", trained, adapter, other, "--force")
    refused(2, "holds no checkpoint", trained, adapter, adapter, "--force")
    assert (digests(out), digests(other), digests(adapter)) == before
    assert run_cli("merge", trained, adapter, out, "--force").returncode == 0
    assert verify(out).whole
    assert digests(out) != before[0]


def test_interrupted(adapter: Path, tmp_path: Path) -> None:
    """Ctrl-C ends with exit code 130 and no checkpoint; the same command goes on."""
    from make_checkpoint import TINY, make_checkpoint

    spec = replace(TINY, num_hidden_layers=8, layer_types=alternating_layer_types(8))
    make_checkpoint(tmp_path / "source", spec)
    out, program = tmp_path / "out", Path(sys.executable).parent / "ossquant"
    command = [str(program), "merge", str(tmp_path / "source"), str(adapter), str(out), "--max-shard-size", "300KB"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = out / "ossquant-job.json"
    while not (journal.exists() and len(json.loads(journal.read_text())["done"]) >= 3):
        assert process.poll() is None, "it ended before the moment came"
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == f"interrupted; the same command goes on from here. {out} is not a checkpoint yet."
    with pytest.raises(CheckpointError, match="unfinished job"):
        open_checkpoint(out)
    again = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert again["resumed"] is True
    assert verify(out).whole
