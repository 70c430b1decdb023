import json
from pathlib import Path
from typing import Any

import pytest

from ossquant.bench.result import Metric, Requests, Result, Scenario, Target
from ossquant.bench.result_reader import from_json, load_result
from ossquant.errors import UsageError

TTFT = Metric(0.2, "s", "lower", 16, "client", mean=0.21, p50=0.2, p90=0.22, p95=0.23, p99=None)
RESULT = Result(
    created="2026-11-26T12:00:00+00:00",
    ossquant="0.1.0",
    partial=False,
    target=Target("endpoint", "http://127.0.0.1:8000", "gpt-oss-20b", "vllm"),
    environment={"python": "3.11.9"},
    settings={"seed": 0},
    scenarios=(
        Scenario("concurrency=16", {"kind": "closed", "concurrency": 16}, False, ("1 of 17 requests failed",), False,
                 Requests(17, 16, 1, 0), 4.5, {"ttft": TTFT}, {"output": "usage"}, {"power_watts": "no device"}),
    ),
)  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """The result's JSON with one place changed, or removed if value is None."""
    raw = json.loads(json.dumps(RESULT.to_json()))
    *parents, last = path.split("/")
    place = raw
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return raw


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """A result comes back equal from its file."""
    path = tmp_path / "result.json"
    path.write_text(json.dumps(RESULT.to_json()))
    assert load_result(path) == RESULT
    assert not RESULT.valid


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema_version", 2, "r has schema version 2, this ossquant reads 1"),
        ("schema_version", None, "r has schema version none, this ossquant reads 1"),
        ("kind", "fit", "r is no result of ossquant bench"),
        ("target", None, "r has no 'target'"),
        ("target/kind", "moon", "r: target: kind is none of checkpoint, endpoint"),
        ("scenarios/0/metrics/ttft/value", None, "r: scenarios 0: metrics ttft has no 'value'"),
        ("scenarios/0/metrics/ttft/value", float("nan"), "r: scenarios 0: metrics ttft: value is not a finite number"),
        ("scenarios/0/metrics/ttft/value", True, "r: scenarios 0: metrics ttft: value is not a finite number"),
        ("scenarios/0/metrics/ttft/mean", 10**400, "r: scenarios 0: metrics ttft: mean is not a finite number"),
        ("scenarios/0/metrics/itl", {}, "r: scenarios 0: metrics has an unknown metric 'itl'"),
        ("scenarios/0/requests/sent", -1, "r: scenarios 0: requests: sent is not a count"),
        ("scenarios/0/shape", {}, "r: scenarios 0: shape: kind is not a text"),
        ("scenarios/0/valid", 1, "r: scenarios 0: valid is neither true nor false"),
        ("scenarios", {}, "r: scenarios is not a list"),
        ("environment", [], "r: environment is not an object"),
        ("unknown", 1, "r has an unknown key 'unknown'"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, said: str) -> None:
    """One sentence says which place is missing, unknown or wrong; another version is refused."""
    with pytest.raises(UsageError) as caught:
        from_json(changed(path, value), "r")
    assert caught.value.message == said


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'"<html>"'])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """A file that is no result is a UsageError, whatever it holds."""
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        load_result(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A path without a file is a UsageError that names it."""
    with pytest.raises(UsageError, match=r"away\.json: No such file"):
        load_result(tmp_path / "away.json")
