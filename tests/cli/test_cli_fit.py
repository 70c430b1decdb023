import json
from pathlib import Path

from conftest import run_cli


def test_fit_prints_one_object() -> None:
    """`fit --json` gives every model and scheme, and each total is the sum of its terms."""
    result = run_cli("fit", "--gpu", "4090", "--json")
    answer = json.loads(result.stdout)
    assert result.returncode == 0
    assert {(row["model"], row["scheme"]) for row in answer["results"]} >= {("20b", "hybrid"), ("120b", "nf4")}
    assert all(row["total"] == row["weights"] + row["kv_cache"] for row in answer["results"])
    assert all(row["headroom"] == answer["device"]["usable"] - row["total"] for row in answer["results"])


def test_what_does_not_fit_exits_with_4() -> None:
    """The 120b on a 24 GB card: verdict no, exit code 4, and the widespread INT4 claim is answered."""
    result = run_cli("fit", "--gpu", "24GB", "--model", "120b")
    assert result.returncode == 4
    assert "No 4-bit format squeezes the 120B into 24 GB" in result.stderr


def test_a_checkpoint_folder_is_judged_as_it_is_stored(quantized: dict[str, Path]) -> None:
    """A local checkpoint is weighed by its headers."""
    answer = json.loads(run_cli("fit", "--gpu", "24GB", "--model", quantized["nf4"], "--json").stdout)
    index = json.loads((quantized["nf4"] / "model.safetensors.index.json").read_text())
    assert [row["weights"] for row in answer["results"]] == [index["metadata"]["total_size"]]


def test_wrong_names_end_with_2() -> None:
    """An unknown device, an ambiguous one and an unknown model are sentences that say what to type."""
    for arguments, words in (
        (("--gpu", "9090"), "did you mean"),
        (("--gpu", "a100"), "say which"),
        (("--gpu", "4090", "--model", "7b"), "20b, 120b"),
    ):
        result = run_cli("fit", *arguments)
        assert result.returncode == 2
        assert words in result.stderr
