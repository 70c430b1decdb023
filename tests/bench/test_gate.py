from pathlib import Path
from typing import Any

import pytest

from ossquant.bench.gate import DEFAULT, Rule, load_gate, parse_gate
from ossquant.errors import UsageError


def test_rules(tmp_path: Path) -> None:
    """Absolute and relative limits, of the value or of a percentile, everywhere or in some scenarios."""
    path = tmp_path / "gate.toml"
    path.write_text(
        """
        [output_tokens_per_second]
        min = 40
        max_regression = 0.05

        [ttft]
        max = 0.5
        scenarios = ["concurrency=1"]
        p99 = { max = 2.0 }

        [tpot.p90]
        max_regression = 0.1
        """
    )
    gate = load_gate(path)
    assert gate.name == "gate.toml"
    assert gate.rules == (
        Rule("output_tokens_per_second", bound=40.0, max_regression=0.05),
        Rule("ttft", bound=0.5, scenarios=("concurrency=1",)),
        Rule("ttft", "p99", bound=2.0),
        Rule("tpot", "p90", max_regression=0.1),
    )
    assert [rule.name for rule in gate.rules] == ["output_tokens_per_second", "ttft", "ttft.p99", "tpot.p90"]


def test_default() -> None:
    """Without a gate throughput and TTFT may be 2 % worse."""
    assert [(rule.name, rule.max_regression, rule.bound) for rule in DEFAULT.rules] == [
        ("output_tokens_per_second", 0.02, None), ("ttft", 0.02, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "g.toml: no metric has a limit"),
        ({"tttf": {"max": 1}}, "unknown metric 'tttf' .did you mean 'ttft'"),
        ({"ttft": 0.5}, r"\[ttft\] is no table"),
        ({"ttft": {}}, r"\[ttft\] has no limit"),
        ({"ttft": {"maximum": 1}}, r"\[ttft\]: unknown key 'maximum' .did you mean 'max'"),
        ({"ttft": {"max_regresion": 0.1}}, "unknown key 'max_regresion' .did you mean 'max_regression'"),
        ({"ttft": {"p98": {"max": 1}}}, "unknown key 'p98' .did you mean 'p9"),
        ({"ttft": {"p99": {"max": 1, "p50": {}}}}, r"\[ttft\.p99\]: unknown key 'p50'"),
        ({"ttft": {"p99": 0.5}}, r"\[ttft\.p99\] is no table"),
        ({"ttft": {"min": 0.1}}, "'min' limits nothing, lower is better .max = "),
        ({"goodput": {"max": 0.1}}, "'max' limits nothing, higher is better .min = "),
        ({"ttft": {"max": "0.5"}}, "max is not a finite number"),
        ({"ttft": {"max": True}}, "max is not a finite number"),
        ({"ttft": {"max": float("nan")}}, "max is not a finite number"),
        ({"ttft": {"max": 10**400}}, "max is not a finite number"),
        ({"ttft": {"max_regression": 5}}, "a share of the base, 0.05 for 5 %, not 5"),
        ({"ttft": {"max_regression": 0}}, "a share of the base"),
        ({"ttft": {"max": 1, "scenarios": "a"}}, "scenarios must be a list of names"),
        ({"ttft": {"max": 1, "scenarios": []}}, "scenarios is empty"),
        ({"ttft": {"scenarios": ["a"]}}, "has no limit"),
    ],
)
def test_refused(table: dict[str, Any], words: str) -> None:
    """A gate that cannot be meant is refused by the key that is wrong, with the nearest right one."""
    with pytest.raises(UsageError) as caught:
        parse_gate(table, "g.toml")
    assert caught.match(words)
    assert caught.value.message.startswith("g.toml")


@pytest.mark.parametrize("text", [b"[ttft", b"\xff", b"a = " + b"[" * 10**5, b"a = 1\na = 2"])
def test_not_toml(text: bytes, tmp_path: Path) -> None:
    """A file that is not TOML is a usage error that names it."""
    path = tmp_path / "gate.toml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=r"gate\.toml: not readable as TOML"):
        load_gate(path)


def test_no_file(tmp_path: Path) -> None:
    """A gate that is not there, or is a folder, is a usage error that names it."""
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(UsageError, match=path.name):
            load_gate(path)
