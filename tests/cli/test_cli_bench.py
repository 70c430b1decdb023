"""ossquant bench as a user runs it: answers, exit codes, files, Ctrl-C."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from conftest import run_cli
from ossquant.bench.result_reader import from_json, load_result
from ossquant.bench.selftest import Check
from ossquant.cli.bench_view import print_checks
from small_servers import MODEL, delta, plain, serving, stream, words

FEW = ("--requests", "4", "--new-tokens", "8", "--warm-up", "0")


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "aiohttp":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Absent())
from ossquant.cli import main
main()
"""
BARE = [sys.executable, "-c", WITHOUT, "bench"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server without quirks."""
    with serving(plain) as served:
        yield served


def test_a_server_is_measured(url: str) -> None:
    """A table a scenario on stdout, what was adapted and what is missing on stderr."""
    done = run_cli("bench", url, *FEW, "--concurrency", "1,2", "--rate", "50")
    assert done.returncode in (0, 5), done.stderr
    for name in ("single", "concurrency=2", "rate=50"):
        assert f"{MODEL} on unknown, {name}" in done.stdout
    for row in ("TTFT", "TTFA", "TPOT", "ICL", "E2E", "queue delay", "out tokens/s", "requests/s"):
        assert row in done.stdout
    assert "streams its reasoning as reasoning_content" in done.stderr
    assert "not measured" in done.stderr


def test_json_is_a_result(url: str, tmp_path: Path) -> None:
    """--json prints what result.json holds, and it reads back; requests.jsonl has a line a request, without text."""
    slo = "ttft=5s,tpot=500ms"
    done = run_cli("bench", url, *FEW, "--json", "--output", tmp_path / "out", "--slo", slo, "--usd-per-hour", "2")
    result = from_json(json.loads(done.stdout))
    assert load_result(tmp_path / "out/result.json") == result
    (scenario,) = result.scenarios
    assert scenario.requests.succeeded == 4
    assert scenario.metrics["goodput"].value == scenario.metrics["requests_per_second"].value
    assert scenario.metrics["usd_per_million_tokens"].value > 0
    assert scenario.metrics["peak_host_bytes"].value > 10**7  # this process serves
    assert scenario.counts["output_tokens"]["median"] == 8
    assert result.settings["slo"] == {"ttft": 5.0, "tpot": 0.5}
    assert {"python", "platform", "cpu", "devices", "packages", "git", "server"} <= set(result.environment)
    rows = [json.loads(line) for line in (tmp_path / "out/requests.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert all(len(row["chunks"]) == 8 and row["output_tokens"] == 8 for row in rows)
    assert not {"messages", "final"} & set(rows[0])


def test_text_is_saved_if_asked(url: str, tmp_path: Path) -> None:
    """--save-text keeps prompts and answers; every prompt begins with a nonce of its own."""
    run_cli("bench", url, *FEW, "--output", tmp_path, "--save-text")
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert rows[0]["final"] == " b b b b"
    nonces = {row["messages"][0]["content"].split("]")[0] for row in rows}
    assert len(nonces) == 4


def test_a_dataset_is_asked(tmp_path: Path) -> None:
    """The prompts of --dataset are what the server is asked."""
    seen: list[str] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        seen.append(body["messages"][-1]["content"])
        return await plain(request, body)

    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Why is the sky blue?"}\n')
    with serving(answer) as served:
        run_cli("bench", served, *FEW, "--dataset", path)
    assert sum(text.endswith("Why is the sky blue?") for text in seen) == 4


def test_a_broken_dataset_is_named(url: str, tmp_path: Path) -> None:
    """The broken line's number is in the error; wrong usage is exit code 2."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": \n')
    done = run_cli("bench", url, *FEW, "--dataset", path)
    assert done.returncode == 2
    assert "data.jsonl line 2: not JSON" in done.stderr


async def no_key(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A server that wants another key."""
    return web.json_response({"error": {"message": "invalid api key"}}, status=401)


async def no_model(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A server of other models."""
    return web.json_response({"error": {"message": "no such model"}}, status=404)


async def html(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A portal that answers for a server."""
    return web.Response(text="<html>Log in</html>", content_type="text/html")


async def empty(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """A stream that ends without a word."""
    return await stream(request, [], done=False)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (no_key, "refuses the key: HTTP 401: invalid api key"),
        (no_model, "does not serve 'gpt-oss-20b': HTTP 404: no such model"),
        (html, "answers with an answer of type text/html in place of a stream"),
        (empty, "answers with an empty stream"),
    ],
    ids=["401", "404", "html", "empty"],
)
def test_a_server_that_does_not_answer_as_it_should(answer: Any, said: str) -> None:
    """One sentence, exit code 6."""
    with serving(answer) as served:
        done = run_cli("bench", served, *FEW)
    assert done.returncode == 6
    assert done.stderr.splitlines()[0] == f"error: {served}/v1 {said}"
    assert len(done.stderr.splitlines()) == 2
    assert done.stdout == ""


def test_a_server_that_is_down() -> None:
    """Nobody listens: one sentence, exit code 6."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    done = run_cli("bench", f"http://127.0.0.1:{port}")
    assert done.returncode == 6
    assert done.stderr.startswith(f"error: http://127.0.0.1:{port}/v1: no server there: Connection refused\n")


def test_tls_errors(url: str, tmp_path: Path) -> None:
    """https to a plain server, and a certificate that nobody signed: one sentence each, exit code 6."""
    plainly = run_cli("bench", url.replace("http", "https"))
    assert plainly.returncode == 6
    assert "/v1: no TLS there: " in plainly.stderr
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1", "-days", "1",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    with serving(plain, tls=context) as served:
        refused = run_cli("bench", served, *FEW)
        trusted = run_cli("bench", served, *FEW, env=os.environ | {"SSL_CERT_FILE": str(certificate)})
    assert refused.returncode == 6
    assert "its certificate is not accepted: self-signed certificate" in refused.stderr
    assert "SSL_CERT_FILE" in refused.stderr
    assert trusted.returncode in (0, 5), trusted.stderr


def test_the_key_is_sent_and_stands_nowhere(tmp_path: Path) -> None:
    """The server gets the key of --api-key-env; no output, file or error has it."""
    keys: list[str] = []

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        keys.append(request.headers.get("Authorization", ""))
        return await plain(request, body)

    env = os.environ | {"MY_KEY": "sk-very-secret"}
    with serving(answer) as served:
        arguments = ("--api-key-env", "MY_KEY", "--json", "--output", tmp_path, "--save-text")
        done = run_cli("bench", served, *FEW, *arguments, env=env)
    assert set(keys) == {"Bearer sk-very-secret"}
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "secret" not in done.stdout + done.stderr + written


def test_a_run_with_failures_is_no_result() -> None:
    """Requests that failed make the run invalid: it is printed, the reason said, exit code 5."""
    count = 0

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal count
        count += 1
        return await plain(request, body) if count != 4 else web.json_response({"error": "oom"}, status=500)

    with serving(answer) as served:
        done = run_cli("bench", served, *FEW)
    assert done.returncode == 5
    assert "no result: single: 1 of 4 requests failed: HTTP 500: oom" in done.stderr
    assert "single (no result): 3 of 4 requests" in done.stdout


def test_counts_are_held_against_a_tokenizer(trained: Path) -> None:
    """A server whose usage is not what it streamed is caught by --tokenizer."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        said = [
            delta(reasoning_content="a"),
            delta(content="b"),
            delta(finish="length", usage={"completion_tokens": 90}),
        ]
        return await stream(request, said)

    with serving(answer) as served:
        done = run_cli("bench", served, *FEW, "--tokenizer", trained)
    assert done.returncode == 5
    assert "counts disagree in 4 of 4 answers: usage says 90, the tokenizer 2" in done.stderr


def test_a_warm_cache_is_no_result() -> None:
    """A prompt that was cached although it was new makes the run invalid."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        length = 60 + len(body["messages"][0]["content"].split())
        cached = {"prompt_tokens_details": {"cached_tokens": length - 1}}
        return await stream(request, words(8, prompt=length, **cached))

    with serving(answer) as served:
        done = run_cli("bench", served, *FEW, "--prompt-tokens", "500")
    assert done.returncode == 5
    assert "no result: single: the cache was warm: " in done.stderr


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    """Ctrl-C in the second scenario: the first is whole, the second marked partial, exit code 130."""
    at_once = done = 0

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        nonlocal at_once, done
        at_once += 1
        answered = await stream(request, words(8), pause=0.02)
        at_once, done = at_once - 1, done + 1
        return answered

    program = [str(Path(sys.executable).parent / "ossquant"), "bench"]
    load = ["--concurrency", "1,2", "--requests", "20", "--new-tokens", "8", "--warm-up", "0"]
    with serving(answer) as served:
        command = [*program, served, *load, "--json", "--output", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        _wait(lambda: at_once == 2)
        before = done
        _wait(lambda: done > before + 2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    result = from_json(json.loads(stdout))
    assert result.partial
    assert [scenario.name for scenario in result.scenarios] == ["single", "concurrency=2"]
    assert [scenario.partial for scenario in result.scenarios] == [False, True]
    assert result.scenarios[0].requests.succeeded == 20
    assert 0 < result.scenarios[1].requests.succeeded < 20
    assert load_result(tmp_path / "result.json") == result
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def _wait(there: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not there():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_checkpoint_gives_the_same_kind_of_result(quantized: dict[str, Path], tmp_path: Path) -> None:
    """In this process, without aiohttp: the same schema, the checkpoint's hash, a roofline for a named device."""
    arguments = ("--prompt-tokens", "16", "--new-tokens", "4", "--runs", "2", "--gpu", "4090", "--output", tmp_path)
    command = [*BARE, *map(str, (quantized["hybrid"], *arguments)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = from_json(json.loads(done.stdout))
    (scenario,) = result.scenarios
    assert (result.target.kind, scenario.name, scenario.requests.succeeded) == ("checkpoint", "single", 2)
    assert scenario.counts["prefill_tokens_per_second"] == pytest.approx(16 / scenario.metrics["ttft"].value)
    assert scenario.metrics["peak_host_bytes"].value > 10**8
    assert 0 < scenario.metrics["roofline_share"].value < 1
    assert scenario.metrics["tpot"].count == 2
    assert len(result.environment["checkpoint_sha256"]) == 64
    assert {"mxfp4", "nf4"} <= set(result.environment["model"]["bytes_by_format"])
    assert "power_watts" not in scenario.metrics
    assert scenario.unmeasured["power_watts"] == "the model runs on the host"
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--concurrency", "4"), "a checkpoint in this process answers one stream"),
        (("--dataset", "x.jsonl"), "a checkpoint in this process is asked random tokens"),
        (("--slo", "ttfx=1s"), "--slo knows no 'ttfx'"),
        (("--slo", "ttft=soon"), "--slo: 'ttft=soon' is no limit"),
        (("--concurrency", "many"), "--concurrency: 'many' are no numbers"),
        (("--rate", "-1"), "a rate is above 0"),
        (("--tokenizer", "/nowhere"), "/nowhere is not there"),
        (("--timeout", "0"), "--timeout and --seconds must be above 0"),
    ],
)
def test_wrong_usage_is_a_sentence(arguments: tuple[str, ...], said: str, trained: Path) -> None:
    """One sentence, exit code 2, before anything is loaded."""
    done = run_cli("bench", trained, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_selftest_prints_measured_beside_true(capsys: pytest.CaptureFixture[str]) -> None:
    """A table a server: what was measured beside what is true, a column a number of streams; what is off is marked."""
    print_checks([
        Check("reasoning", 1, "ttft", "s", 0.2014, 0.2005, 0.2),
        Check("reasoning", 16, "ttft", "s", 0.25, 0.2005, 0.2),
        Check("stall", 1, "requests_per_second", "1/s", 1.26, 1.26, None),
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.splitlines() == [
        "reasoning: measured / true",
        "              1 stream          16 streams",
        "TTFT  201.4 / 200.5 ms  250.0 / 200.5 ms !",
        "stall: measured / true",
        "               1 stream  16 streams",
        "requests/s  1.26 / 1.26",
    ]


def test_help_defines_every_metric() -> None:
    """--help says what each metric is."""
    from ossquant.bench.metrics import METRICS

    text = " ".join(run_cli("bench", "--help").stdout.split())
    for name, kind in METRICS.items():
        assert f"{name}: {kind.definition}" in text


def test_without_aiohttp() -> None:
    """A server takes the extra `bench`, and the error says so."""
    done = subprocess.run([*BARE, "http://127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: measuring a server needs 'aiohttp', which is not installed",
        "  try: pip install 'ossquant[bench]'",
    ]
