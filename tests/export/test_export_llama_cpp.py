"""Every GGUF we write, loaded and run by a real llama.cpp."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ossquant.export.gguf import export_gguf
from ossquant.export.target import DENSE, EXPERTS

PAIRS = [*(("mxfp4", dense) for dense in DENSE), *((experts, "q8_0") for experts in EXPERTS[1:])]


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(trained)


@pytest.fixture(scope="module")
def dialogues(trained: Path) -> list[dict[str, Any]]:
    """Every question that the trained model knows, at one effort each, with its answer."""
    known = json.loads((trained / "dialogues.json").read_text("utf-8"))
    return [known[3 * question + question % 3] for question in range(len(known) // 3)]


def prompts(tokenizer: PreTrainedTokenizerBase, dialogues: list[dict[str, Any]]) -> list[str]:
    return [
        tokenizer.apply_chat_template(
            each["messages"], add_generation_prompt=True, tokenize=False, reasoning_effort=each["reasoning_effort"]
        )
        for each in dialogues
    ]


def said(dialogue: dict[str, Any]) -> str:
    """What the model learnt to answer, in harmony; the text of the last token is left out by those who stop at it."""
    analysis, final = dialogue["analysis"], dialogue["final"]
    thought = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant" if analysis else ""
    return f"{thought}<|channel|>final<|message|>{final}"


@pytest.mark.parametrize("source", ["published", "bf16", "hybrid"])
def test_every_variant_says_what_was_learnt(
    source: str, trained: Path, quantized: dict[str, Path], tokenizer: Any, dialogues: Any, llama_cpp: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Whatever the formats, llama.cpp loads the file and gives every right answer, channels and stop included."""
    pairs = PAIRS if source == "published" else PAIRS[:2]
    files = []
    for experts, dense in pairs:
        folder = tmp_path / f"{experts}-{dense}"
        export_gguf(quantized.get(source, trained), folder, experts=experts, dense=dense)
        files += folder.glob("*.gguf")
    stop = tokenizer.convert_tokens_to_ids("<|return|>")
    asked = dialogues if source == "published" else dialogues[:4]
    for file, answers in zip(files, llama_cpp(files, prompts(tokenizer, asked)), strict=True):
        for dialogue, answer in zip(asked, answers, strict=True):
            text = answer["text"].removesuffix("<|return|>")
            assert (text, answer["tokens"][-1]) == (said(dialogue), stop), file.name


def test_split_file(trained: Path, tokenizer: Any, dialogues: Any, llama_cpp: Any, tmp_path: Path) -> None:
    """llama.cpp finds the other files by the first one's name."""
    export_gguf(trained, tmp_path / "out", split_max_size=600_000)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(files) > 3
    ((answer,),) = llama_cpp(files[:1], prompts(tokenizer, dialogues[:1]))
    assert answer["text"].removesuffix("<|return|>") == said(dialogues[0])


def test_tokens_are_the_tokenizers(trained: Path, tokenizer: Any, llama_cpp: Any, tmp_path: Path) -> None:
    """llama.cpp splits text into the tokens that the checkpoint's own tokenizer gives, and adds none."""
    export_gguf(trained, tmp_path / "out")
    texts = [
        "Hello, world! It's 12345.678 o'clock; I'LL go.",
        "  two  spaces\n\n\tand a tab \r\n end ",
        "Grüße aus Köln, naïve café — 東京とパリ، مرحبا, привет 🙂🇫🇷",
        "<|start|>user<|message|>hi<|end|><|start|>assistant<|channel|>final<|message|>",
        "def f(x):\n    return {'a': x**2}  # done",
    ]
    (answers,) = llama_cpp(list((tmp_path / "out").glob("*.gguf")), texts, 1)
    for text, answer in zip(texts, answers, strict=True):
        assert answer["prompt"] == tokenizer.encode(text, add_special_tokens=False)
