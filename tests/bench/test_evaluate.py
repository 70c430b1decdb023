import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from make_checkpoint import TINY, make_checkpoint
from ossquant import load_model
from ossquant.bench import hidden, source
from ossquant.bench.evaluate import Evaluation, evaluate, open_candidate
from ossquant.bench.gguf_candidate import gguf_file
from ossquant.bench.reference import Reference
from ossquant.bench.source import Settings, Source
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.errors import CheckpointError, UsageError

SETTINGS = Settings(prompts=12, max_new_tokens=48, answers=2, speed=False)
OPTIONS = {"device_map": "cpu", "dtype": "float32"}
SCHEMES = ("hybrid", "nf4", "fp4")


@dataclass
class Setting:
    """A source with its reference run, and what each candidate came to."""

    source: Source
    reference: Reference
    found: Mapping[str, Evaluation]


def quiet(what: str) -> Any:
    return lambda done, total: None


def run(source: Source, *names: Path | str) -> list[Evaluation]:
    candidates = [open_candidate(str(name), source, OPTIONS) for name in names]
    return list(evaluate(candidates, source, source.reference(lambda line: None, quiet), quiet))


@pytest.fixture(scope="module")
def setting(trained: Path, quantized: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The trained model answers a dozen prompts; itself and its quantized forms are held against that."""
    folder = tmp_path_factory.mktemp("reference") / "kept"
    source = Source(str(trained), replace(SETTINGS, reference=folder), OPTIONS)
    reference = source.reference(lambda line: None, quiet)
    names = [trained, *(quantized[scheme] for scheme in SCHEMES)]
    found = run(source, *names)
    return Setting(source, reference, dict(zip(("itself", *SCHEMES), found, strict=True)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_are_those_of_a_full_softmax(scheme: str, setting: Setting, quantized: dict[str, Path]) -> None:
    """KLD, PPL and Δp equal those of both models' own logits through a float64 softmax, to 1e-6.

    The other way round: whole texts in one pass, the models' own heads, no hidden states, nothing kept. A single
    token's KLD near 1 is as exact as float32 models are.
    """
    models = [load_model(setting.source.candidate.folder, scheme="mxfp4", **OPTIONS)[0],
              load_model(quantized[scheme], **OPTIONS)[0]]  # fmt: skip
    kld, ln_ratio, delta = [], [], []
    for text in setting.reference.texts:
        with torch.no_grad():
            ids = torch.tensor([text.token_ids])
            p, q = (model(ids).logits[0, text.begin - 1 : -1].double().softmax(-1) for model in models)
        kld.append((p * (p / q).log()).sum(-1))
        at = ids[0, text.begin :].unsqueeze(-1)
        ln_ratio.append((p.gather(-1, at) / q.gather(-1, at)).log())
        delta.append(q.gather(-1, at) - p.gather(-1, at))
    quality = setting.found[scheme].quality
    assert quality["kld_mean"].value == pytest.approx(float(torch.cat(kld).mean()), abs=1e-6)
    assert quality["kld_max"].value == pytest.approx(float(torch.cat(kld).max()), rel=3e-5)
    assert quality["kld_median"].value == pytest.approx(float(np.median(torch.cat(kld))), abs=1e-6)
    assert quality["ln_ppl_ratio"].value == pytest.approx(float(torch.cat(ln_ratio).mean()), abs=1e-6)
    assert quality["delta_p_mean"].value == pytest.approx(100 * float(torch.cat(delta).mean()), abs=1e-4)
    assert quality["kld_mean"].value > 1e-4  # far above the tolerance


def test_the_source_is_itself(setting: Setting) -> None:
    """The reference against itself has a KLD of exactly 0 and all top tokens the same, and answers alike."""
    itself = setting.found["itself"]
    assert itself.quality["kld_max"].value == 0
    assert itself.quality["ppl_ratio"].value == 1
    assert itself.quality["same_top"].value == 100
    assert itself.answers is not None and itself.answers.ratio.value == 1
    assert itself.facts.format == "mxfp4"


def test_coarser_formats_are_further_away(setting: Setting) -> None:
    """FP4 is further from the source than hybrid, which is further than nothing; bytes are the plan's."""
    kld = {name: each.quality["kld_mean"].value for name, each in setting.found.items()}
    assert 0 == kld["itself"] < kld["hybrid"] < kld["fp4"]
    with open_checkpoint(setting.found["nf4"].facts.name) as checkpoint:
        assert setting.found["nf4"].facts.nbytes == checkpoint.plan.nbytes


def test_what_is_scored_is_the_reference_s_own(setting: Setting) -> None:
    """Scored are the tokens of the answers, up to the one that ends them, and no token of a prompt."""
    texts = setting.reference.texts
    assert len(texts) == 12 and all(text.answered for text in texts)
    decode = setting.source.tokenizer.decode
    assert all(decode(text.prompt).endswith("<|start|>assistant") for text in texts)
    assert all(text.scored <= 48 for text in texts)
    ended = [text.token_ids[-1] in setting.reference.stops for text in texts]
    assert all(done or text.scored == 48 for done, text in zip(ended, texts, strict=True)) and any(ended)
    assert setting.found["nf4"].tokens == sum(text.scored for text in texts)


def test_a_kept_reference_is_not_run_again(setting: Setting, quantized: dict[str, Path]) -> None:
    """A second evaluation reads the kept states, never loads the source's model, and gives the same figures."""
    loads: list[str] = []
    again = Source(setting.source.candidate.facts.name, setting.source.settings, OPTIONS | {"announce": loads.append})
    (found,) = run(again, quantized["hybrid"])
    assert loads == []
    assert found.quality == setting.found["hybrid"].quality
    assert found.answers == setting.found["hybrid"].answers


def test_a_reference_of_another_checkpoint_is_refused(setting: Setting, quantized: dict[str, Path]) -> None:
    """Given the folder of a reference run of another checkpoint, nothing is compared."""
    other = Source(str(quantized["nf4"]), setting.source.settings, OPTIONS)
    with pytest.raises(UsageError, match="reference run of another checkpoint"):
        other.reference(lambda line: None, quiet)


def test_pieces_do_not_matter(setting: Setting, quantized: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of few positions at a time, by a head in small pieces, give the same figures."""
    monkeypatch.setattr(hidden, "BLOCK_ROWS", 7)
    monkeypatch.setattr(hidden, "HEAD_ROWS", 100)
    (found,) = run(setting.source, quantized["nf4"])
    for name, estimate in setting.found["nf4"].quality.items():
        assert found.quality[name].value == pytest.approx(estimate.value, abs=1e-6, rel=1e-6)


def test_a_given_text(trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """Plain text and conversations of the user's are scored in place of answers, and no one answers anything."""
    dialogues = json.loads((trained / "dialogues.json").read_text())
    lines = [{"messages": [*each["messages"], {"role": "assistant", "content": each["final"]}]} for each in dialogues]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.txt").write_text("The capital of France is Paris. A clear sky is blue. " * 60)
    for name, window in (("a.jsonl", 512), ("b.txt", 64)):
        settings = replace(SETTINGS, text=tmp_path / name, reference=tmp_path / f"{name}-kept", window=window)
        (found,) = run(Source(str(trained), settings, OPTIONS), quantized["fp4"])
        assert found.answers is None
        assert found.quality["kld_mean"].value > 0
        assert found.texts > 10


def test_few_tokens_are_refused(trained: Path, tmp_path: Path) -> None:
    """Fewer scored tokens than statistics take are refused before anything is kept."""
    settings = replace(SETTINGS, prompts=2, max_new_tokens=4, reference=tmp_path / "kept")
    with pytest.raises(UsageError, match=r"8 scored tokens are too few for statistics, which take 100"):
        Source(str(trained), settings, OPTIONS).reference(lambda line: None, quiet)
    assert not (tmp_path / "kept").exists()


def test_longer_than_the_context_is_refused(trained: Path, tmp_path: Path) -> None:
    """A text beyond the model's context is refused by its number."""
    short = shutil.copytree(trained, tmp_path / "short")
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 128}
    (short / "config.json").write_text(json.dumps(config))
    (tmp_path / "b.txt").write_text("The capital of France is Paris. " * 200)
    settings = replace(SETTINGS, text=tmp_path / "b.txt", window=200, reference=tmp_path / "kept")
    with pytest.raises(UsageError, match=r"text 1 is 200 tokens, the context of .* 128"):
        Source(str(short), settings, OPTIONS).reference(lambda line: None, quiet)


def test_another_tokenizer_is_refused(setting: Setting, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A candidate whose ids mean other tokens is refused, and the first such id is named."""
    other = shutil.copytree(quantized["nf4"], tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    first, second = sorted(words, key=words.get)[100:102]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(UsageError, match="the tokenizers differ: token 100 is"):
        open_candidate(str(other), setting.source, OPTIONS)


def test_another_vocabulary_is_refused(setting: Setting, tmp_path: Path) -> None:
    """A candidate with more tokens than the source is refused."""
    make_checkpoint(tmp_path / "more", replace(TINY, vocab_size=704))
    with pytest.raises(UsageError, match=r"has a vocabulary of 704, .* one of 640"):
        open_candidate(str(tmp_path / "more"), setting.source, OPTIONS)


def broken(checkpoint: Path, folder: Path) -> Path:
    """A copy whose final norm has a NaN."""
    shutil.copytree(checkpoint, folder)
    with open_checkpoint(folder) as opened:
        location = opened.locations["model.norm.weight"]
    raw = bytearray(location.path.read_bytes())
    raw[location.placed.offset : location.placed.offset + 2] = b"\xc0\x7f"
    location.path.write_bytes(raw)
    return folder


def test_nan_is_refused(setting: Setting, trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """A model that computes NaN is an error that names it, as a candidate and as the source, and nothing is kept."""
    candidate = broken(quantized["nf4"], tmp_path / "candidate")
    with pytest.raises(CheckpointError, match="candidate: NaN or infinity among its logits"):
        run(setting.source, candidate)  # which answers first
    silent = Source(str(trained), replace(setting.source.settings, answers=0), OPTIONS)
    with pytest.raises(CheckpointError, match="candidate: NaN or infinity in its hidden states at text 1"):
        run(silent, candidate)
    settings = replace(SETTINGS, text=tmp_path / "b.txt", window=64, reference=tmp_path / "kept")
    (tmp_path / "b.txt").write_text("The capital of France is Paris. " * 60)
    with pytest.raises(CheckpointError, match="source: NaN or infinity"):
        run(Source(str(broken(trained, tmp_path / "source")), settings, OPTIONS), quantized["nf4"])
    assert not (tmp_path / "kept").exists()


def test_the_cache_is_by_what_it_depends_on(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder to keep it in, a reference lies in the user's cache, one for each set of settings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = {
        Source(str(trained), replace(SETTINGS, **other), OPTIONS).folder
        for other in ({}, {"temperature": 0.0}, {"seed": 1}, {"max_new_tokens": 4}, {"answers": 9})
    }
    assert len(folders) == 4  # how much candidates answer changes nothing
    assert all(folder.parent == tmp_path / "ossquant/references" for folder in folders)
    assert source.FEWEST_TOKENS == 100


def test_what_a_gguf_name_means(tmp_path: Path, trained: Path) -> None:
    """A .gguf file, or a folder with one model, split or not; not a folder of safetensors, nor one with two models."""
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").touch()  # `export` writes one beside it
    assert gguf_file(str(tmp_path)) == tmp_path / "a-00001-of-00002.gguf"
    assert gguf_file(str(trained)) is None
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UsageError, match="holds 2 GGUF models"):
        gguf_file(str(tmp_path))
    with pytest.raises(UsageError, match="no file"):
        gguf_file(str(tmp_path / "c.gguf"))


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no tokens"])
def test_a_damaged_gguf_is_refused(damage: str, setting: Setting, tmp_path: Path) -> None:
    """What is no GGUF file, or one that is cut, or without a tokenizer, is a CheckpointError that names it."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "gpt-oss")
    if damage != "no tokens":
        writer.add_token_list(["a", "b"])
    writer.add_tensor("output.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if damage in ("empty", "text", "cut"):
        path.write_bytes({"empty": b"", "text": b"a diary" * 100, "cut": path.read_bytes()[:200]}[damage])
    with pytest.raises(CheckpointError, match=r"model\.gguf: no sound GGUF file"):
        open_candidate(str(path), setting.source, OPTIONS)
