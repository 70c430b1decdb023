import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from endless import make_endless

from conftest import run_cli


def test_run_answers_and_says_where_the_model_sits(quantized: dict[str, Path]) -> None:
    """The answer alone is on stdout; how much is in 4 bits, and where, is on stderr."""
    result = run_cli("run", quantized["nf4"], "What is the capital of France?")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The capital of France is Paris.\n"
    assert "parameters in 4 bits" in result.stderr
    assert "on cpu" in result.stderr


def test_run_quantizes_the_published_checkpoint_on_load(trained: Path) -> None:
    """The published checkpoint runs too, as hybrid if nothing is said."""
    result = run_cli("run", trained, "What is the capital of France?", "--json")
    answer = json.loads(result.stdout)
    assert answer["final"] == "The capital of France is Paris."
    assert answer["finish_reason"] == "stop"
    assert answer["parameters_4bit"] > 0.8 * answer["parameters"]


def test_run_errors_are_sentences(tmp_path: Path, quantized: dict[str, Path]) -> None:
    """A wrong path or dtype ends with one sentence and the right exit code."""
    nowhere = run_cli("run", tmp_path / "nowhere", "Hi")
    assert nowhere.returncode == 2
    assert "no checkpoint at" in nowhere.stderr
    dtype = run_cli("run", quantized["nf4"], "Hi", "--dtype", "bf61")
    assert dtype.returncode == 2
    assert "Traceback" not in nowhere.stderr + dtype.stderr


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([" "], "the prompt is empty"),
        (["-"], "the prompt is empty"),
        (["Hi", "--reasoning-effort", "huge"], "'huge' is not one of 'low', 'medium', 'high'"),
        (["Hi", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["Hi", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
    ],
)
def test_run_refuses_before_it_loads(wrong: list[str], told: str, tmp_path: Path) -> None:
    """An empty prompt or an impossible option ends with 2, and the checkpoint is not even looked for."""
    done = run_cli("run", tmp_path / "nowhere", *wrong, input=" \n")
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "nowhere" not in done.stderr


def test_run_takes_instructions_and_stdin(trained: Path) -> None:
    """--system stands before the prompt, - reads it from stdin; --warmup is timed, and the answer is the same."""
    done = run_cli("run", trained, "-", "--system", "Answer with one word.", "--warmup", "--json",
                   input="What is the capital of France?\n")  # fmt: skip
    answer = json.loads(done.stdout)
    assert (answer["final"], answer["finish_reason"]) == ("Paris", "stop")
    assert answer["analysis"] == "One word is wanted: Paris."
    assert answer["warm_up_seconds"] > 0 and answer["load_seconds"] > 0
    assert "warmed up in" in done.stderr


def test_ctrl_c_keeps_what_was_said(trained: Path, tmp_path: Path) -> None:
    """Ctrl-C ends an answer with exit code 130: what was said is on stdout, its speed on stderr, and no traceback."""
    endless = make_endless(trained, tmp_path / "endless")
    command = [str(Path(sys.executable).parent / "ossquant"), "run", endless, "Hi", "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert first + rest.rstrip("\n")
    assert rest.endswith("\n")
    assert "stopped by Ctrl-C" in told
    assert "Traceback" not in told


def test_warmup_tells_what_it_saved(quantized: dict[str, Path]) -> None:
    """`warmup --json` prints the seconds of loading, warming up, and to the first token before and after."""
    done = run_cli("warmup", quantized["nf4"], "--json")
    measured = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert measured.pop("device") == "cpu"
    assert set(measured) == {"load_seconds", "warm_up_seconds", "ttft_cold_seconds", "ttft_warm_seconds"}
    assert all(seconds > 0 for seconds in measured.values())
