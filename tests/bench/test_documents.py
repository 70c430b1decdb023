import json
from pathlib import Path
from typing import Any

import pytest

from made_documents import comparison, loaded_result
from ossquant.bench.documents import load_document, load_runs, measured_from_json
from ossquant.bench.gate import parse_gate
from ossquant.bench.quality_result import QualityResult
from ossquant.bench.report.content import load_content
from ossquant.errors import UsageError

QUALITY: dict[str, Any] = {
    "schema_version": 1, "kind": "eval", "created": "2026-11-26T12:00:00+00:00", "ossquant": "0.1.0",
    "reference": {"name": "openai/gpt-oss-20b"}, "settings": {}, "texts": 2, "tokens": 100,
    "candidates": [{
        "name": "nf4", "kind": "checkpoint", "format": "nf4", "nbytes": 12_520_000_000, "parameters": 20_914_757_184,
        "vocab_size": 201_088, "bits_per_weight": 4.79,
        "scenarios": [{"name": "quality", "metrics": {
            "kld_mean": {"value": 0.014, "unit": "nat", "better": "lower", "count": 100, "se": 0.001,
                         "se_tokens": None},
            "length_ratio": {"value": 1.0, "unit": "1", "better": "lower", "count": 2, "se": None, "se_tokens": None,
                             "cut": 0},
        }}],
    }],
}  # fmt: skip


def written(folder: Path, name: str, value: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(value))
    return path


def test_kinds(tmp_path: Path) -> None:
    """A result, an evaluation and a comparison are each read as what they are."""
    made = comparison()
    assert load_document(written(tmp_path, "c.json", made.to_json())) == made
    result = loaded_result()
    assert load_document(written(tmp_path, "r.json", result.to_json())) == result
    quality = load_document(written(tmp_path, "e.json", QUALITY))
    assert isinstance(quality, QualityResult)
    assert quality.candidates[0].metrics["kld_mean"].value == 0.014


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema_version",), 2, "e has schema version 2, this ossquant reads 1"),
        (("tokens",), "100", "e: tokens is not a count"),
        (("more",), 1, "e has an unknown key 'more'"),
        (("candidates", 0, "nbytes"), -1, "e: candidates 0: nbytes is not a count"),
        (("candidates", 0, "scenarios"), [], "e: candidates 0: scenarios are 0, not one"),
        (("candidates", 0, "scenarios", 0, "name"), "x", "e: candidates 0: scenarios 0 is not 'quality'"),
        (("candidates", 0, "scenarios", 0, "metrics"), {"kld": {}}, "unknown metric 'kld'"),
        (("candidates", 0, "scenarios", 0, "metrics"), {"ppl": {}}, "metrics ppl has no 'value'"),
    ],
)
def test_a_broken_evaluation(path: tuple[Any, ...], value: Any, said: str) -> None:
    """What is wrong in an evaluation is named by its place."""
    raw = json.loads(json.dumps(QUALITY))
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(UsageError) as caught:
        measured_from_json(raw, "e")
    assert said in caught.value.message


def test_quality_is_gated(tmp_path: Path) -> None:
    """An absolute limit on KLD is held against every candidate by its name."""
    path = written(tmp_path, "e.json", QUALITY)
    for bound, verdict in ((0.02, "ok"), (0.01, "failed")):
        content = load_content([path], parse_gate({"kld_mean": {"max": bound}}, "g"))
        (limit,) = content.entries[0].limits
        assert (limit.scenario, limit.value, limit.verdict, content.verdict) == ("nf4", 0.014, verdict, verdict)


def test_a_gate_on_what_is_not_there(tmp_path: Path) -> None:
    """A report on a file that the gate cannot be applied to is written, and is inconclusive."""
    content = load_content([written(tmp_path, "e.json", QUALITY)], parse_gate({"ttft": {"max": 1}}, "g"))
    assert content.verdict == "inconclusive"
    assert "has no ttft in any scenario" in content.entries[0].problem


def test_runs_of_a_folder(tmp_path: Path) -> None:
    """A folder's files are runs in the order of their names; a file is one run."""
    for index in range(3):
        written(tmp_path, f"{index:04}.json", loaded_result(1 + index).to_json())
    runs = load_runs(tmp_path, "base")
    assert runs.results == tuple(loaded_result(1 + index) for index in range(3))
    assert load_runs(tmp_path / "0001.json", "base").results == (loaded_result(2),)


def test_what_makes_no_runs(tmp_path: Path) -> None:
    """An empty folder, a comparison and a file that is not there are usage errors."""
    with pytest.raises(UsageError, match=r"no \.json file"):
        load_runs(tmp_path, "base")
    with pytest.raises(UsageError, match="is a comparison, not a result"):
        load_runs(written(tmp_path, "c.json", comparison().to_json()), "base")
    with pytest.raises(UsageError, match="No such file"):
        load_runs(tmp_path / "away.json", "base")
