"""`ossquant export` as a user runs it: every target, what it prints, what it refuses, Ctrl-C, a full disk."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import run_cli
from ossquant.checkpoint.manifest import MANIFEST, MODELFILE
from ossquant.checkpoint.reader import JOB, open_checkpoint
from ossquant.errors import CheckpointError
from ossquant.export.target import TARGETS
from ossquant.spec import alternating_layer_types

SPLIT = 500_000
GGUF = "tiny-mxfp4-q8_0.gguf"
SIDE_FILES = {"chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json",
              "tokenizer_config.json", "dialogues.json"}  # fmt: skip
MADE = {
    "gguf": {GGUF},
    "ollama": {GGUF, MODELFILE},
    **{name: {"model.safetensors", *SIDE_FILES} for name in ("mxfp4", "vllm-int4", "unsloth")},
}


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The trained model for every target, by the command with --json: what it printed, by target."""
    folder, made = tmp_path_factory.mktemp("exported"), {}
    for target in TARGETS:
        done = run_cli("export", trained, folder / target, "--to", target, "--json")
        assert done.returncode == 0, done.stderr
        made[target] = json.loads(done.stdout) | {"stderr": done.stderr}
    return made


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that takes about a second to export, into some twenty files."""
    from make_checkpoint import TINY, make_checkpoint

    spec = replace(TINY, num_hidden_layers=16, layer_types=alternating_layer_types(16))
    folder = tmp_path_factory.mktemp("large") / "large"
    make_checkpoint(folder, spec)
    return folder


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "model"))


def digests(folder: Path) -> dict[str, str]:
    """Hash all files, but for the manifest, which names the source."""
    beside = (path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in beside}


def refused(code: int, *words: str, arguments: tuple[str | Path, ...], command: str = "export") -> None:
    """Run it; it says one sentence and what to do, on stderr, with every word in it."""
    done = run_cli(command, *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith("error: ")
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_every_target(exported: dict[str, dict[str, Any]], trained: Path, target: str) -> None:
    """Each target makes its files and no others, --json says where, and a manifest vouches for them."""
    report = exported[target]
    out = Path(report["output"])
    assert {path.name for path in out.iterdir()} == MADE[target] | {"config.json", MANIFEST}
    assert (report["source"], report["target"], report["resumed"]) == (str(trained), target, False)
    manifest = json.loads((out / MANIFEST).read_text())
    assert set(manifest["side_files"]) == MADE[target] - {GGUF, "model.safetensors"} | {"config.json"}
    assert run_cli("verify", out).stdout.splitlines()[-1].startswith("whole: ")


@pytest.mark.parametrize("target", ["gguf", "mxfp4", "unsloth"])
def test_dry_run(exported: dict[str, dict[str, Any]], trained: Path, target: str, tmp_path: Path) -> None:
    """A dry run writes nothing and says beforehand what the run says: sizes as on the disk, bytes, roles."""
    done = run_cli("export", trained, tmp_path / "out", "--to", target, "--json", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    planned, made = json.loads(done.stdout), exported[target]
    for key in ("parameters", "parameters_4bit", "bytes", "roles", "warnings", "target"):
        assert planned[key] == made[key], key
    out = Path(made["output"])
    if target == "gguf":
        assert planned["files"] == made["files"] == [{"name": GGUF, "bytes": (out / GGUF).stat().st_size}]
    else:
        with open_checkpoint(out) as checkpoint:
            assert planned["bytes"] == sum(tensor.nbytes for tensor in checkpoint.stored.values())


def test_dry_run_table(trained: Path, tmp_path: Path) -> None:
    """Without --json the plan is a table, one line a role, then each file with the size that it will have."""
    options = ("--split-max-size", "700kB", "--dense", "bf16")
    done = run_cli("export", trained, "--dry-run", *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{trained} as mxfp4-bf16"
    assert {line.split()[0] for line in lines[2:10]} == {
        "experts", "attention", "embedding", "lm_head", "expert_bias", "router", "bias", "norm"}  # fmt: skip
    run_cli("export", trained, tmp_path / "out", *options)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.gguf")}
    assert len(sizes) > 3
    assert lines[11:] == [f"{name}: {nbytes:,} bytes" for name, nbytes in sorted(sizes.items())]


def test_warnings(exported: dict[str, dict[str, Any]]) -> None:
    """What a user must know stands in --json and on stderr."""
    assert {target: len(made["warnings"]) for target, made in exported.items()} == {
        "gguf": 0, "ollama": 0, "mxfp4": 0, "vllm-int4": 1, "unsloth": 1}  # fmt: skip
    for made in exported.values():
        assert all(f"warning: {warning}" in made["stderr"].splitlines() for warning in made["warnings"])


def test_larger_and_worse(trained: Path) -> None:
    """Who asks for larger and worse experts than the source has is told so, with the bits and the error."""
    done = run_cli("export", trained, "--experts", "q4_0", "--dry-run")
    assert done.returncode == 0
    assert re.search(
        r"^warning: experts in q4_0 take 4.50 bits a weight and are off by \d %; MXFP4, which", done.stderr, re.M
    )


def test_rounding_is_said(random_bf16: Path, tmp_path: Path) -> None:
    """What rounding a fine-tune's experts to MXFP4 lost stands in the line of result."""
    done = run_cli("export", random_bf16, tmp_path / "out")
    assert "; experts rounded to MXFP4 with a relative error of 0.1" in done.stdout


def test_usage(trained: Path, tmp_path: Path) -> None:
    """A wrong argument is one sentence with the nearest right one, exit code 2, and nothing is written."""
    out = tmp_path / "out"
    refused(2, "OUTPUT is missing", "--dry-run", arguments=(trained,))
    refused(2, "unknown target 'guff'", "did you mean 'gguf'?", arguments=(trained, out, "--to", "guff"))
    refused(2, "--dense cannot be 'q8'", "'q8_0'", arguments=(trained, out, "--dense", "q8"))
    refused(
        2, "--experts cannot be 'Q4_K_M'", "K-quants need rows of 256", arguments=(trained, out, "--experts", "Q4_K_M")
    )
    for option in ("--dense", "--experts"):
        words = ("--dense and --experts are for gguf and ollama, not for mxfp4", "leave them out")
        refused(2, *words, arguments=(trained, out, "--to", "mxfp4", option, "bf16"))
    refused(2, "OUTPUT is a folder", f"{tmp_path}/my-gguf", arguments=(trained, tmp_path / "my.gguf"))
    refused(2, "--split-max-size must be at least 1 byte", arguments=(trained, out, "--split-max-size", "0"))
    refused(2, "'big' is not a size", arguments=(trained, out, "--split-max-size", "big"))
    refused(2, "no checkpoint at", arguments=(tmp_path / "absent", out))
    refused(2, "Ollama takes one file", arguments=(trained, out, "--to", "ollama", "--split-max-size", "1GB"))
    refused(2, "lies inside the source", arguments=(trained, trained / "out"))
    assert not any(tmp_path.iterdir())
    assert not (trained / "out").exists()


@pytest.mark.parametrize(
    ("form", "target", "words"),
    [("hybrid", "mxfp4", ["is hybrid, and mxfp4 is made from mxfp4, bf16", "gguf takes mxfp4, bf16, hybrid;"]),
     ("nf4", "gguf", ["is nf4, and gguf is made from mxfp4, bf16, hybrid", "unsloth takes mxfp4, bf16, nf4"]),
     ("int4", "gguf", ["is int4, and gguf is made from"]), ("fp4", "ollama", ["is fp4, and gguf is made from"]),
     ("int4", "vllm-int4", ["is int4, and vllm-int4 is made from mxfp4, bf16"])],
)  # fmt: skip
def test_pairs(quantized: dict[str, Path], form: str, target: str, words: list[str], tmp_path: Path) -> None:
    """A form that a target is not made from is refused with the pairs that work; exit code 3."""
    refused(3, *words, arguments=(quantized[form], tmp_path / "out", "--to", target))
    assert not (tmp_path / "out").exists()


def change_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").unlink()


def cut_shard(model: Path) -> None:
    os.truncate(model / "model-00002-of-00002.safetensors", 500_000)


def configured(**changes: Any) -> Callable[[Path], None]:
    return lambda model: change_config(model, **changes)


FULL = ["full_attention"] * 4
BAD = {
    "no tokenizer": (no_tokenizer, ("gguf", "mxfp4"), ["no tokenizer.json", "hf download openai/gpt-oss-20b"]),
    "no rope": (configured(rope_scaling=...), ("unsloth",), ["neither rope_scaling nor rope_parameters"]),
    "huge theta": (configured(rope_theta=10**400), ("ollama",), ["rope's 'rope_theta' is '1000"]),
    "swiglu": (configured(swiglu_limit=5.0), ("gguf",), ["'swiglu_limit' is 5.0, llama.cpp computes with 7.0", "--to"]),
    "activation": (configured(hidden_act="gelu"), ("ollama",), ["'hidden_act' is gelu, llama.cpp computes with silu"]),
    "full attention": (configured(layer_types=FULL), ("gguf",), ["'layer_types' are not sliding and full in turns"]),
    "epsilon": (configured(rms_norm_eps="1e-5"), ("gguf",), ["'rms_norm_eps' is '1e-5', not a small number"]),
    "cut shard": (cut_shard, ("gguf",), ["model-00002-of-00002.safetensors: 500000 of ", "truncated"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", BAD)
def test_bad_source(model: Path, damage: str, tmp_path: Path) -> None:
    """A source that servers could not use, or would compute otherwise, is one sentence; exit code 3."""
    how, targets, words = BAD[damage]
    how(model)
    for target in targets:
        refused(3, *words, arguments=(model, tmp_path / "out", "--to", target))
    assert not (tmp_path / "out").exists()


def test_other_activation_elsewhere(model: Path, tmp_path: Path) -> None:
    """What llama.cpp would compute otherwise can still be served from safetensors, as the hint says."""
    change_config(model, swiglu_limit=5.0, layer_types=FULL)
    assert run_cli("export", model, tmp_path / "out", "--to", "mxfp4").returncode == 0


def test_output_exists(exported: dict[str, dict[str, Any]], trained: Path, tmp_path: Path) -> None:
    """A folder that holds anything is neither written to nor touched, without --force."""
    for target in ("gguf", "mxfp4"):
        out = Path(shutil.copytree(exported["ollama"]["output"], tmp_path / target))
        before = digests(out)
        refused(2, f"error: {out} exists and is not empty", arguments=(trained, out, "--to", target))
        assert digests(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(2, "holds no checkpoint", arguments=(trained, tmp_path / "mine", "--force"))
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


NEXT = {
    "gguf": "llama-server -m '{0}/tiny-mxfp4-q8_0-00001-of-00002.gguf' --host 127.0.0.1",
    "ollama": "ollama create 'my out' -f '{0}'/Modelfile",
    "mxfp4": "vllm serve '{0}' --host 127.0.0.1",
}


def test_force(exported: dict[str, dict[str, Any]], trained: Path, tmp_path: Path) -> None:
    """--force puts an export of another kind in place of the old one, and leaves nothing of that.

    Without --json stdout has one line of result, and stderr ends with the command that serves it, to be pasted.
    """
    out = tmp_path / "My out"
    for target, command in NEXT.items():
        split = ("--split-max-size", "1.5MB") if target == "gguf" else ()
        done = run_cli("export", trained, out, "--to", target, "--force", *split)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(
            rf"{out}: \d\.\d+ MB in \d files?, 2\.36 M of 3\.22 M parameters in 4 bits; .*\n", done.stdout
        )
        assert done.stderr.splitlines()[-1] == f"for {TARGETS[target].servers}. next: {command.format(out)}"
        if split:
            assert len(list(out.glob("*.gguf"))) == 2
        else:
            assert digests(out) == digests(Path(exported[target]["output"]))


def command(source: Path, output: Path) -> list[str]:
    program = str(Path(sys.executable).parent / "ossquant")
    return [program, "export", str(source), str(output), "--experts", "q8_0", "--split-max-size", str(SPLIT), "--json"]


def stopped(source: Path, output: Path) -> subprocess.Popen[str]:
    """Start the command and hold it in the midst of writing; where it ends before that is seen, start it anew."""
    job = output / JOB
    for _ in range(5):
        process = subprocess.Popen(command(source, output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None:
            if job.exists() and len(json.loads(job.read_text())["done"]) >= 3:
                process.send_signal(signal.SIGSTOP)
                return process
            time.sleep(0.0005)
        process.communicate()
        shutil.rmtree(output)
    pytest.fail("it ended before the moment came")


def go_on(source: Path, output: Path) -> dict[str, Any]:
    done = subprocess.run(command(source, output), capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, large: Path) -> dict[str, str]:
    """The digests of the files that an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    go_on(large, folder)
    return digests(folder)


def looks_whole(folder: Path) -> bool:
    """Whether a server or a reader would find something to load."""
    try:
        with open_checkpoint(folder):
            return True
    except CheckpointError:
        return any(folder.glob("*.gguf")) or (folder / "config.json").exists() or (folder / MODELFILE).exists()


def test_interrupted(large: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """Ctrl-C while writing ends with 130 and leaves nothing that a server would load; the same command goes on."""
    out = tmp_path / "out"
    process = stopped(large, out)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (130, "")
    assert stderr.splitlines()[-1] == f"interrupted; the same command goes on from here. {out} is not a checkpoint yet."
    assert "Traceback" not in stderr
    assert not looks_whole(out)
    assert list(out.glob("*.gguf.partial"))
    report = go_on(large, out)
    assert report["resumed"] is True
    assert not list(out.glob("*.partial"))
    assert digests(out) == undisturbed
    assert [file["name"] for file in report["files"]] == sorted(path.name for path in out.glob("*.gguf"))


def test_disk_fills_up(large: Path, undisturbed: dict[str, str], disk: Callable[[int], Path]) -> None:
    """A disk that fills up while writing gives exit code 4 and nothing that looks whole; with room, it goes on."""
    folder = disk(2**26)
    process = stopped(large, folder / "out")
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (4, "")
    assert f"error: {folder / 'out'}: the disk is full" in stderr.splitlines()
    assert "Traceback" not in stderr
    assert not looks_whole(folder / "out")
    (folder / "filler").unlink()
    assert go_on(large, folder / "out")["resumed"] is True
    assert digests(folder / "out") == undisturbed


def test_too_small_a_disk(trained: Path, disk: Callable[[int], Path]) -> None:
    """A disk that cannot hold the export is told before anything is written, with both sizes; exit code 4."""
    out = disk(2**20) / "out"
    done = run_cli("export", trained, out)
    assert done.returncode == 4
    assert f"error: {out}: 2.26 MB are to be written, 1.05 MB are free" in done.stderr.splitlines()
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize("command", ["run", "quantize", "export"])
def test_gguf_is_no_source(exported: dict[str, dict[str, Any]], command: str, tmp_path: Path) -> None:
    """A GGUF export given back to ossquant is refused in one sentence that says what to name."""
    more = ("hello",) if command == "run" else (tmp_path / "out",)
    words = ("a GGUF file, for llama.cpp and Ollama", "name what it was made of")
    refused(3, *words, arguments=(exported["gguf"]["output"], *more), command=command)


def test_hybrid(quantized: dict[str, Path], tmp_path: Path, exported: dict[str, dict[str, Any]]) -> None:
    """A hybrid becomes GGUF with the published experts' bytes, whatever its folder is called."""
    source = Path(shutil.copytree(quantized["hybrid"], tmp_path / "tiny"))
    done = run_cli("export", source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    hashes = [
        {name: entry["sha256"] for name, entry in json.loads((folder / MANIFEST).read_text())["tensors"].items()}
        for folder in (tmp_path / "out", Path(exported["gguf"]["output"]))
    ]
    assert {name for name in hashes[0] if hashes[0][name] != hashes[1][name]} == {
        f"blk.{layer}.attn_{part}.weight" for layer in range(4) for part in ("q", "k", "v", "output")}  # fmt: skip


def test_strange_name(trained: Path, tmp_path: Path) -> None:
    """A folder's name becomes a file name that every shell and server takes."""
    source = Path(shutil.copytree(trained, tmp_path / "tune: ü  v1.5"))
    done = run_cli("export", source, "--dry-run", "--json")
    assert [file["name"] for file in json.loads(done.stdout)["files"]] == ["tune-v1.5-mxfp4-q8_0.gguf"]
