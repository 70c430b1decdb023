"""Exports that are safetensors: a fine-tune as transformers 5 saves it becomes what servers load, and is whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ossquant.checkpoint.manifest import MANIFEST
from ossquant.checkpoint.reader import INDEX, open_checkpoint
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.export import safetensors
from ossquant.export.target import TARGETS
from ossquant.quantize import QuantizeReport
from ossquant.verify import verify

SAFETENSORS = [name for name, target in TARGETS.items() if target.recipe]
PROMPT = "What is the capital of France? Größe 東京"


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory: pytest.TempPathFactory, quantized: dict[str, Path]) -> Path:
    """The trained model, model and tokenizer as transformers 5 itself saves them, in bf16."""
    folder = tmp_path_factory.mktemp("fine-tune") / "mine"
    load(quantized["bf16"]).save_pretrained(folder)
    AutoTokenizer.from_pretrained(quantized["bf16"]).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()


def logits(folder: Path) -> torch.Tensor:
    """Logits of all positions, as plain transformers computes them."""
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = load(folder)(ids).logits
    return found


def export(source: Path, output: Path, target: str, **options: Any) -> QuantizeReport:
    recipe = TARGETS[target].recipe
    assert recipe is not None
    return safetensors.export(source, output, TARGETS[target], recipe, **options)


def plan(source: Path, target: str) -> safetensors.ExportPlan:
    recipe = TARGETS[target].recipe
    assert recipe is not None
    with open_checkpoint(source) as checkpoint:
        return safetensors.plan_export(checkpoint, TARGETS[target], recipe, str(source))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_source_is_what_transformers_saves(fine_tune: Path) -> None:
    """The source of these tests has rope_parameters in place of the published keys, and bf16 experts."""
    assert config_of(fine_tune).keys() & {"rope_scaling", "rope_theta", "rope_parameters"} == {"rope_parameters"}
    with open_checkpoint(fine_tune) as checkpoint:
        assert {total.scheme.format for total in checkpoint.plan.by_role()} == {"bf16"}


@pytest.mark.parametrize("target", SAFETENSORS)
def test_config(fine_tune: Path, trained: Path, target: str, tmp_path: Path) -> None:
    """config.json has positions under the published keys with the published values; all else is the source's."""
    export(fine_tune, tmp_path / "out", target)
    source, result = config_of(fine_tune), config_of(tmp_path / "out")
    published = config_of(trained)
    for key in ("rope_scaling", "rope_theta"):
        assert result.pop(key) == published[key]
    assert source.pop("rope_parameters")
    assert result.pop("quantization_config")
    assert result == source


@pytest.mark.parametrize("target", SAFETENSORS)
def test_side_files(fine_tune: Path, target: str, tmp_path: Path) -> None:
    """generation_config, tokenizer and chat template are copied byte for byte."""
    export(fine_tune, tmp_path / "out", target)
    names = {path.name for path in fine_tune.iterdir() if path.suffix != ".safetensors"} - {"config.json", INDEX}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (fine_tune / name).read_bytes()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == names | {"config.json", "model.safetensors", MANIFEST}


@pytest.mark.parametrize("target", SAFETENSORS)
@pytest.mark.parametrize("shard_size", [None, 700_000], ids=["one file", "shards"])
def test_whole(fine_tune: Path, target: str, shard_size: int | None, tmp_path: Path) -> None:
    """What is written is whole by its manifest, and has the bytes that were planned."""
    report = export(fine_tune, tmp_path / "out", target, max_shard_size=shard_size)
    found = verify(tmp_path / "out", fine_tune)
    assert found.whole
    assert found.manifest is not None
    assert found.plan == report.result == plan(fine_tune, target).plan
    assert found.hashes_agree == found.stored
    assert found.side_files_agree == len(found.manifest.side_files)
    assert (report.files > 1) == (shard_size is not None) == (tmp_path / "out" / INDEX).exists()
    assert found.comparison is not None
    worst = found.comparison.tensors[0][1].relative
    assert worst == 0 if target == "mxfp4" else 0 < worst < 0.15


def test_same_logits(fine_tune: Path, tmp_path: Path) -> None:
    """As mxfp4, whose values the weights are, stock transformers computes the source's logits to the last bit."""
    assert export(fine_tune, tmp_path / "out", "mxfp4").mxfp4_error == 0.0
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "mxfp4"
    before, after = logits(fine_tune), logits(tmp_path / "out")
    assert before.shape[1] > 10
    assert torch.equal(before, after)


def test_same_positions(fine_tune: Path, tmp_path: Path) -> None:
    """Transformers reads the same positions from the published keys as from its own."""
    export(fine_tune, tmp_path / "out", "mxfp4")
    before, after = (load(folder).config.rope_parameters for folder in (fine_tune, tmp_path / "out"))
    assert before == after
    assert before["truncate"] is False


def test_loss_is_told(random_bf16: Path, tmp_path: Path) -> None:
    """Of weights that are no MXFP4 values the report says what rounding lost."""
    error = export(random_bf16, tmp_path / "out", "mxfp4").mxfp4_error
    assert error is not None
    assert 0.05 < error < 0.15
    assert verify(tmp_path / "out").whole


@pytest.mark.parametrize(
    ("target", "words"),
    [("mxfp4", []), ("vllm-int4", ["experimental: never executed on a GPU by us"]),
     ("unsloth", ["for unsloth and ossquant alone: stock transformers"])],
)  # fmt: skip
def test_warnings(fine_tune: Path, target: str, words: list[str]) -> None:
    """A user is told what a target is not; of the published layout there is nothing to tell."""
    warnings = plan(fine_tune, target).warnings
    assert len(warnings) == len(words)
    assert all(warning.startswith(word) for warning, word in zip(warnings, words, strict=True))


def test_no_generation_config(fine_tune: Path, tmp_path: Path) -> None:
    """Without generation_config.json a user is told where servers will not stop; the export is whole without it."""
    shutil.copytree(fine_tune, tmp_path / "source", ignore=shutil.ignore_patterns("generation_config.json"))
    assert [w for w in plan(tmp_path / "source", "mxfp4").warnings if w.startswith("no generation_config.json")]
    export(tmp_path / "source", tmp_path / "out", "mxfp4")
    assert not (tmp_path / "out/generation_config.json").exists()
    assert verify(tmp_path / "out").whole


def no_positions(folder: Path) -> None:
    config = {key: value for key, value in config_of(folder).items() if key != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps(config))


def other_positions(folder: Path) -> None:
    config = config_of(folder) | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    (folder / "config.json").write_text(json.dumps(config))


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize("target", SAFETENSORS)
@pytest.mark.parametrize(
    ("damage", "kind", "sentence"),
    [(no_positions, CheckpointError, "neither rope_scaling nor rope_parameters"),
     (other_positions, UnsupportedError, "rope scaling is 'linear', not 'yarn'"),
     (no_tokenizer, CheckpointError, "no tokenizer.json"), (no_template, CheckpointError, "no chat_template.jinja")],
)  # fmt: skip
def test_what_servers_need(
    fine_tune: Path, target: str, damage: Callable[[Path], None], kind: type, sentence: str, tmp_path: Path
) -> None:
    """A source that lacks what every server reads beside the weights is refused before anything is written."""
    source = Path(shutil.copytree(fine_tune, tmp_path / "source"))
    damage(source)
    with pytest.raises(kind, match=sentence):
        plan(source, target)
