import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conftest import run_cli
from ossquant.bench.metrics import QUALITY
from ossquant.bench.quality import Estimate
from ossquant.bench.quality_result import quality_from_json
from ossquant.cli import evaluate_view, main

FAST = ("--prompts", "8", "--max-new-tokens", "40", "--answers", "1", "--no-speed", "--device-map", "cpu")


@pytest.fixture(scope="module")
def kept(trained: Path, quantized: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference run that other tests read."""
    folder = tmp_path_factory.mktemp("eval") / "kept"
    done = run_cli("eval", quantized["nf4"], "--against", trained, "--reference", folder, *FAST)
    assert done.returncode == 0, done.stderr
    return folder


def test_one_table_for_all(trained: Path, quantized: dict[str, Path], kept: Path, tmp_path: Path) -> None:
    """Formats stand side by side, narrow enough for 80 columns, their picture is drawn, the kept reference is read."""
    names = [quantized[scheme] for scheme in ("hybrid", "nf4", "fp4")]
    done = run_cli("eval", *names, "--against", trained, "--reference", kept, "--plot", tmp_path / "p.svg", *FAST)
    assert done.returncode == 0, done.stderr
    assert f"reference: kept in {kept}" in done.stderr.replace("\n", "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in done.stdout
    assert [line.split()[0] for line in lines if line.startswith(("hybrid", "nf4", "fp4"))] == 3 * [
        "hybrid", "nf4", "fp4"
    ]  # fmt: skip
    picture = ElementTree.parse(tmp_path / "p.svg")  # noqa: S314
    assert {"hybrid", "nf4", "fp4"} <= {each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")}


def test_json_is_one_object(trained: Path, quantized: dict[str, Path], kept: Path) -> None:
    """--json prints one object of version 1, which gates and reports read back, every metric with its errors."""
    arguments = [option for option in FAST if option != "--no-speed"]
    done = run_cli("eval", quantized["hybrid"], "--against", trained, "--reference", kept, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["schema_version"], printed["kind"], printed["texts"]) == (1, "eval", 8)
    (candidate,) = quality_from_json(printed, "printed").candidates
    assert candidate.name == str(quantized["hybrid"])
    assert candidate.metrics.keys() == QUALITY.keys()
    assert candidate.metrics["kld_mean"].count == printed["tokens"] > 100
    assert candidate.metrics["kld_mean"].se and candidate.metrics["kld_mean"].se_tokens
    assert candidate.metrics["decode_tokens_per_second"].value > 1


@pytest.mark.parametrize(
    ("value", "se", "shown"),
    [
        (0.0037, 0.0015, "0.0037 ±0.0015"),
        (1.00039, 0.00023, "1.00039 ±0.00023"),
        (0.99939, 0.0000123, "0.999390 ±1e-05"),
        (3.15e-7, 1.3e-8, "3.15e-07 ±1e-08"),
        (123.4, 12.0, "123 ±12"),
        (1.0, 0.0, "1 ±0"),
        (1.32, None, "1.32"),
    ],
)
def test_an_error_says_how_many_digits_count(value: float, se: float | None, shown: str) -> None:
    """A figure is shown to the second digit of its error, and in as much room as a table has."""
    assert evaluate_view.figure(Estimate(value, se, None)) == shown
    assert len(shown) <= 16


def test_long_names_leave_room() -> None:
    """Names are shown by their last part, in full where two have the same, and never longer than there is room."""
    names = ["/a/nf4", "/b/nf4", "openai/gpt-oss-120b-and-a-very-long-name.gguf", "hybrid"]
    assert evaluate_view.labels(names) == ["/a/nf4", "/b/nf4", "gpt-oss-1…-name.gguf", "hybrid"]


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        (["--reference", "{kept}", "--temperature", "0"], 2, "was made with temperature 1.0, not 0.0"),
        (["--reference", "{damaged}"], 3, "is not as manifest.json has it"),
        (["--reference", "{folder}"], 2, "is no reference run"),
        (["--text", "{folder}/broken.jsonl"], 2, "broken.jsonl, line 2: not JSON"),
        (["--text", "{folder}/short.txt"], 2, "short.txt has"),
        (["--text", "{folder}/nothing.txt"], 2, "No such file"),
        (["--plot", "{folder}/no/p.svg"], 2, "--plot: no folder"),
        (["--plot", "p.svg", "--plot-x", "speed"], 2, "--plot-x speed needs the speeds"),
        (["--max-memory", "lots"], 2, "--max-memory: 'lots' is no cap"),
        (["--dtype", "bf61"], 2, "unknown dtype 'bf61'"),
        (["{folder}/nowhere"], 2, "no checkpoint at"),
        (["{folder}/damaged.gguf"], 3, "no sound GGUF file"),
    ],
)
def test_errors_are_sentences(
    wrong: list[str], code: int, told: str, trained: Path, quantized: dict[str, Path], kept: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What cannot be meant or read ends with one sentence, the right exit code and nothing on stdout or in the cache.

    In this process, for every other one takes seconds to import torch.
    """
    (tmp_path / "broken.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages"\n')
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(3))
    damaged = shutil.copytree(kept, tmp_path / "damaged")
    (damaged / "states.safetensors").write_bytes(b"")
    places = {"kept": kept, "folder": tmp_path, "damaged": damaged}
    asked = [str(quantized["nf4"]), *(part.format(**places) for part in wrong), "--against", str(trained), *FAST]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["ossquant", "eval", *asked])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (code, ""), printed.err
    assert told in printed.err.replace("\n", "")
    assert not (tmp_path / "cache").exists()


def test_ctrl_c_leaves_no_reference(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C while the reference answers ends with 130 and one sentence, and nothing is kept."""
    (tmp_path / "b.txt").write_text("The capital of France is Paris. A clear sky is blue. " * 20_000)
    command = [str(Path(sys.executable).parent / "ossquant"), "eval", quantized["nf4"], "--against", trained,
               "--reference", tmp_path / "kept", "--text", tmp_path / "b.txt", "--no-speed"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert " runs; " in process.stderr.readline()  # which takes the better part of a minute
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert "interrupted after 0 of 1 checkpoints" in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_a_gguf_file_needs_its_library(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Where llama-cpp-python is not installed, a GGUF candidate ends with the pip line that installs it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "a.gguf", "gpt-oss")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    absent = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "llama_cpp":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Absent())
from ossquant.bench.quality import Estimate
from ossquant.cli import evaluate_view, main
main()
"""
    command = [sys.executable, "-c", absent, "eval", tmp_path / "a.gguf", "--against", trained]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-2:] == [
        "error: a GGUF file is computed by llama-cpp-python, which is not installed: No module named 'llama_cpp'",
        "  try: pip install llama-cpp-python",
    ]
