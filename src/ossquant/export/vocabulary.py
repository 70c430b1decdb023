"""A checkpoint's tokenizer as GGUF keeps it: tokens by id with their kinds, merges, special ids, chat template."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from ossquant.checkpoint.header import read_json
from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.spec import HARMONY_MARKERS

# the published tokenizer.json has 28 MB and, its merges in pairs, some 1.8 million of the marks that are counted
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_MARKS = 64 * 2**20, 2**22
MAX_TEMPLATE_BYTES = 2**20
# how o200k_harmony splits text before its merges: llama.cpp's "gpt-4o". Source: tiktoken's o200k_base, 2026-11-22
SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FILE, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_HINT = "copy gpt-oss' own tokenizer files there: hf download openai/gpt-oss-20b --include '*token*' --include 'chat*'"


class TokenType(IntEnum):
    """What a token is for, as llama.cpp counts."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their types by id, merges as 'left right', ids of the special tokens, the chat template.

    splits_as_published says whether text is split as gpt-oss' own tokenizer does, the one way llama.cpp knows for it.
    """

    tokens: tuple[str, ...]
    token_types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int
    padding: int | None
    chat_template: str
    splits_as_published: bool


def read_vocabulary(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> Vocabulary:
    """Read tokenizer.json, tokenizer_config.json and the chat template of a checkpoint with so many embeddings.

    Raises CheckpointError for what is missing or does not hold together, UnsupportedError for what is not gpt-oss'
    kind of tokenizer.
    """
    table = _read(folder / _FILE)
    model = _object(table.get("model"), "model")
    _check_kind(table, model)
    vocab = _object(model.get("vocab"), "model.vocab")
    added = _added(table)
    tokens, types = _by_id(vocab, added, vocab_size)
    ids = {text: number for text, (number, _) in added.items()}
    _check_markers(ids)
    settings = _settings(folder)
    special = {role: _special(role, settings, ids, config) for role in ("bos", "eos", "pad")}
    if special["eos"] is None:
        raise CheckpointError(f"{_SETTINGS} and config.json name no end of a reply (eos)", hint=_HINT)
    return Vocabulary(
        tokens=tuple(tokens),
        token_types=tuple(types),
        merges=tuple(_merges(model.get("merges"), vocab)),
        bos=special["bos"],
        eos=special["eos"],
        padding=special["pad"],
        chat_template=_chat_template(folder, settings),
        splits_as_published=_splits_as_published(table.get("pre_tokenizer")),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}, without which no server can read text", hint=_HINT)
    return read_json(path, MAX_TOKENIZER_BYTES, MAX_TOKENIZER_MARKS)


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / _SETTINGS) if (folder / _SETTINGS).is_file() else {}


def _check_kind(table: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    other = any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or other or table.get("normalizer") is not None:
        raise UnsupportedError(f"{_FILE}: not a byte-level BPE as gpt-oss has", hint=_HINT)


def _splits_as_published(pre_tokenizer: object) -> bool:
    """Whether text is split by the one regular expression, and nothing is put before it."""
    table = pre_tokenizer if isinstance(pre_tokenizer, dict) else {}
    steps = table.get("pretokenizers", [table])
    tables = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    patterns = [step["pattern"] for step in tables if isinstance(step.get("pattern"), dict)]
    return [pattern.get("Regex") for pattern in patterns] == [SPLIT] and not any(
        step.get("add_prefix_space") for step in tables
    )


def _added(table: Mapping[str, Any]) -> dict[str, tuple[int, TokenType]]:
    """Tokens that no merge makes: their ids and types by text."""
    listed = table.get("added_tokens")
    if not isinstance(listed, list):
        raise CheckpointError(f"{_FILE}: no added_tokens", hint=_HINT)
    added = {}
    for each in listed:
        entry = _object(each, "an added token")
        text = entry.get("content")
        if not isinstance(text, str) or not text:
            raise CheckpointError(f"{_FILE}: an added token without text", hint=_HINT)
        control = entry.get("special") is True or (text.startswith("<|") and text.endswith("|>"))
        added[text] = (_id(entry.get("id"), text), TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return added


def _by_id(
    vocab: Mapping[str, Any], added: Mapping[str, tuple[int, TokenType]], vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; an id without a token gets a placeholder, as llama.cpp's own converter gives it."""
    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    normal = {text: (_id(number, text), TokenType.NORMAL) for text, number in vocab.items()}
    for text, (number, kind) in (normal | dict(added)).items():
        if number >= vocab_size:
            raise CheckpointError(
                f"{_FILE}: token {text[:40]!r} has id {str(number)[:20]}, the model has {vocab_size} embeddings",
                hint="tokenizer and weights are not of the same model",
            )
        if types[number] is not TokenType.UNUSED:
            raise CheckpointError(f"{_FILE}: {tokens[number][:40]!r} and {text[:40]!r} have the same id", hint=_HINT)
        tokens[number], types[number] = _encodable(text, _FILE), kind
    return tokens, types


def _merges(merges: object, vocab: Mapping[str, Any]) -> list[str]:
    """Merges as 'left right', from either form that tokenizer.json has had."""
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(f"{_FILE}: no merges", hint=_HINT)
    joined = []
    for number, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise CheckpointError(f"{_FILE}: merge {number} is not a pair of tokens", hint=_HINT)
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(f"{_FILE}: merge {number} is not of tokens in its vocabulary", hint=_HINT)
        joined.append(f"{left} {right}")
    return joined


def _check_markers(ids: Mapping[str, int]) -> None:
    missing = [marker for marker in HARMONY_MARKERS if marker not in ids]
    if missing:
        raise CheckpointError(
            f"{_FILE}: no special token {', '.join(missing)}: servers find gpt-oss' channels by these", hint=_HINT
        )


def _special(role: str, settings: Mapping[str, Any], ids: Mapping[str, int], config: Mapping[str, Any]) -> int | None:
    """The id of a special token: by its text in tokenizer_config.json, else by config.json's id."""
    named = settings.get(f"{role}_token")
    text = named.get("content") if isinstance(named, dict) else named
    if text is None:
        number = config.get(f"{role}_token_id")
        return number if type(number) is int and number in ids.values() else None
    if not isinstance(text, str) or text not in ids:
        raise CheckpointError(f"{_SETTINGS}: {role}_token {str(text)[:40]!r} is no token of {_FILE}", hint=_HINT)
    return ids[text]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str:
    path = folder / _TEMPLATE
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{_TEMPLATE}: larger than any template is", hint=_HINT)
        try:
            template: object = path.read_text("utf-8")
        except ValueError as error:
            raise CheckpointError(f"{_TEMPLATE}: not text in UTF-8", hint=_HINT) from error
    else:
        template = settings.get("chat_template")
    if not isinstance(template, str) or not template:
        raise CheckpointError(f"{folder}: no {_TEMPLATE}; servers would take another model's template", hint=_HINT)
    return _encodable(template, _SETTINGS)


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: {text[:40]!r} is no text", hint=_HINT) from error
    return text


def _id(number: object, text: str) -> int:
    if type(number) is not int or number < 0:
        raise CheckpointError(f"{_FILE}: token {text[:40]!r} has no id", hint=_HINT)
    return number


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{_FILE}: {what} is not an object", hint=_HINT)
    return value
