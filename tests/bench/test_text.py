import json
from pathlib import Path

import pytest

from ossquant.bench import text as texts
from ossquant.bench.text import answered_text, conversations, packaged_prompts, read_text, vocabulary, windows
from ossquant.errors import UsageError
from ossquant.runtime.load import load_tokenizer

USER = {"role": "user", "content": "What is 2 + 3?"}


def test_packaged_prompts_are_varied() -> None:
    """The packaged prompts are some dozens of different questions, one user message each, not all in ASCII."""
    asked = [messages[0]["content"] for messages in conversations(packaged_prompts(), "packaged")]
    assert len(set(asked)) == len(asked) >= 48
    assert sum(not question.isascii() for question in asked) >= 5


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no messages"),
        ('{"messages": []}', "no messages"),
        ('{"messages": "hi"}', "no messages"),
        ('{"messages": [{"role": "user"}]}', "without a role and a content"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "without a role and a content"),
        ('{"messages": ["hi"]}', "without a role and a content"),
    ],
)
def test_a_broken_line_is_named(line: str, told: str) -> None:
    """Whatever is wrong with a line of conversations, the error says which line, blank ones counted."""
    raw = f"{json.dumps({'messages': [USER]})}\n\n{line}\n".encode()
    with pytest.raises(UsageError) as raised:
        conversations(raw, "mine.jsonl")
    assert "mine.jsonl, line 3" in raised.value.message
    assert told in raised.value.message


def test_an_empty_file_is_refused() -> None:
    """A file without a conversation is no text."""
    with pytest.raises(UsageError, match="0 conversations"):
        conversations(b"\n\n", "empty.jsonl")


def test_only_the_last_answer_is_scored(trained: Path) -> None:
    """Of a conversation that ends with the assistant, the scored tokens are that message and no other."""
    tokenizer = load_tokenizer(trained)
    messages = [USER, {"role": "assistant", "content": "5"}, USER, {"role": "assistant", "content": "It is 5."}]
    text = answered_text(tokenizer, messages, "low", "line 1")
    assert tokenizer.decode(text.token_ids[text.begin :]) == "<|channel|>final<|message|>It is 5.<|end|>"
    assert tokenizer.decode(text.prompt).endswith("<|start|>assistant")


def test_plain_text_is_cut_into_windows(trained: Path) -> None:
    """Windows stand one behind the other, a last one that is not full is left out, the second half is scored."""
    tokenizer = load_tokenizer(trained)
    raw = b"The capital of France is Paris. " * 20
    ids = tokenizer(raw.decode(), add_special_tokens=False)["input_ids"]
    found = windows(tokenizer, raw, 32, "a.txt")
    assert [token for text in found for token in text.token_ids] == ids[: len(ids) // 32 * 32]
    assert {text.scored for text in found} == {15}  # llama-perplexity: n_ctx - 1 - n_ctx / 2


def test_text_that_is_none(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text shorter than a window, in another encoding, missing or too large is refused by name."""
    tokenizer = load_tokenizer(trained)
    with pytest.raises(UsageError, match=r"short.txt has \d+ tokens, a window 512"):
        windows(tokenizer, b"short", 512, "short.txt")
    with pytest.raises(UsageError, match="not UTF-8: byte 1"):
        windows(tokenizer, b"a\xff", 8, "latin.txt")
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "nothing.txt")
    (tmp_path / "large.txt").write_bytes(b"x" * 100)
    monkeypatch.setattr(texts, "MAX_BYTES", 99)
    with pytest.raises(UsageError, match="larger than 99 B"):
        read_text(tmp_path / "large.txt")


def test_vocabulary_is_by_id(trained: Path) -> None:
    """Every id of the tokenizer has its token."""
    tokenizer = load_tokenizer(trained)
    found = vocabulary(tokenizer)
    assert len(found) == len(tokenizer)
    assert found[tokenizer.convert_tokens_to_ids("<|channel|>")] == "<|channel|>"
