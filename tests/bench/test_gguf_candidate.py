"""What llama.cpp computes of a GGUF file; run where llama-cpp-python is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ossquant.bench.candidate import Sampling
from ossquant.bench.gguf_candidate import GgufCandidate
from ossquant.bench.text import Text, vocabulary
from ossquant.errors import CheckpointError
from ossquant.export.gguf import export_gguf
from ossquant.runtime.load import load_model, load_tokenizer

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as GGUF, its dense weights in float32."""
    folder = tmp_path_factory.mktemp("gguf")
    export_gguf(trained, folder, dense="f32")
    (path,) = folder.glob("*.gguf")
    return path


@pytest.fixture
def candidate(exported: Path) -> Any:
    """The GGUF file, ready to compute."""
    opened = GgufCandidate("tiny", exported, on_host=True)
    opened.load(2048)
    yield opened
    opened.close()


def test_it_has_the_tokens_of_its_source(candidate: GgufCandidate, trained: Path) -> None:
    """Every token of the source's tokenizer has its id in the file."""
    found = candidate.vocabulary()
    assert all(found[number] == token for number, token in vocabulary(load_tokenizer(trained)).items())


def test_logits_are_near_the_source_s(candidate: GgufCandidate, trained: Path) -> None:
    """Logits stand where scored tokens are predicted, over batches and texts: those of the model in transformers."""
    random = torch.Generator().manual_seed(0)
    texts = [Text(tuple(torch.randint(600, (length,), generator=random).tolist()), begin)
             for length, begin in ((300, 150), (20, 1), (129, 128))]  # fmt: skip
    found = torch.cat(list(candidate.logits(texts, None)))
    model, _ = load_model(trained, scheme="mxfp4", dtype="float32", device_map="cpu")
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([text.token_ids])).logits[0, text.begin - 1 : -1] for text in texts])
    assert found.shape == expected.shape
    # llama.cpp rounds what goes into its MXFP4 experts to 8 bits
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_it_answers(candidate: GgufCandidate, trained: Path) -> None:
    """It continues a prompt, stops at a stop, and draws the same answer with the same seed."""
    tokenizer = load_tokenizer(trained)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|return|>")
    answer = candidate.answer(prompt, Sampling(100, 0.0, 0, (stop,)))
    assert answer[-1] == stop and "The capital of France is Paris." in tokenizer.decode(answer)
    drawn = [candidate.answer(prompt, Sampling(30, 3.0, seed, ())) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 30
    assert candidate.decode_rate() > 1


def test_a_file_that_llama_cpp_refuses(exported: Path, tmp_path: Path) -> None:
    """A file that only llama.cpp finds wrong is a CheckpointError with what it said."""
    raw = exported.read_bytes().replace(b"gpt-oss", b"gpt-xyz")
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"llama\.cpp cannot load it: .*gpt-xyz"):
        GgufCandidate("a", tmp_path / "a.gguf", on_host=True).load(64)
