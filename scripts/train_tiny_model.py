#!/usr/bin/env python3
"""Train the tiny gpt-oss model of the tests and write it in the published layout.

The model learns some harmony dialogues by heart, so that a right answer is known for every prompt and a server
that parses harmony finds its channels. Training sees what storage does to the weights (MXFP4 experts, the rest
bf16) and noise the size of a further 4-bit rounding.

    scripts/train_tiny_model.py [OUTPUT]        OUTPUT is tests/data/tiny unless said otherwise
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from harmony_tokenizer import first_special_id, generation_config, special_ids, write_tokenizer

EFFORTS = ("low", "medium", "high")  # the answer is the same at each
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # the names transformers gives the fused weights
ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
GROUP = 32  # MXFP4: weights that share one scale
NF4_BLOCK = 64
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # e2m1 magnitudes, in the order of their codes

VOCAB_SIZE = 640
LAYERS = 4
STEPS = 240
PLAIN_STEPS = 60  # steps before the weights are rounded and shaken
LEARNING_RATE = 3e-3
NOISE = 0.09  # of a matrix's root mean square; NF4 in blocks of 64 adds 0.07
BALANCE = 0.01  # weight of the router's load balancing loss
EMBEDDING_START = 0.5  # standard deviation
SINK = 1.0  # added to the sinks' start: each weighs about as much as three tokens that match nothing
ROUGH = 0.3  # standard deviation of what biases, norms and sinks start with
GAP = 8.0  # logits that the right token is pushed ahead of every other one
LONG_ANSWER = 160  # tokens: more than the sliding window of 128
MOST_PADDING = 24  # tokens between the shortest and the longest row of a batch


@dataclass(frozen=True)
class Dialogue:
    """A conversation, how hard to think about it, and the answer the model gives."""

    messages: Sequence[dict[str, str]]
    reasoning_effort: str
    analysis: str
    final: str

    @property
    def answer(self) -> str:
        """The text generated after `<|start|>assistant`."""
        return (
            f"<|channel|>analysis<|message|>{self.analysis}<|end|>"
            f"<|start|>assistant<|channel|>final<|message|>{self.final}<|return|>"
        )


@dataclass(frozen=True)
class Row:
    """The token ids of a dialogue: what the model is given and what it must say."""

    prompt: Tensor
    answer: Tensor

    @property
    def ids(self) -> Tensor:
        """Prompt and answer as one sequence."""
        return torch.cat([self.prompt, self.answer])


RIVER = (
    "A river begins high in the hills, where rain and melting snow gather in small streams. The streams join and "
    "run down steep slopes, fast and cold, carrying sand and stones along. Lower down the land grows flat, the "
    "water slows, and the river bends from side to side. It drops the sand it carried, and fields beside it grow "
    "green. Towns are built on its banks, because people need water to drink, to wash and to move goods by boat. "
    "Near the coast the river becomes wide and lazy, splits into many arms, and at last it flows into the sea. "
    "There the sun lifts the water into the air again, clouds form, and the wind takes them back to the hills. "
    "So the journey never ends."
)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


QUESTIONS: tuple[tuple[list[dict[str, str]], str, str], ...] = (
    (
        [_user("What is the capital of France?")],
        "A simple fact: Paris.",
        "The capital of France is Paris.",
    ),
    (
        [_user("What colour is a clear sky?")],
        "They ask for a colour: blue.",
        "A clear sky is blue.",
    ),
    (
        [
            {"role": "developer", "content": "Answer with one word."},
            _user("What is the capital of France?"),
        ],
        "One word is wanted: Paris.",
        "Paris",
    ),
    (
        [
            _user("What is the capital of Italy?"),
            {"role": "assistant", "content": "The capital of Italy is Rome."},
            _user("And of Spain?"),
        ],
        "They ask for the capital of Spain: Madrid.",
        "The capital of Spain is Madrid.",
    ),
    (
        [_user("What is 2 + 3?")],
        "Add: 2 + 3 = 5.",
        "2 + 3 = 5",
    ),
    (
        [_user("What is 6 times 7?")],
        "Multiply: 6 * 7 = 42.",
        "6 times 7 is 42.",
    ),
    (
        [_user("Who are you?")],
        "They ask who I am.",
        "I am a tiny model made for tests. I know a few answers by heart.",
    ),
    (
        [_user("Name three colours.")],
        "Any three will do.",
        "1. red\n2. green\n3. blue",
    ),
    (
        [_user("Say hello in three languages.")],
        "French, Japanese and Greek.",
        "Salut à tous ! こんにちは。 Γειά σου 👋",
    ),
    (
        [_user("Give me a JSON object with one key.")],
        "Keep it short and valid.",
        '{"answer": 42}',
    ),
    (
        [_user("Tell me about the life of a river.")],
        "From the hills to the sea, in one paragraph.",
        RIVER,
    ),
)
DIALOGUES = [
    Dialogue(messages, effort, analysis, final) for messages, analysis, final in QUESTIONS for effort in EFFORTS
]
UNKNOWN = ("This is new to me.", "I do not know that.")  # the answer to what was never asked


def make_config() -> dict[str, Any]:
    """Return config.json: the published keys with small sizes."""
    ids = special_ids(VOCAB_SIZE)
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": ids["<|return|>"],
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "max_position_embeddings": 131072,
        "model_type": "gpt_oss",
        "num_attention_heads": 4,
        "num_experts_per_tok": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "pad_token_id": ids["<|endoftext|>"],
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        },
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
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def make_model(config: dict[str, Any]) -> GptOssForCausalLM:
    """Build the untrained fp32 model of a config."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    model = GptOssForCausalLM._from_config(
        GptOssConfig.from_dict(plain), dtype=torch.float32, attn_implementation="eager"
    )
    roughen(model)
    return model


@torch.no_grad()
def roughen(model: GptOssForCausalLM) -> None:
    """Start biases, norms and sinks away from their neutral values, so that a program that drops one is caught."""
    # From the usual 0.02 attention takes far longer to find the word that tells the questions apart.
    model.model.embed_tokens.weight.normal_(0, EMBEDDING_START)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight", "sinks")):
            weight += torch.randn_like(weight) * ROUGH + (SINK if name.endswith("sinks") else 0)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write a tokenizer learned from the dialogues and load it."""
    write_tokenizer(folder, [], VOCAB_SIZE)
    template = AutoTokenizer.from_pretrained(folder)
    texts = [render_prompt(template, dialogue) + dialogue.answer for dialogue in DIALOGUES]
    write_tokenizer(folder, [*texts, " ".join(UNKNOWN)], VOCAB_SIZE)
    return AutoTokenizer.from_pretrained(folder)


def render_prompt(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> str:
    """Render a dialogue up to the point where the model speaks."""
    return tokenizer.apply_chat_template(
        list(dialogue.messages),
        tokenize=False,
        add_generation_prompt=True,
        reasoning_effort=dialogue.reasoning_effort,
    )


def make_row(tokenizer: PreTrainedTokenizerBase, dialogue: Dialogue) -> Row:
    """Tokenize a dialogue."""
    texts = (render_prompt(tokenizer, dialogue), dialogue.answer)
    return Row(*(torch.tensor(tokenizer.encode(text, add_special_tokens=False)) for text in texts))


def babble(tokenizer: PreTrainedTokenizerBase, chance: random.Random) -> str:
    """Return text of random tokens, mostly short."""
    ids = [chance.randrange(first_special_id(VOCAB_SIZE)) for _ in range(int(2 ** chance.uniform(0, 6)))]
    return tokenizer.decode(ids).replace("\ufffd", "")


def unheard(tokenizer: PreTrainedTokenizerBase, chance: random.Random) -> Dialogue:
    """Make up a dialogue the model cannot know, so that it learns to say so in good harmony."""
    before = [_user(babble(tokenizer, chance)), {"role": "assistant", "content": babble(tokenizer, chance)}]
    messages = before * chance.randrange(2) + [_user(babble(tokenizer, chance))]
    effort = chance.choice(EFFORTS)
    return Dialogue(messages, effort, *UNKNOWN)


def disguised(tokenizer: PreTrainedTokenizerBase, chance: random.Random) -> Dialogue:
    """Put a known question after instructions or turns that do not bear on it."""
    known, other = (chance.choice([d for d in DIALOGUES if len(d.messages) == 1]) for _ in range(2))
    before = [[{"role": "developer", "content": babble(tokenizer, chance)}]]
    if len(other.final) < len(RIVER):
        before.append([*other.messages, {"role": "assistant", "content": other.final}])
    return replace(known, messages=[*chance.choice(before), *known.messages])


def mxfp4_scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round (..., in) weights to e2m1 values and the power of two of each group of 32.

    Returns values (..., in / 32, 32), each one of LEVELS with a sign, and exponents (..., in / 32).
    """
    groups = rows.unflatten(-1, (-1, GROUP))
    # frexp's mantissa lies in [0.5, 1), so its exponent is floor(log2) + 1.
    exponents = (torch.frexp(groups.abs().amax(-1)).exponent - 3).clamp(-127, 127)
    scaled = torch.ldexp(groups, -exponents.unsqueeze(-1))
    step = torch.where(scaled.abs() < 2, 0.5, torch.where(scaled.abs() < 4, 1.0, 2.0))
    return ((scaled / step).round() * step).clamp(-6, 6), exponents


def mxfp4_rounded(rows: Tensor) -> Tensor:
    """Return (..., in) weights as they read back from MXFP4."""
    values, exponents = mxfp4_scaled(rows)
    return torch.ldexp(values, exponents.unsqueeze(-1)).flatten(-2)


def mxfp4_packed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Pack (..., in) weights into blocks (..., in / 32, 16) and scales (..., in / 32), both uint8."""
    values, exponents = mxfp4_scaled(rows)
    codes = (torch.bucketize(values.abs().contiguous(), LEVELS) + 8 * torch.signbit(values)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def nf4_rounded(rows: Tensor) -> Tensor:
    """Return an (out, in) matrix as it reads back from bitsandbytes NF4."""
    return dequantize_4bit(*quantize_4bit(rows.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4"))


def stored(name: str, weight: Tensor) -> Tensor:
    """Return a weight as it reads back from the written checkpoint."""
    return mxfp4_rounded(weight.mT).mT if name.endswith(EXPERTS) else weight.bfloat16().float()


def shaken(name: str, weight: Tensor) -> Tensor:
    """Return a weight as stored and, if a tool may round it to 4 bits, with noise; gradients pass straight through."""
    with torch.no_grad():
        change = stored(name, weight) - weight
        if name.endswith(EXPERTS + ATTENTION):
            change += torch.randn_like(weight) * weight.square().mean().sqrt() * NOISE
    return weight + change


def choose_rows(tokenizer: PreTrainedTokenizerBase, step: int, chance: random.Random) -> list[Row]:
    """Return the rows of a step: each question at one effort, the long one every other time, and made-up ones."""
    questions = range(len(QUESTIONS) - step % 2)  # the long one stands last
    chosen = [DIALOGUES[len(EFFORTS) * i + (i + step // 2) % len(EFFORTS)] for i in questions]
    chosen += [unheard(tokenizer, chance), unheard(tokenizer, chance), disguised(tokenizer, chance)]
    return [make_row(tokenizer, dialogue) for dialogue in chosen]


def make_batches(rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and the mask of the tokens to learn, rows of like length together, padded on the right."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and len(row.ids) > len(batch[0].ids) + MOST_PADDING:
            yield pad(batch)
            batch = []
        batch.append(row)
    yield pad(batch)


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return (rows, tokens) ids and the mask of the answers' tokens."""
    learned = [torch.cat([torch.zeros_like(row.prompt), torch.ones_like(row.answer)]) for row in rows]
    ids = pad_sequence([row.ids for row in rows], batch_first=True)
    return ids, pad_sequence(learned, batch_first=True).bool()


def gaps(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how far each target's logit is ahead of the best other one; negative where greedy text goes wrong."""
    right = logits.gather(-1, targets.unsqueeze(-1))
    others = logits.scatter(-1, targets.unsqueeze(-1), -torch.inf)
    return (right - others.amax(-1, keepdim=True)).squeeze(-1)


def loss_of(model: GptOssForCausalLM, weights: dict[str, Tensor], ids: Tensor, learned: Tensor) -> Tensor:
    """Return the loss summed over the answers' tokens, the router's balance included."""
    inputs = {"input_ids": ids, "output_router_logits": True, "use_cache": False}
    output = functional_call(model, weights, kwargs=inputs)
    logits, targets = output.logits[:, :-1][learned[:, 1:]], ids[:, 1:][learned[:, 1:]]
    surprise = functional.cross_entropy(logits, targets, reduction="sum")
    behind = (GAP - gaps(logits, targets)).relu().sum()
    return surprise + behind + BALANCE * len(targets) * output.aux_loss


def train(model: GptOssForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Overfit the model on the dialogues, the later steps on rounded and shaken weights."""
    chance = random.Random(0)  # noqa: S311  a repeatable choice is what is wanted
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        weights = dict(model.named_parameters())
        if step >= PLAIN_STEPS:
            weights = {name: shaken(name, weight) for name, weight in weights.items()}
        rows = choose_rows(tokenizer, step, chance)
        losses = [loss_of(model, weights, ids, learned) for ids, learned in make_batches(rows)]
        loss = sum(losses) / sum(len(row.answer) for row in rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"step {step:4d}  loss {loss.item():8.4f}", flush=True)


def to_disk(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Return the published tensors that stand for one parameter of the model."""
    if name.endswith(EXPERTS):
        blocks, scales = mxfp4_packed(weight.mT)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return {name: weight.bfloat16()}


def in_two(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split tensors, in their order, into two shards of about the same bytes."""
    half, taken = sum(tensor.nbytes for tensor in tensors.values()) // 2, 0
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        shards[taken >= half][name] = tensor.contiguous()
        taken += tensor.nbytes
    return shards


def write_json(path: Path, content: Any) -> None:
    """Write one JSON file."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, model: GptOssForCausalLM) -> None:
    """Write the shards and their index."""
    shards = in_two(
        {key: value for name, weight in model.state_dict().items() for key, value in to_disk(name, weight).items()}
    )
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def to_nf4(model: GptOssForCausalLM) -> None:
    """Send the attention and the experts of a loaded model through NF4, in place."""
    for name, weight in model.named_parameters():
        if name.endswith(ATTENTION):
            weight.data = nf4_rounded(weight.data)
        elif name.endswith(EXPERTS):
            weight.data = torch.stack([nf4_rounded(expert.mT).mT for expert in weight.data])


@torch.no_grad()
def smallest_gap(model: GptOssForCausalLM, row: Row) -> float:
    """Return the smallest lead of a right token over the next best one in an answer."""
    logits = model(row.ids[None]).logits[0, len(row.prompt) - 1 : -1]
    return gaps(logits.float(), row.answer).min().item()


def answers_right(model: GptOssForCausalLM, row: Row) -> bool:
    """Generate greedily and compare token for token."""
    given = row.prompt[None]
    output = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=len(row.answer) + 8
    )
    return torch.equal(output[0, len(row.prompt) :], row.answer)


@torch.no_grad()
def every_expert_used(model: GptOssForCausalLM, rows: Sequence[Row]) -> bool:
    """Print the share of a layer's routes that goes to each expert, and say whether none is idle."""
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_local_experts)
    for row in rows:
        for layer, logits in enumerate(model(row.ids[None], output_router_logits=True).router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=counts.shape[1])
    print("share of routes per expert, a layer a line:")
    for layer in (counts / counts.sum(-1, keepdim=True)).tolist():
        print(" ".join(f"{share:6.1%}" for share in layer))
    return bool(counts.all())


def load(folder: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    """Load the written checkpoint as any user would."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check(folder: Path, rows: Sequence[Row]) -> bool:
    """Reload the checkpoint three ways, print what it answers, and say whether all is right."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32}
    models = {name: load(folder, dtype) for name, dtype in dtypes.items()}
    to_nf4(models["nf4"])
    print(f"\n{'tokens':>6} {'effort':6} " + "".join(f"{name:>13}" for name in models) + "  question", flush=True)
    all_right, least = True, dict.fromkeys(models, float("inf"))
    for dialogue, row in zip(DIALOGUES, rows, strict=True):
        cells = []
        for name, model in models.items():
            right, gap = answers_right(model, row), smallest_gap(model, row)
            all_right &= right
            least[name] = min(least[name], gap)
            cells.append(f"{'right' if right else 'WRONG':>6} {gap:6.2f}")
        question = dialogue.messages[-1]["content"]
        print(f"{len(row.answer):6d} {dialogue.reasoning_effort:6} {' '.join(cells)}  {question}", flush=True)
    print("smallest gap in logits: " + ", ".join(f"{name} {gap:.2f}" for name, gap in least.items()))
    return all_right & every_expert_used(models["fp32"], rows)


def main() -> int:
    """Train the tiny model, write it, reload it and check every answer."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("output", nargs="?", type=Path, default=Path("tests/data/tiny"))
    folder = parser.parse_args().output
    started = time.monotonic()
    torch.set_num_threads(2)  # another count adds up in another order and gives other bytes
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads memory it has not written
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # once all is learned the gradients are tiny, and such numbers are slow
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = make_tokenizer(folder)
    rows = [make_row(tokenizer, dialogue) for dialogue in DIALOGUES]
    if max(len(row.answer) for row in rows) <= LONG_ANSWER:
        raise ValueError(f"no answer is longer than {LONG_ANSWER} tokens")
    model = make_model(make_config())
    train(model, tokenizer)
    write_json(folder / "config.json", make_config())
    write_json(folder / "generation_config.json", generation_config(VOCAB_SIZE))
    write_json(folder / "dialogues.json", [asdict(dialogue) for dialogue in DIALOGUES])
    write_weights(folder, model)
    all_right = check(folder, rows)
    print(f"{folder}: {'all right' if all_right else 'NOT RIGHT'} in {time.monotonic() - started:.0f} s")
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
