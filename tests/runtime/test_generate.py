import json
from pathlib import Path

import pytest
import torch
from reference import reference_model

from ossquant import load_model
from ossquant.errors import UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.generate import generate
from ossquant.runtime.harmony import HarmonyParser

LONGEST = 400


@pytest.fixture(scope="module")
def dialogues(trained: Path) -> list[dict]:  # type: ignore[type-arg]
    """Every question that the trained model knows, at low, medium and high effort in turn, with its answer."""
    known = json.loads((trained / "dialogues.json").read_text("utf-8"))
    return [known[3 * question + question % 3] for question in range(len(known) // 3)]


@pytest.mark.parametrize("scheme", ("hybrid", "nf4"))
def test_text_equals_the_reference(scheme: str, trained: Path, quantized: dict[str, Path], dialogues: list) -> None:  # type: ignore[type-arg]
    """Greedy text is the reference's token for token, and the channels are those that were learnt."""
    model, tokenizer = load_model(quantized[scheme], dtype="float32")
    reference = reference_model(trained, scheme)
    reference.generation_config = model.generation_config
    for dialogue in dialogues:
        reply = generate(
            model, tokenizer, dialogue["messages"],
            reasoning_effort=dialogue["reasoning_effort"], max_new_tokens=LONGEST,
        )  # fmt: skip
        prompt = tokenizer.apply_chat_template(
            dialogue["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True,
            reasoning_effort=dialogue["reasoning_effort"],
        )["input_ids"]  # fmt: skip
        expected = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=LONGEST
        )
        assert reply.token_ids == expected[0, prompt.shape[1] :].tolist()
        assert (reply.analysis, reply.final) == (dialogue["analysis"], dialogue["final"])
        assert reply.finish_reason == "stop"


def test_long_prompt_in_chunks(trained: Path, quantized: dict[str, Path]) -> None:
    """A prompt of several chunks gives the tokens that the reference gives with all of it at once."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    messages = [{"role": "user", "content": "What is the capital of France? " * 200}]
    reply = generate(model, tokenizer, messages, max_new_tokens=24)
    assert reply.prompt_tokens > 2 * PREFILL_CHUNK
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, reasoning_effort="medium"
    )["input_ids"]
    reference = reference_model(trained, "hybrid")
    reference.generation_config = model.generation_config
    expected = reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24)
    assert reply.token_ids == expected[0, prompt.shape[1] :].tolist()


def test_bf16_compute_says_the_same(quantized: dict[str, Path], dialogues: list) -> None:  # type: ignore[type-arg]
    """In bf16, the default, the learnt answers come out right too."""
    model, tokenizer = load_model(quantized["hybrid"])
    for dialogue in dialogues[:6]:
        reply = generate(model, tokenizer, dialogue["messages"], reasoning_effort=dialogue["reasoning_effort"])
        assert reply.final == dialogue["final"]


def test_text_streams_whole(quantized: dict[str, Path], dialogues: list) -> None:  # type: ignore[type-arg]
    """The pieces heard while it speaks are the reply, channel by channel, without broken characters."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    for dialogue in dialogues:
        heard: dict[str, str] = {"analysis": "", "final": ""}

        def hear(channel: str, text: str, heard: dict[str, str] = heard) -> None:
            heard[channel] += text

        generate(model, tokenizer, dialogue["messages"], reasoning_effort=dialogue["reasoning_effort"], on_text=hear)
        assert heard == {"analysis": dialogue["analysis"], "final": dialogue["final"]}


def test_running_out_of_tokens_is_told(quantized: dict[str, Path]) -> None:
    """A reply cut off by max_new_tokens ends with finish_reason 'length'."""
    model, tokenizer = load_model(quantized["hybrid"])
    reply = generate(model, tokenizer, [{"role": "user", "content": "Who are you?"}], max_new_tokens=3)
    assert reply.finish_reason == "length"
    assert len(reply.token_ids) == 3


def test_wrong_arguments_are_refused(quantized: dict[str, Path]) -> None:
    """Impossible lengths, temperatures and efforts are UsageErrors."""
    model, tokenizer = load_model(quantized["hybrid"])
    message = [{"role": "user", "content": "Hi"}]
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"reasoning_effort": "huge"}):
        with pytest.raises(UsageError):
            generate(model, tokenizer, message, **wrong)


def test_a_reply_without_markers_is_final(quantized: dict[str, Path]) -> None:
    """Text outside harmony is taken as one final message, not lost."""
    _, tokenizer = load_model(quantized["hybrid"])
    parser = HarmonyParser(tokenizer)
    for token in tokenizer.encode("plain text", add_special_tokens=False):
        parser.feed(token)
    assert parser.text("final") == "plain text"
