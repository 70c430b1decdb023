import json
from pathlib import Path

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


def test_bench_prints_one_object(quantized: dict[str, Path]) -> None:
    """`bench --json` prints rates, TTFT and peak memory as one JSON object."""
    arguments = ("--prompt-tokens", "16", "--new-tokens", "4", "--runs", "1", "--json")
    result = run_cli("bench", quantized["hybrid"], *arguments)
    measured = json.loads(result.stdout)
    assert result.returncode == 0, result.stderr
    assert measured["decode_tokens_per_second"] > 0
    assert measured["prefill_tokens_per_second"] > 0
    assert measured["peak_host_bytes"] > 10**8


def test_run_errors_are_sentences(tmp_path: Path, quantized: dict[str, Path]) -> None:
    """A wrong path or dtype ends with one sentence and the right exit code."""
    nowhere = run_cli("run", tmp_path / "nowhere", "Hi")
    assert nowhere.returncode == 2
    assert "no checkpoint at" in nowhere.stderr
    dtype = run_cli("run", quantized["nf4"], "Hi", "--dtype", "bf61")
    assert dtype.returncode == 2
    assert "Traceback" not in nowhere.stderr + dtype.stderr
