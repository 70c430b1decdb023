"""A model that never ends what it says: for tests that stop it."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

MARKERS = ("<|return|>", "<|call|>", "<|endoftext|>", "<|end|>", "<|channel|>", "<|start|>", "<|message|>")


def make_endless(source: Path, output: Path) -> Path:
    """Copy a tiny checkpoint, its lm_head unable to choose a marker: a reply is one final message without end."""
    shutil.copytree(source, output)
    tokens = json.loads((source / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    rows = [token["id"] for token in tokens if token["content"] in MARKERS]
    index = json.loads((source / "model.safetensors.index.json").read_text("utf-8"))
    shard = output / index["weight_map"]["lm_head.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"][rows] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    return output
