#!/usr/bin/env python3
"""Write a random gpt-oss checkpoint in the exact published layout, a tokenizer included.

    scripts/make_checkpoint.py OUTPUT tiny
    scripts/make_checkpoint.py OUTPUT 20b                 13.8 GB
    scripts/make_checkpoint.py OUTPUT 120b --layers 4     a slice of the 120b shape
    scripts/make_checkpoint.py OUTPUT tiny --form bf16    the layout that transformers writes

Weights are drawn from a pool of normal values of a realistic scale, each piece with signs of its own: fast to
make and as hard to compress as real ones. Pieces are written as they are made, in a few hundred MB of memory.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from harmony_tokenizer import generation_config, special_ids, write_tokenizer
from ossquant.checkpoint.writer import CheckpointWriter, plan_shards
from ossquant.codec import mxfp4
from ossquant.layout import Role
from ossquant.plan import Plan, make_plan
from ossquant.quantize import output_config
from ossquant.recipe import BUILT_IN, Recipe
from ossquant.scheme import Scheme, StoredTensor
from ossquant.spec import ModelSpec, alternating_layer_types

PIECE = 8 * 2**20
POOL = 2**22  # weights
STD = 0.02  # of a weight matrix; gpt-oss' initializer_range
TINY = ModelSpec(
    num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=4, hidden_size=192, intermediate_size=128,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=640, sliding_window=128,
    max_position_embeddings=131072, layer_types=alternating_layer_types(4),
)  # fmt: skip
FORMS = {"mxfp4": Recipe("mxfp4", "published", {Role.EXPERTS: Scheme("mxfp4")}), "bf16": BUILT_IN["bf16"]}
TOKENIZER = Path(__file__).parent.parent / "tests/data/tiny/tokenizer.json"


def make_checkpoint(
    output: Path, spec: ModelSpec, form: str = "mxfp4", seed: int = 0, max_shard_size: int = 5 * 10**9
) -> Plan:
    """Write a checkpoint of spec. An interrupted one goes on when it is made again."""
    plan = make_plan(spec, FORMS[form])
    shards = plan_shards(plan, max_shard_size)
    pool = _Pool(seed)
    with (
        CheckpointWriter(output, shards, {"seed": seed}, force=False) as writer,
        ThreadPoolExecutor(2) as threads,
    ):
        pieces = [
            partial(_write_piece, writer, pool, part, offset, seed)
            for entry in plan.tensors
            for part in entry.stored
            for offset in range(0, part.nbytes, PIECE)
            if writer.needs(part.name)
        ]
        list(threads.map(lambda piece: piece(), pieces))
        with TemporaryDirectory() as folder:
            side_files = _write_side_files(Path(folder), spec)
            writer.commit(output_config(_config(spec), plan), plan.nbytes, side_files)
    return plan


def _write_side_files(folder: Path, spec: ModelSpec) -> list[Path]:
    write_tokenizer(folder, TOKENIZER, spec.vocab_size)
    text = json.dumps(generation_config(spec.vocab_size), indent=2)
    (folder / "generation_config.json").write_text(text + "\n")
    return sorted(folder.iterdir())


class _Pool:
    """Random values to draw pieces from, as the bytes of each kind of tensor."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        weights = (rng.standard_normal(POOL, np.float32) * STD).view(np.uint32) >> 16
        self.weights = weights.astype(np.uint16)
        blocks, scales = mxfp4.quantize(self.weights.reshape(1, -1))
        self.blocks, self.scales = blocks.reshape(-1), scales.reshape(-1)
        self.norms = ((1 + 0.1 * rng.standard_normal(POOL // 64, np.float32)).view(np.uint32) >> 16).astype(np.uint16)

    def draw(self, part: StoredTensor, offset: int, nbytes: int, seed: int) -> bytes:
        """The bytes of one piece of a tensor."""
        rng = np.random.default_rng([seed, offset, *part.name.encode()])
        if part.name.endswith("norm.weight"):
            return _wrap(self.norms, nbytes, rng).tobytes()
        if part.name.endswith("_scales"):
            return _wrap(self.scales, nbytes, rng).tobytes()
        if part.name.endswith("_blocks"):
            return (_wrap(self.blocks, nbytes, rng) ^ _bits(nbytes, rng) & 0x88).tobytes()
        signs = _bits(nbytes, rng).view(np.uint16) & 0x8000
        return (_wrap(self.weights, nbytes, rng) ^ signs).tobytes()


def _wrap(pool: Any, nbytes: int, rng: np.random.Generator) -> Any:
    begin = int(rng.integers(pool.size))
    count = nbytes // pool.itemsize
    return np.resize(np.roll(pool, begin), count) if count > pool.size else np.take(
        pool, np.arange(begin, begin + count), mode="wrap"
    )  # fmt: skip


def _bits(nbytes: int, rng: np.random.Generator) -> Any:
    return np.frombuffer(rng.bytes(nbytes), np.uint8)


def _write_piece(writer: CheckpointWriter, pool: _Pool, part: StoredTensor, offset: int, seed: int) -> None:
    nbytes = min(PIECE, part.nbytes - offset)
    writer.write(part.name, memoryview(pool.draw(part, offset, nbytes, seed)), offset, piece=PIECE)


def _config(spec: ModelSpec) -> dict[str, Any]:
    """config.json as OpenAI publishes it, for the dimensions of spec."""
    ids = special_ids(spec.vocab_size)
    fields = asdict(spec) | {"layer_types": list(spec.layer_types)}
    return fields | {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": ids["<|return|>"],
        "experts_per_token": spec.num_experts_per_tok,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "initializer_range": STD,
        "model_type": "gpt_oss",
        "output_router_logits": False,
        "pad_token_id": ids["<|endoftext|>"],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
    }


def _spec(size: str, layers: int | None) -> ModelSpec:
    spec = TINY if size == "tiny" else ModelSpec.published(size)
    return replace(spec, num_hidden_layers=layers, layer_types=alternating_layer_types(layers)) if layers else spec


def main() -> None:
    """Write a random checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("size", choices=("tiny", "20b", "120b"))
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--form", choices=FORMS, default="mxfp4")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    plan = make_checkpoint(arguments.output, _spec(arguments.size, arguments.layers), arguments.form, arguments.seed)
    print(f"{arguments.output}: {plan.parameters:,} parameters, {plan.nbytes:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
