"""A checkpoint's tokenizer as GGUF keeps it, against transformers' own; and every kind of file that is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import harmony_tokenizer
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.export import vocabulary
from ossquant.export.vocabulary import TokenType, Vocabulary, read_vocabulary
from ossquant.spec import HARMONY_MARKERS

SIZE = 640
Table = dict[str, Any]


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """The trained model's tokenizer files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(trained / name, tmp_path / name)
    return tmp_path


def read(folder: Path, **config: Any) -> Vocabulary:
    """Read it; config is what config.json says of special ids."""
    return read_vocabulary(folder, SIZE, config)


def change(folder: Path, how: Callable[[Table], object], name: str = "tokenizer.json") -> None:
    """Have a function change a JSON file."""
    table = json.loads((folder / name).read_text("utf-8"))
    how(table)
    (folder / name).write_text(json.dumps(table), "utf-8")


def settings(folder: Path, **changes: Any) -> None:
    """Change tokenizer_config.json; a key that is ... is left out."""

    def put(table: Table) -> None:
        table.update(changes)
        for key in (key for key, value in changes.items() if value is ...):
            table.pop(key)

    change(folder, put, "tokenizer_config.json")


def vocab_of(table: Table) -> dict[str, Any]:
    vocab: dict[str, Any] = table["model"]["vocab"]
    return vocab


def test_tokens_of_transformers(trained: Path) -> None:
    """Every id has the text that transformers gives it, and is control exactly where that calls it special."""
    theirs = AutoTokenizer.from_pretrained(trained)
    found = read(trained)
    assert len(found.tokens) == len(found.token_types) == SIZE
    texts = theirs.convert_ids_to_tokens(range(SIZE))
    assert texts.count(None) == 8
    assert found.tokens == tuple(f"[PAD{n}]" if text is None else text for n, text in enumerate(texts))
    special = set(theirs.added_tokens_decoder)
    assert len(special) == 21
    for number, kind in enumerate(found.token_types):
        unused = texts[number] is None
        expected = TokenType.UNUSED if unused else TokenType.CONTROL if number in special else TokenType.NORMAL
        assert kind is expected, number


def test_special_ids_of_transformers(trained: Path) -> None:
    """Beginning, end and padding have transformers' ids, and the template is the one it renders."""
    theirs, found = AutoTokenizer.from_pretrained(trained), read(trained)
    assert (found.bos, found.eos, found.padding) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (found.bos, found.eos, found.padding) == (611, 615, 612)
    assert found.chat_template == theirs.chat_template == (trained / "chat_template.jinja").read_text()
    assert found.splits_as_published


def test_merges_of_tokenizers(trained: Path) -> None:
    """Merges stand as 'left right' in the order of tokenizer.json."""
    merges = harmony_tokenizer.read_merges(trained / "tokenizer.json")
    assert read(trained).merges == tuple(f"{left} {right}" for left, right in merges)
    assert len(merges) > 300


def test_both_forms_of_merges(folder: Path) -> None:
    """Merges written as strings, as older files have them, are the same merges."""
    pairs = read(folder)
    change(folder, lambda table: table["model"].update(merges=[" ".join(pair) for pair in table["model"]["merges"]]))
    assert read(folder) == pairs


def test_holes(folder: Path) -> None:
    """An id that no token has, in the middle or at the end, gets a placeholder that no text becomes."""
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    used = {part for left, right in table["model"]["merges"] for part in (left, right, left + right)}
    gone = next(text for text in vocab_of(table) if text not in used)
    numbers: list[int] = []
    change(folder, lambda table: numbers.append(vocab_of(table).pop(gone)))
    found = read(folder)
    assert found.tokens[numbers[0]] == f"[PAD{numbers[0]}]"
    assert found.token_types[numbers[0]] is TokenType.UNUSED
    assert found.token_types.count(TokenType.UNUSED) == 9


def test_added_token_that_is_not_special(folder: Path) -> None:
    """A word that a user added is user-defined; one in harmony's brackets is control whatever its flag says."""

    def add(table: Table) -> None:
        table["added_tokens"] += [{"id": 632, "content": "ossquant", "special": False},
                                  {"id": 633, "content": "<|mine|>", "special": False}]  # fmt: skip

    change(folder, add)
    found = read(folder)
    assert (found.tokens[632], found.token_types[632]) == ("ossquant", TokenType.USER_DEFINED)
    assert (found.tokens[633], found.token_types[633]) == ("<|mine|>", TokenType.CONTROL)


def test_special_tokens_in_both_places(folder: Path) -> None:
    """Special tokens that stand among the vocabulary's words, too, as some files have them, stay control."""
    before = read(folder)
    change(
        folder, lambda table: vocab_of(table).update({each["content"]: each["id"] for each in table["added_tokens"]})
    )
    assert read(folder) == before


def test_special_tokens_as_objects(folder: Path) -> None:
    """A special token may be described by an object, as transformers 4 wrote it."""
    before = read(folder)
    described = {"content": "<|return|>", "lstrip": False, "__type": "AddedToken"}
    settings(folder, eos_token=described)
    assert read(folder) == before


def test_special_ids_of_config(folder: Path) -> None:
    """Where tokenizer_config.json names none, config.json's ids count; an id that is no special token does not."""
    settings(folder, bos_token=..., eos_token=..., pad_token=...)
    found = read(folder, eos_token_id=612, pad_token_id=611)
    assert (found.bos, found.eos, found.padding) == (None, 612, 611)
    found = read(folder, eos_token_id=615, pad_token_id=612.0, bos_token_id=3)
    assert (found.bos, found.eos, found.padding) == (None, 615, None)


def test_settings_come_first(folder: Path) -> None:
    """tokenizer_config.json's text outweighs config.json's id."""
    assert read(folder, eos_token_id=611).eos == 615


def test_without_settings(folder: Path) -> None:
    """Without tokenizer_config.json config.json's ids are enough."""
    (folder / "tokenizer_config.json").unlink()
    assert read(folder, eos_token_id=615).eos == 615


def test_template_of_settings(folder: Path) -> None:
    """A template in tokenizer_config.json counts where there is no file; the file comes first."""
    settings(folder, chat_template="{{ 'ü' }}")
    assert read(folder).chat_template == (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert read(folder).chat_template == "{{ 'ü' }}"


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None, {"type": "Whitespace"}, [], {"type": "Sequence", "pretokenizers": 5}, {"pretokenizers": [None, 1]},
        {"type": "Split", "pattern": {"Regex": r"\s+"}}, {"type": "Split", "pattern": {"String": vocabulary.SPLIT}},
        {"type": "Split", "pattern": vocabulary.SPLIT},
    ],
)  # fmt: skip
def test_another_split(folder: Path, pre_tokenizer: Any) -> None:
    """A tokenizer that splits text otherwise is told from gpt-oss' own, whatever stands there."""
    change(folder, lambda table: table.update(pre_tokenizer=pre_tokenizer))
    assert not read(folder).splits_as_published


def test_split_alone(folder: Path) -> None:
    """The published pattern is recognized on its own as well as in a sequence."""
    change(folder, lambda table: table.update(pre_tokenizer=table["pre_tokenizer"]["pretokenizers"][0]))
    assert read(folder).splits_as_published


def test_split_is_the_tokenizers() -> None:
    """The pattern is the one that the harmony tokenizer of the tests splits by."""
    assert vocabulary.SPLIT == harmony_tokenizer.SPLIT


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def changed(how: Callable[[Table], object]) -> Callable[[Path], None]:
    return lambda folder: change(folder, how)


def model(**changes: Any) -> Callable[[Path], None]:
    return changed(lambda table: table["model"].update(changes))


def token(number: Any, text: str = "new") -> Callable[[Path], None]:
    return changed(lambda table: vocab_of(table).update({text: number}))


def added(**entry: Any) -> Callable[[Path], None]:
    return changed(lambda table: table["added_tokens"].append(entry))


def merge(pair: Any) -> Callable[[Path], None]:
    return changed(lambda table: table["model"]["merges"].append(pair))


def joined(left: str, right: str) -> Callable[[Path], None]:
    def join(table: Table) -> None:
        vocab_of(table)[left + right] = 632
        table["model"]["merges"].append([left, right])

    return changed(join)


def no_marker(marker: str) -> Callable[[Path], None]:
    def drop(table: Table) -> None:
        table["added_tokens"] = [entry for entry in table["added_tokens"] if entry["content"] != marker]

    return changed(drop)


def setting(role: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: settings(folder, **{f"{role}_token": value})


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template_in_settings(value: Any) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        no_template(folder)
        settings(folder, chat_template=value)

    return put


MERGE = len(harmony_tokenizer.read_merges(Path(__file__).parents[1] / "data/tiny/tokenizer.json"))  # one more's number
NO_PAIR, STRANGERS = f"merge {MERGE} is not a pair of tokens", f"merge {MERGE} is not of tokens in its vocabulary"
NOT_BPE = "tokenizer.json: not a byte-level BPE as gpt-oss has"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer.json, without which no server can read text"),
    "no template": (no_template, "no chat_template.jinja; servers would take another model's template"),
    "template of another type": (template_in_settings([{"name": "a"}]), "no chat_template.jinja"),
    "empty template": (write("chat_template.jinja", b""), "no chat_template.jinja"),
    "template not UTF-8": (write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja: not text in UTF-8"),
    "huge template": (write("chat_template.jinja", b" " * (2**20 + 1)), "larger than any template is"),
    "template of half a letter": (template_in_settings("\ud800"), r"tokenizer_config.json: '\ud800' is no text"),
    "eos unknown": (setting("eos", "<|stop|>"), "eos_token '<|stop|>' is no token of tokenizer.json"),
    "eos a plain token": (setting("eos", "a"), "eos_token 'a' is no token of tokenizer.json"),
    "eos a list": (setting("eos", ["<|return|>"]), "eos_token \"['<|return|>']\" is no token"),
    "pad unknown": (setting("pad", "[PAD]"), "pad_token '[PAD]' is no token of tokenizer.json"),
    "no eos": (setting("eos", ...), "name no end of a reply (eos)"),
    "too large an id": (token(SIZE), "token 'new' has id 640, the model has 640 embeddings"),
    "huge id": (token(10**400), "token 'new' has id 1000"),
    "added token's id too large": (added(id=700, content="<|new|>"), "token '<|new|>' has id 700"),
    "one id twice": (changed(lambda t: vocab_of(t).update(x=632, y=632)), "have the same id"),
    "added token on another": (added(id=3, content="<|new|>"), "have the same id"),
    "negative id": (token(-1), "token 'new' has no id"),
    "true as id": (token(True), "token 'new' has no id"),
    "text as id": (token("632"), "token 'new' has no id"),
    "fraction as id": (token(632.0), "token 'new' has no id"),
    "no id": (added(content="<|new|>"), "token '<|new|>' has no id"),
    "null as id": (added(content="<|new|>", id=None), "token '<|new|>' has no id"),
    "added token without text": (added(id=632), "an added token without text"),
    "added token of no text": (added(id=632, content=""), "an added token without text"),
    "added token of a number": (added(id=632, content=5), "an added token without text"),
    "added token no object": (changed(lambda t: t["added_tokens"].append("<|x|>")), "an added token is not an object"),
    "no added tokens": (changed(lambda t: t.pop("added_tokens")), "no added_tokens"),
    "half a letter": (token(632, "\ud800"), r"tokenizer.json: '\ud800' is no text"),
    "half a letter added": (added(id=632, content="<|\udfff|>"), r"'<|\udfff|>' is no text"),
    "merge of three": (merge(["a", "b", "c"]), NO_PAIR),
    "merge of one": (merge("ab"), NO_PAIR),
    "merge with two spaces": (merge("a b c"), NO_PAIR),
    "merge of numbers": (merge([1, 2]), NO_PAIR),
    "merge a number": (merge(7), NO_PAIR),
    "merge of strangers": (merge(["Q", "QQQ"]), STRANGERS),
    "merge to a stranger": (merge(["Q", "Q"]), STRANGERS),
    "merge of a stranger on the left": (joined("qz", "x"), STRANGERS),
    "merge of a stranger on the right": (joined("q", "zx"), STRANGERS),
    "merge of half a letter": (merge(["\ud800", "a"]), STRANGERS),
    "no merges": (model(merges=[]), "no merges"),
    "merges no list": (model(merges={"a": "b"}), "no merges"),
    "not BPE": (model(type="Unigram"), NOT_BPE),
    "byte fallback": (model(byte_fallback=True), NOT_BPE),
    "normalizer": (changed(lambda t: t.update(normalizer={"type": "NFC"})), NOT_BPE),
    "no model": (changed(lambda t: t.pop("model")), "model is not an object"),
    "vocab a list": (model(vocab=["a"]), "model.vocab is not an object"),
    "not JSON": (write("tokenizer.json", b"{"), "tokenizer.json: not JSON"),
    "a list": (write("tokenizer.json", b"[]"), "tokenizer.json: not a JSON object"),
    "not UTF-8": (write("tokenizer.json", b'{"\xff": 1}'), "tokenizer.json: not JSON"),
    "deep": (write("tokenizer.json", b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"), "nested too deep"),
    "a key twice": (write("tokenizer.json", b'{"model": {"vocab": {"a": 1, "a": 2}}}'), "a key stands there twice"),
    "many marks": (write("tokenizer.json", b'{"a": [' + b"0," * 2**22 + b"0]}"), "more JSON than any model has"),
    "settings not JSON": (write("tokenizer_config.json", b"{]"), "tokenizer_config.json: not JSON"),
    "settings a list": (write("tokenizer_config.json", b"[]"), "tokenizer_config.json: not a JSON object"),
}  # fmt: skip
REFUSED |= {f"no {name}": (no_marker(name), f"no special token {name}: servers find") for name in HARMONY_MARKERS}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folder: Path, case: str) -> None:
    """A tokenizer that servers could not use is refused by what is wrong with it, in one line, with a cure."""
    damage, sentence = REFUSED[case]
    damage(folder)
    with pytest.raises(UnsupportedError if sentence == NOT_BPE else CheckpointError) as error:
        read(folder)
    assert sentence in str(error.value.args[0])
    assert error.value.hint
    assert error.value.message.isprintable()
    assert len(error.value.message) < 250


def test_too_large_a_file(folder: Path) -> None:
    """A tokenizer.json larger than any real one is not read."""
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(64 * 2**20 + 1)  # holes, which take no room
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: larger than any such file is"):
        read(folder)


def test_several_markers(folder: Path) -> None:
    """Missing markers are named together."""
    change(folder, lambda table: table.update(added_tokens=table["added_tokens"][:5]))
    with pytest.raises(CheckpointError, match=r"no special token <\|start\|>, <\|channel\|>, <\|message\|>, <\|end\|>"):
        read(folder)


def test_real_size(tmp_path: Path) -> None:
    """A vocabulary of the published size, its special tokens at their published ids, is within the limits."""
    ids = harmony_tokenizer.write_tokenizer(tmp_path, Path(__file__).parents[1] / "data/tiny/tokenizer.json", 201088)
    found = read_vocabulary(tmp_path, 201088, {})
    assert (found.bos, found.eos, found.padding) == (199998, 200002, 199999)
    assert {found.tokens[number]: number for number in ids.values()} == ids
    assert [found.token_types.count(kind) for kind in TokenType] == [199998, 21, 0, 201088 - 199998 - 21]
