import json
from pathlib import Path

import pytest

from ossquant.bench.prompts import Prompt, filler, make_prompts, read_dataset
from ossquant.errors import UsageError


@pytest.mark.parametrize("source", ["corpus", "synthetic"])
@pytest.mark.parametrize("words", [20, 100, 1000])
def test_prompts_are_as_long_as_asked_and_repeatable(source: str, words: int) -> None:
    """So many words a turn; the same seed makes the same prompts, another one others; none is like another."""
    prompts = make_prompts(source, 8, words=words, turns=1, seed=1)  # type: ignore[arg-type]
    assert prompts == make_prompts(source, 8, words=words, turns=1, seed=1)  # type: ignore[arg-type]
    assert prompts != make_prompts(source, 8, words=words, turns=1, seed=2)  # type: ignore[arg-type]
    assert len({prompt.turns for prompt in prompts}) == 8
    for prompt in prompts:
        said = [message["content"] for message in prompt.lead] + list(prompt.turns)
        assert sum(len(text.split()) for text in said) == words


def test_dialogues_have_their_turns() -> None:
    """Each turn of the corpus asks another question, of the length that was asked for."""
    (prompt,) = make_prompts("corpus", 1, words=50, turns=4, seed=0)
    assert [len(turn.split()) for turn in prompt.turns] == [50] * 4
    assert len({turn.split("\n")[0] for turn in prompt.turns}) == 4


def test_a_nonce_comes_first() -> None:
    """The nonce stands before all other text, in whichever message comes first: no server has seen that prefix."""
    assert Prompt((), ("Hi", "Bye")).with_nonce("n1").turns == ("[n1] Hi", "Bye")
    prompt = Prompt(({"role": "system", "content": "Be brief."},), ("Hi",)).with_nonce("n2")
    assert prompt.lead == ({"role": "system", "content": "[n2] Be brief."},)
    assert prompt.turns == ("Hi",)


def test_filler_is_always_the_same() -> None:
    """The text that calibrates lengths never changes within a version."""
    assert filler(200) == filler(200)
    assert len(filler(200).split()) == 200


def test_a_dataset_is_read(tmp_path: Path) -> None:
    """Prompts and messages; in several turns the user's are asked one after the other."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "Hi"}) + "\n\n" + json.dumps({"messages": messages, "other": 1}) + "\n")
    assert read_dataset(path, multi_turn=False) == [Prompt((), ("Hi",)), Prompt(tuple(messages[:3]), ("Two?",))]
    assert read_dataset(path, multi_turn=True)[1] == Prompt(tuple(messages[:1]), ("One?", "Two?"))


NEITHER = "neither a 'prompt' nor 'messages' with 'role' and 'content'"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", NEITHER),
        ('{"prompt": 3}', NEITHER),
        ('{"messages": [{"role": "king", "content": "x"}]}', NEITHER),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the last message is not the user's"),
        ('{"prompt": "' + "x" * 2**20 + '"}', "more than 1048576 bytes"),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_broken_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    """The error says which line, and what is wrong with it."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "Hi"}\n' + line + "\n")
    with pytest.raises(UsageError) as caught:
        read_dataset(path, multi_turn=False)
    assert caught.value.message.endswith(f"data.jsonl line 2: {said}")


def test_a_dataset_holds_something(tmp_path: Path) -> None:
    """A file without a prompt, and none at all, are refused."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="holds no prompt"):
        read_dataset(tmp_path / "empty.jsonl", multi_turn=False)
    with pytest.raises(UsageError, match="No such file"):
        read_dataset(tmp_path / "away.jsonl", multi_turn=False)
