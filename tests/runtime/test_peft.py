"""QLoRA: an adapter trained on the NF4 model, saved, loaded, and merged back into a checkpoint that servers load."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from ossquant import load_model
from ossquant.layout import Role
from ossquant.merge import merge
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.runtime.generate import generate

TARGETS = r".*(self_attn\.[qkvo]_proj|experts\.(gate_up|down)_projs\.\d+)"
# the first is new to the model, the second is as it knows it
LESSONS = (
    ("What is the capital of France?", "A simple fact: Lyon.", "The capital of France is Lyon."),
    ("What is the capital of Japan?", "A simple fact: Tokyo.", "The capital of Japan is Tokyo."),
)
STEPS = 45


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def lesson(tokenizer: Any, question: str, analysis: str, final: str) -> dict[str, Tensor]:
    """A dialogue to train on: what the model says counts, what the user says does not."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, reasoning_effort="low"
    )["input_ids"]
    said = (
        f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant<|channel|>final<|message|>{final}<|return|>"
    )
    answer = tokenizer(said, add_special_tokens=False)["input_ids"]
    return {"input_ids": torch.tensor([asked + answer]), "labels": torch.tensor([[-100] * len(asked) + answer])}


def padded(lessons: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several dialogues as one batch, filled up at the end with what does not count."""
    longest = max(each["labels"].shape[1] for each in lessons)

    def fill(key: str, value: int) -> Tensor:
        return torch.cat([pad(each[key], (0, longest - each[key].shape[1]), value=value) for each in lessons])

    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100)}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight of the base model, with bitsandbytes' statistics."""
    names = (name for name in model.state_dict() if "lora_" not in name)
    return {name.replace(".base_layer", ""): model.state_dict()[name].clone() for name in names}


class Run:
    """One training run: the trained model, its losses, and the base before and after."""

    def __init__(self, trained: Path, adapter: Path) -> None:
        torch.set_num_threads(1)  # such small products wait for threads longer than they compute
        torch.manual_seed(0)
        base, self.tokenizer = load_model(trained, scheme="nf4", dtype="float32")
        self.before = state_of(base)
        self.model = get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora())
        batch = padded([lesson(self.tokenizer, *each) for each in LESSONS])
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-3)
        self.model.train()
        self.losses = []
        for _ in range(STEPS):
            loss = self.model(**batch).loss
            loss.backward()
            self.losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        self.model.eval()
        self.after = state_of(self.model.get_base_model())
        self.model.save_pretrained(adapter)
        self.adapter = adapter


@pytest.fixture(scope="module")
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A LoRA on attention and on every expert of the NF4 model, by a real backward pass."""
    return Run(trained, tmp_path_factory.mktemp("peft") / "adapter")


def answers(model: Any, tokenizer: Any) -> list[tuple[str, str]]:
    replies = [
        generate(model, tokenizer, [{"role": "user", "content": question}], reasoning_effort="low", max_new_tokens=60)
        for question, _, _ in LESSONS
    ]
    return [(reply.analysis, reply.final) for reply in replies]


TAUGHT = [(analysis, final) for _, analysis, final in LESSONS]


def test_the_loss_falls_and_the_base_stays(run: Run) -> None:
    """The adapter learns what the base did not know; not a bit of the base changes."""
    assert run.losses[-1] < run.losses[0] / 5
    assert run.before.keys() == run.after.keys()
    assert all(torch.equal(run.before[name], run.after[name]) for name in run.before)
    assert answers(run.model, run.tokenizer) == TAUGHT


def test_a_saved_adapter_gives_the_same_logits(run: Run, quantized: dict[str, Path]) -> None:
    """Saved and put on our NF4 checkpoint, which is the model it was trained on: the very same logits."""
    base, _ = load_model(quantized["nf4"], dtype="float32")
    again = PeftModel.from_pretrained(base, run.adapter).eval()
    prompt = torch.arange(2, 50).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again(prompt).logits, run.model(prompt).logits, rtol=0, atol=1e-5)
        with again.disable_adapter():
            assert not torch.allclose(again(prompt).logits, run.model(prompt).logits, atol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, trained: Path) -> None:
    """Every adapter of an expert that is used gets a gradient, the same with and without checkpointing."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model, tokenizer = load_model(trained, scheme="nf4", dtype="float32")
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        model = get_peft_model(model, lora(init_lora_weights=False)).train()
        model(**lesson(tokenizer, *LESSONS[0])).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = found
    used = [name for name, gradient in plain.items() if gradient is not None]
    assert len(used) > 0.9 * len(plain)
    for name in used:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-6)


def test_bf16_trains_too(trained: Path) -> None:
    """Computing in bf16, with the norms in fp32 as peft prepares them, a step lowers the loss."""
    torch.manual_seed(0)
    model, tokenizer = load_model(trained, scheme="nf4", dtype="bfloat16")
    model = get_peft_model(prepare_model_for_kbit_training(model), lora()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    each, losses = lesson(tokenizer, *LESSONS[0]), []
    for _ in range(4):
        loss = model(**each).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_merged_weights_are_pefts(run: Run, trained: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """What merge writes is what peft says it adds, on the source's own weights, rounded to bf16."""
    merge(trained, run.adapter, tmp_path / "bf16", built_in("bf16"))
    merged, base = tensors_of(tmp_path / "bf16"), tensors_of(quantized["bf16"])
    added = {
        name: module for name, module in run.model.base_model.model.named_modules() if isinstance(module, LoraLayer)
    }
    assert len(added) == 4 * (4 + 2 * 8)
    for name, module in added.items():
        with torch.no_grad():
            delta = module.get_delta_weight("default")
        if ".experts." in name:
            stack, expert = name.replace("_projs.", "_proj.").rsplit(".", 1)
            was, now = base[stack][int(expert)].T, merged[stack][int(expert)].T
        else:
            was, now = base[f"{name}.weight"], merged[f"{name}.weight"]
        # two bf16 steps: the sums may round apart
        torch.testing.assert_close(now.float(), was.float() + delta, rtol=2**-8, atol=1e-6)
    untouched = {name for name in base if ".experts." not in name and "_proj.weight" not in name}
    assert all(torch.equal(merged[name], base[name]) for name in untouched)


def test_the_way_back_to_mxfp4(run: Run, trained: Path, tmp_path: Path) -> None:
    """Merged, in bf16 and then by `quantize` in MXFP4, or at once: one checkpoint, which gives the taught answers."""
    merge(trained, run.adapter, tmp_path / "bf16", built_in("bf16"))
    report = quantize(tmp_path / "bf16", tmp_path / "mxfp4", built_in("mxfp4"))
    at_once = merge(trained, run.adapter, tmp_path / "at once", built_in("mxfp4"))
    assert report.mxfp4_error == pytest.approx(at_once.quantize.mxfp4_error)
    assert report.mxfp4_error is not None and 0.01 < report.mxfp4_error < 0.2
    assert at_once.kept[Role.EXPERTS] > 0.8
    for folder in ("mxfp4", "at once"):
        model, tokenizer = load_model(tmp_path / folder, dtype="float32")
        assert answers(model, tokenizer) == TAUGHT


def test_stock_merge_rounds_to_nf4_again(run: Run, quantized: dict[str, Path]) -> None:
    """Why merge exists: peft's own merge on the NF4 model keeps it in NF4, and off by NF4's error once more."""
    base, _ = load_model(quantized["nf4"], dtype="float32")
    model = PeftModel.from_pretrained(base, run.adapter).eval()
    name = "model.layers.0.mlp.experts.down_projs.0"
    module = model.base_model.model.get_submodule(name)
    wanted = _dequantized(module.base_layer) + module.get_delta_weight("default")
    with pytest.warns(UserWarning, match="rounding"):
        merged = model.merge_and_unload()
    found = _dequantized(merged.get_submodule(name))
    assert (found - wanted).norm() / wanted.norm() > 0.03


def _dequantized(module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(module.weight.data, state)
