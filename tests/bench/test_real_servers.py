"""Real servers on the small trained model: what is measured, held against what they and others say."""

import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import run_cli
from ossquant.bench.asked import Asked, Measured
from ossquant.bench.endpoint import find_endpoint
from ossquant.bench.run import measure_endpoint
from ossquant.bench.shape import make_shapes
from ossquant.bench.tokens import load_tokenizer

LLAMA_SERVER = os.environ.get("OSSQUANT_LLAMA_SERVER", "")
START_SECONDS = 90
BUSY = "the client is saturated"  # what other programs on this machine may cause


@contextmanager
def started(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Run a server until the end of the context; what it says goes to log. Yields its URL."""
    with log.open("wb") as file:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    try:
        until = time.monotonic() + START_SECONDS
        while not healthy(port):
            assert server.poll() is None and time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def healthy(port: int) -> bool:
    """Whether the server answers on /health."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def measured(url: str, trained: Path, requests: int, output_tokens: int, ignore_eos: bool = False) -> Measured:
    """Measure with the model's own tokenizer beside the server's counts."""
    asked = Asked(
        make_shapes([1], [], 1), requests=requests, output_tokens=output_tokens, prompt_tokens=150,
        model=str(trained), tokenizer=load_tokenizer(str(trained)), ignore_eos=ignore_eos,
    )  # fmt: skip
    return measure_endpoint(find_endpoint(url), asked, announce=lambda note: None, on_progress=lambda *counts: None)


def blocking(port: int, body: dict[str, object]) -> tuple[float, float]:
    """The same request by Python's own http.client: seconds to the first text, and to the last."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    times = []
    while line := response.readline():
        if b'"content":"' in line or b'"reasoning_content":"' in line:
            times.append(time.perf_counter() - began)
    connection.close()
    return times[0], times[-1]


def test_transformers_serve(trained: Path, tmp_path: Path) -> None:
    """transformers serve: what it refuses is left out, its counts agree with the tokenizer, and times with a plain
    blocking client that sends the same requests in turns."""
    port = free_port()
    program = str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", str(trained), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with started(command, port, tmp_path / "log") as url:
        ours, theirs = [], []
        for _ in range(2):
            run = measured(url, trained, requests=4, output_tokens=24, ignore_eos=True)
            traces = run.traces["single"]
            ours += [(trace.ttft, trace.e2e) for trace in traces]
            for trace in traces:
                body = {"model": str(trained), "messages": list(trace.messages), "stream": True, "max_tokens": 24}
                theirs.append(blocking(port, body))
    scenario = run.result.scenarios[0]
    settings = run.result.settings
    assert run.result.target.engine == "transformers"
    assert not {"ignore_eos", "min_tokens"} & set(settings["accepted"])
    assert any("refuses min_tokens, ignore_eos" in note for note in settings["adapted"])
    assert scenario.requests.succeeded == 4
    assert [reason for reason in scenario.invalid if BUSY not in reason] == []
    assert scenario.counts["output"] == scenario.counts["input"] == "usage"
    assert 0 <= scenario.counts["hidden_tokens"]["min"] <= scenario.counts["hidden_tokens"]["max"] <= 12
    assert scenario.counts["input_tokens"]["median"] == pytest.approx(150, abs=25)
    assert scenario.metrics["peak_host_bytes"].value > 10**8
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        assert statistics.median(mine) == pytest.approx(statistics.median(other), rel=0.5, abs=0.03)


TIMING = re.compile(
    r"prompt eval time =\s+([\d.]+) ms /\s+(\d+) tokens.*?\n.*?eval time =\s+([\d.]+) ms /\s+(\d+) tokens"
)


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_SERVER, reason="OSSQUANT_LLAMA_SERVER does not name a llama-server")
def test_llama_server(trained: Path, tmp_path: Path) -> None:
    """llama.cpp's server, where OSSQUANT_LLAMA_SERVER names one: skipped elsewhere, for there is no package of it.

    Tokens are those of its log, request by request; prompt and decode times agree with what it timed itself.
    """
    assert run_cli("export", trained, tmp_path / "gguf", "--to", "gguf").returncode == 0
    (model,) = (tmp_path / "gguf").glob("*.gguf")
    port, log = free_port(), tmp_path / "log"
    command = [LLAMA_SERVER, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--jinja", "-np", "1",
               "-c", "8192", "-t", "1"]  # fmt: skip
    with started(command, port, log) as url:
        run = measured(url, trained, requests=40, output_tokens=400)
        timings = [(float(p), int(n), float(e), int(m)) for p, n, e, m in TIMING.findall(log.read_text())][-40:]
        beyond = measured(url, trained, requests=10, output_tokens=400, ignore_eos=True)
    traces, scenario = run.traces["single"], run.result.scenarios[0]
    assert run.result.target.engine == "llama.cpp"
    assert run.result.settings["connections"] == "one a request"
    assert "timings_per_token" in run.result.settings["accepted"]
    assert scenario.requests.succeeded == 40
    assert [reason for reason in scenario.invalid if BUSY not in reason] == []
    assert scenario.counts["hidden_tokens"]["median"] <= 16
    assert [trace.usage.completion for trace in traces] == [tokens for *_, tokens in timings]
    assert [(trace.usage.prompt or 0) - (trace.usage.cached or 0) for trace in traces] == [n for _, n, *_ in timings]
    waited = [trace.ttft - prompt / 1000 for trace, (prompt, *_) in zip(traces, timings, strict=True)]
    assert 0 < statistics.median(waited) < 0.1  # HTTP, the template and the slot on top of the prompt
    theirs = statistics.median(timed / tokens for *_, timed, tokens in timings) / 1000
    assert scenario.metrics["tpot"].value == pytest.approx(theirs, rel=0.1)
    assert any("went on unseen" in reason for reason in beyond.result.scenarios[0].invalid)
