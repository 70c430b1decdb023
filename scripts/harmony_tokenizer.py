"""Write a small harmony tokenizer beside a checkpoint: byte-level BPE, special tokens, chat template.

Run as a script it writes the tokenizer of a vocabulary size from a kept tokenizer.json:

    python scripts/harmony_tokenizer.py FOLDER --source tests/data/tiny/tokenizer.json --vocab-size 201088
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|reserved_200000|>",
    "<|reserved_200001|>",
    "<|return|>",
    "<|constrain|>",
    "<|reserved_200004|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|reserved_200009|>",
    "<|reserved_200010|>",
    "<|reserved_200011|>",
    "<|call|>",
    *(f"<|reserved_{number}|>" for number in range(200013, 200018)),
    "<|endofprompt|>",
)
PUBLISHED_VOCAB_SIZE = 201088  # config.json of gpt-oss-20b and -120b
PUBLISHED_FIRST_SPECIAL = 199998  # <|startoftext|> in their tokenizer.json
UNUSED_ROWS = 8  # the published embedding also ends in rows that no token names
BYTES = 256

# o200k_harmony's split, as alternatives in its own order; llama.cpp knows it as pre-tokenizer "gpt-4o".
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _CLITIC = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = "|".join(
    (
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CLITIC}",
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CLITIC}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# llama.cpp takes a template that mentions <|channel|> for harmony and then parses the channels.
CHAT_TEMPLATE = """\
{%- macro turn(sender, text) -%}
<|start|>{{ sender }}<|message|>{{ text }}<|end|>
{%- endmacro -%}
<|start|>system<|message|>{{ model_identity or 'You are a tiny model made for tests.' }}

Reasoning: {{ reasoning_effort or 'medium' }}

# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}
{{- turn('developer', '# Instructions\\n\\n' + message.content) -}}
{%- elif message.role == 'user' -%}
{{- turn('user', message.content) -}}
{%- elif message.role == 'assistant' -%}
{{- turn('assistant<|channel|>final', message.content) -}}
{%- else -%}
{{- raise_exception('harmony has no place for the role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""


def first_special_id(vocab_size: int) -> int:
    """Return the id of <|startoftext|>: the published one where it fits, else near the end of the vocabulary."""
    if vocab_size >= PUBLISHED_FIRST_SPECIAL + len(SPECIAL_TOKENS):
        return PUBLISHED_FIRST_SPECIAL
    least = BYTES + len(SPECIAL_TOKENS) + UNUSED_ROWS
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is below {least}, the least that holds every byte")
    return vocab_size - UNUSED_ROWS - len(SPECIAL_TOKENS)


def special_ids(vocab_size_or_tokenizer: Any) -> dict[str, int]:
    """Map each special token to its id, for a vocabulary size or for a tokenizer (tokenizers or transformers)."""
    if isinstance(vocab_size_or_tokenizer, int):
        first = first_special_id(vocab_size_or_tokenizer)
        return {token: first + offset for offset, token in enumerate(SPECIAL_TOKENS)}
    vocab = vocab_size_or_tokenizer.get_vocab()
    return {token: vocab[token] for token in SPECIAL_TOKENS}


def generation_config(vocab_size: int) -> dict[str, Any]:
    """Return the content of generation_config.json for a vocabulary size."""
    ids = special_ids(vocab_size)
    return {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "transformers_version": "4.55.0.dev0",
    }


def train_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Learn up to `count` BPE merges from texts; the special tokens in them are left out."""
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES + count,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in special.split(text)), trainer)
    return _merges(json.loads(tokenizer.to_str()))


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Read the BPE merges of a tokenizer.json."""
    return _merges(json.loads(path.read_text(encoding="utf-8")))


def build_tokenizer(merges: Sequence[tuple[str, str]], vocab_size: int) -> Tokenizer:
    """Put bytes, merges, placeholders and special tokens together, each at its id.

    Merges that do not fit below the special tokens are dropped; ids that stay free get an unreachable token.
    """
    first = first_special_id(vocab_size)
    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    kept = []
    for left, right in merges:
        if len(vocab) == first and left + right not in vocab:
            break
        vocab.setdefault(left + right, len(vocab))
        kept.append((left, right))
    # The split never hands out a piece with both letters and digits, so no text becomes a placeholder.
    vocab.update({f"placeholder{number}": number for number in range(len(vocab), first)})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=kept))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path | str, texts_or_merges: Path | str | Sequence[Any], vocab_size: int) -> dict[str, int]:
    """Write tokenizer.json, its two companions and chat_template.jinja; return the special ids.

    texts_or_merges is the path of a tokenizer.json to take the merges from, a list of (left, right) merges,
    or a list of texts to learn them from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(_as_merges(texts_or_merges, vocab_size), vocab_size)
    ids = special_ids(vocab_size)
    if special_ids(tokenizer) != ids:
        raise ValueError(f"special tokens landed on {special_ids(tokenizer)}, not on {ids}")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(ids))
    _write_json(folder / "special_tokens_map.json", _ROLES)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return ids


_ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}


def _as_merges(texts_or_merges: Path | str | Sequence[Any], vocab_size: int) -> list[tuple[str, str]]:
    if isinstance(texts_or_merges, (str, Path)):
        return read_merges(Path(texts_or_merges))
    if all(isinstance(item, str) for item in texts_or_merges):
        return train_merges(texts_or_merges, first_special_id(vocab_size) - BYTES)
    return [(merge[0], merge[1]) for merge in texts_or_merges]


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _merges(tokenizer_json: dict[str, Any]) -> list[tuple[str, str]]:
    # Older files hold "left right" in one string, newer ones a pair.
    merges = [m.split(" ") if isinstance(m, str) else m for m in tokenizer_json["model"]["merges"]]
    return [(left, right) for left, right in merges]


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(number): {"content": token, **flags} for token, number in ids.items()},
        **_ROLES,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the tokenizer of a vocabulary size from a kept tokenizer.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, default=Path("tests/data/tiny/tokenizer.json"))
    parser.add_argument("--vocab-size", type=int, default=PUBLISHED_VOCAB_SIZE)
    arguments = parser.parse_args()
    ids = write_tokenizer(arguments.folder, arguments.source, arguments.vocab_size)
    print(f"{arguments.folder}: <|startoftext|> {ids['<|startoftext|>']}, <|return|> {ids['<|return|>']}")


if __name__ == "__main__":
    main()
