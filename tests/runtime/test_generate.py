import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import reference_model
from torch.utils._python_dispatch import TorchDispatchMode

from ossquant import load_model
from ossquant.errors import UsageError
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.generate import Interrupted, continue_prompt, generate, stop_tokens
from ossquant.runtime.harmony import HarmonyParser

LONGEST = 400
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


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
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"reasoning_effort": "huge"}, {"cache": "frozen"}):
        with pytest.raises(UsageError):
            generate(model, tokenizer, message, **wrong)


def test_a_reply_without_markers_is_final(quantized: dict[str, Path]) -> None:
    """Text outside harmony is taken as one final message, not lost."""
    _, tokenizer = load_model(quantized["hybrid"])
    parser = HarmonyParser(tokenizer)
    for token in tokenizer.encode("plain text", add_special_tokens=False):
        parser.feed(token)
    assert parser.text("final") == "plain text"


def test_harmony_keeps_channels_and_characters_apart(quantized: dict[str, Path]) -> None:
    """A message without a channel is final whatever stood before, and a half character is said at its end."""
    _, tokenizer = load_model(quantized["hybrid"])
    heard: list[tuple[str, str]] = []
    parser = HarmonyParser(tokenizer, lambda channel, text: heard.append((channel, text)))
    text = "<|channel|>analysis<|message|>é 東 🙂<|end|><|start|>assistant<|message|>ok 🙂<|return|>"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for token in [*tokens[:-2], tokens[-1]]:  # the last byte of the last character is missing
        parser.feed(token)
    assert [(message.channel, message.text) for message in parser.messages] == [
        ("analysis", "é 東 🙂"),
        ("final", "ok \ufffd"),
    ]
    assert "".join(text for channel, text in heard if channel == "analysis") == "é 東 🙂"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(("prompt_tokens", "new_tokens"), [(20, 130), (129, 8), (2 * PREFILL_CHUNK + 7, 8)])
def test_caches_equal_recomputation(
    cache: Any, prompt_tokens: int, new_tokens: int, quantized: dict[str, Path]
) -> None:
    """With either cache each greedy token is that of computing all before it anew, beyond the sliding window too."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    stops = stop_tokens(model, tokenizer)
    prompt = random_prompt(prompt_tokens)
    spoken = continue_prompt(
        model, prompt, cache=cache, do_sample=False, eos_token_id=stops,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens,
    )  # fmt: skip
    with torch.inference_mode():
        logits = model(spoken, use_cache=False).logits[0, prompt_tokens - 1 : -1]
    assert prompt_tokens + new_tokens > model.config.sliding_window
    likeliest = logits.index_fill(-1, torch.tensor(stops), -torch.inf).argmax(dim=-1)
    assert spoken[0, prompt_tokens:].tolist() == likeliest.tolist()


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made, and the most rows of logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.elements = self.rows = 0
        model.lm_head.register_forward_hook(self._note_rows)

    def _note_rows(self, module: Any, inputs: Any, logits: torch.Tensor) -> None:
        self.rows = max(self.rows, logits.shape[-2])

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_long_prompts_make_nothing_square(cache: Any, quantized: dict[str, Path]) -> None:
    """A prompt makes one row of logits, and no mask or scores of its length squared; all at once makes both."""
    model, tokenizer = load_model(quantized["hybrid"])
    length = 6 * PREFILL_CHUNK
    prompt = random_prompt(length)
    heads = model.config.num_attention_heads
    with Largest(model) as chunked:
        continue_prompt(model, prompt, max_new_tokens=2, cache=cache, do_sample=False,
                        eos_token_id=stop_tokens(model, tokenizer))  # fmt: skip
    assert chunked.rows == 1
    assert heads * PREFILL_CHUNK * length <= chunked.elements <= heads * PREFILL_CHUNK * (length + 3) < length**2
    with Largest(model) as at_once, torch.inference_mode():
        model(prompt[:, : 2 * PREFILL_CHUNK])
    assert at_once.rows == 2 * PREFILL_CHUNK
    assert at_once.elements > heads * (2 * PREFILL_CHUNK) ** 2


def test_stop_tokens_of_the_file_and_of_harmony(quantized: dict[str, Path]) -> None:
    """A reply ends at <|return|> and <|call|> whatever generation_config.json says, and where it says, too."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    own = sorted(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>", "<|endoftext|>"]))
    assert sorted(model.generation_config.eos_token_id) == own == stop_tokens(model, tokenizer)
    ended = generate(model, tokenizer, FRANCE)
    for stated in (None, 0, [0, own[0]]):
        model.generation_config.eos_token_id = stated
        assert stop_tokens(model, tokenizer) == sorted({*own, *([] if stated is None else [0])})
        again = generate(model, tokenizer, FRANCE)
        assert (again.finish_reason, again.token_ids) == ("stop", ended.token_ids)
    model.generation_config.eos_token_id = ended.token_ids[4]
    assert generate(model, tokenizer, FRANCE).token_ids == ended.token_ids[:5]


def test_a_tool_call_ends_a_reply(quantized: dict[str, Path]) -> None:
    """A model that says <|call|> waits for its tool: the reply stops there, also if only <|return|> is stated."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    call = tokenizer.convert_tokens_to_ids("<|call|>")
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|return|>")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor(call), 1e9))
    reply = generate(model, tokenizer, FRANCE)
    assert (reply.token_ids, reply.finish_reason) == ([call], "stop")


def test_the_context_is_the_limit(quantized: dict[str, Path]) -> None:
    """A prompt as long as the context is refused in a sentence; a reply ends where the context does."""
    model, tokenizer = load_model(quantized["hybrid"])
    with pytest.raises(UsageError, match="the model's context 131072"):
        generate(model, tokenizer, [{"role": "user", "content": "7 " * 131072}])
    length = generate(model, tokenizer, FRANCE, max_new_tokens=1).prompt_tokens
    model.config.max_position_embeddings = length + 3
    reply = generate(model, tokenizer, FRANCE)
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    model.config.max_position_embeddings = length
    with pytest.raises(UsageError, match=f"{length} tokens"):
        generate(model, tokenizer, FRANCE)


def test_a_conversation_that_the_template_refuses(quantized: dict[str, Path]) -> None:
    """A role that harmony has no place for is a UsageError."""
    model, tokenizer = load_model(quantized["hybrid"])
    with pytest.raises(UsageError, match="template refuses"):
        generate(model, tokenizer, [{"role": "narrator", "content": "Once"}])


def test_sampling_is_over_all_tokens(quantized: dict[str, Path]) -> None:
    """At a very high temperature tokens far from the 50 likeliest come, which transformers keeps by default."""
    model, tokenizer = load_model(quantized["hybrid"])
    ranks: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: ranks.append(logits[0, -1].argsort(stable=True)))
    torch.manual_seed(0)
    reply = generate(model, tokenizer, FRANCE, temperature=1e4, max_new_tokens=16)
    places = [rank.flip(0).tolist().index(token) for rank, token in zip(ranks, reply.token_ids, strict=True)]
    assert max(places) > 100


def test_ctrl_c_hands_over_what_was_said(quantized: dict[str, Path]) -> None:
    """Ctrl-C is a KeyboardInterrupt that carries the reply so far, and the next reply is none the worse."""
    model, tokenizer = load_model(quantized["hybrid"], dtype="float32")
    whole = generate(model, tokenizer, FRANCE)
    heard: list[str] = []

    def hear(channel: str, text: str) -> None:
        if channel == "final":
            heard.append(text)
            if len(heard) == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        generate(model, tokenizer, FRANCE, on_text=hear)
    assert isinstance(stopped.value, Interrupted)
    reply = stopped.value.reply
    assert reply.finish_reason == "interrupted"
    assert reply.final == "".join(heard)
    assert 0 < len(reply.final) < len(whole.final) and whole.final.startswith(reply.final)
    assert reply.token_ids == whole.token_ids[: len(reply.token_ids)]
    assert generate(model, tokenizer, FRANCE).token_ids == whole.token_ids


def random_prompt(length: int) -> torch.Tensor:
    """Seeded tokens (1, length) of ordinary text."""
    return torch.randint(0, 600, (1, length), generator=torch.Generator().manual_seed(length))
