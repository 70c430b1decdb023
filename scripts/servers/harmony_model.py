"""A tiny model of gpt-oss' real vocabulary, for a server that renders and parses harmony by its own tokenizer.

It learns dialogues by heart that are given as token ids. Their tokens alone are trained, in a small vocabulary whose
last row stays zero and stands for all others; then each takes its place among 201,088 rows, and the others are zero.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from harmony_tokenizer import PUBLISHED_VOCAB_SIZE, generation_config, special_ids, write_tokenizer
from train_tiny_model import Row, loss_of, make_batches, make_config, make_model, shaken, write_json, write_weights

STEPS = 100
PLAIN_STEPS = 30  # before the weights are rounded and shaken
LEARNING_RATE = 3e-3
HEAD = "lm_head.weight"
ROWS = (HEAD, "model.embed_tokens.weight")  # a token a row


def write_model(folder: Path, dialogues: Sequence[dict[str, Any]], tokenizer: Path) -> None:
    """Train on dialogues' `prompt` and `answer` ids and write the published layout; tokenizer lends its merges."""
    used = sorted({token for dialogue in dialogues for token in (*dialogue["prompt"], *dialogue["answer"])})
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # once all is learned the gradients are tiny, and such numbers are slow
    other = len(used)  # the last row
    small = make_model(make_config() | {"vocab_size": other + 1, "eos_token_id": other, "pad_token_id": other})
    train(small, [_row(dialogue, used) for dialogue in dialogues])
    ids = special_ids(PUBLISHED_VOCAB_SIZE)
    config = make_config() | {
        "vocab_size": PUBLISHED_VOCAB_SIZE, "eos_token_id": ids["<|return|>"], "pad_token_id": ids["<|endoftext|>"]
    }  # fmt: skip
    write_tokenizer(folder, tokenizer, PUBLISHED_VOCAB_SIZE)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(PUBLISHED_VOCAB_SIZE))
    write_weights(folder, _widened(small, used, config))


def _row(dialogue: dict[str, Any], used: list[int]) -> Row:
    place = {token: number for number, token in enumerate(used)}
    return Row(*(torch.tensor([place[token] for token in dialogue[part]]) for part in ("prompt", "answer")))


def train(model: GptOssForCausalLM, rows: Sequence[Row]) -> None:
    """Overfit the model on rows, the later steps on rounded and shaken weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        weights = dict(model.named_parameters())
        if step >= PLAIN_STEPS:
            weights = {name: shaken(name, weight) for name, weight in weights.items()}
        weights[HEAD] = _with_zero_row(weights[HEAD])
        loss = sum(loss_of(model, weights, ids, learned) for ids, learned in make_batches(rows))
        (loss / sum(len(row.answer) for row in rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def _with_zero_row(head: Tensor) -> Tensor:
    """The logit of every token that no dialogue has is zero, and a right answer must be ahead of it."""
    return torch.cat([head[:-1], torch.zeros_like(head[-1:])])


def _widened(small: GptOssForCausalLM, used: list[int], config: dict[str, Any]) -> GptOssForCausalLM:
    """The same model with every token's row in its place."""
    wide, weights = make_model(config), small.state_dict()
    for name in ROWS:
        rows = torch.zeros(config["vocab_size"], config["hidden_size"])
        rows[used] = weights[name][:-1]
        weights[name] = rows
    wide.load_state_dict(weights)
    return wide
