"""Who loads unsloth's layout, and who only seems to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from reference import reference_model
from torch import Tensor, nn
from torch.nn.functional import linear, softmax
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss import modeling_gpt_oss

from conftest import run_cli
from ossquant import load_model
from ossquant.quantize import quantize
from ossquant.recipe import built_in
from ossquant.runtime.load import placement
from ossquant.verify import verify

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # torch's mean, which double quantization takes, differs in the last bit with the number of threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def unsloth(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """The trained model as unsloth's 4-bit checkpoints have it."""
    folder = tmp_path_factory.mktemp("unsloth") / "out"
    quantize(trained, folder, built_in("nf4").for_unsloth())
    return folder


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    """Two sequences longer than the sliding window of 128."""
    return torch.randint(0, 600, (2, 300), generator=torch.Generator().manual_seed(0))


class SplitExperts(nn.Module):
    """Experts with the parameters that unsloth's have: a linear module for each matrix."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, intermediate, experts = config.hidden_size, config.intermediate_size, range(config.num_local_experts)
        self.limit = config.swiglu_limit
        self.gate_up_projs = nn.ModuleList(nn.Linear(hidden, 2 * intermediate) for _ in experts)
        self.down_projs = nn.ModuleList(nn.Linear(intermediate, hidden) for _ in experts)

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        mixed = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up_projs, self.down_projs, strict=True)):
            weights = (routing_weights * (router_indices == expert)).sum(-1, keepdim=True)
            both = gate_up(hidden_states)
            gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
            mixed += weights * down((up + 1) * gate * torch.sigmoid(1.702 * gate))
        return mixed


class RouterLinear(nn.Module):
    """A weight and a bias, not an nn.Linear, so that bitsandbytes leaves them alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_local_experts))


class NestedRouter(nn.Module):
    """A router with the parameters that unsloth's has."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.linear = RouterLinear(config)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = linear(hidden_states.flatten(0, -2), self.linear.weight, self.linear.bias)
        values, indices = logits.topk(self.top_k, dim=-1)
        return logits, softmax(values, dim=-1), indices


def test_transformers_own_loader_fills_such_modules(
    unsloth: Path, trained: Path, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With modules named as unsloth's, transformers' own bitsandbytes loader takes every tensor, all in 4 bits."""
    monkeypatch.setattr(modeling_gpt_oss, "GptOssExperts", SplitExperts)
    monkeypatch.setattr(modeling_gpt_oss, "GptOssTopKRouter", NestedRouter)
    stock = modeling_gpt_oss.GptOssPreTrainedModel._init_weights

    def begin(self: nn.Module, module: nn.Module) -> None:
        if not isinstance(module, (SplitExperts, NestedRouter)):
            stock(self, module)

    monkeypatch.setattr(modeling_gpt_oss.GptOssPreTrainedModel, "_init_weights", begin)
    model, info = AutoModelForCausalLM.from_pretrained(
        unsloth, dtype=torch.float32, device_map="cpu", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    experts = model.model.layers[1].mlp.experts
    assert all(isinstance(module, Linear4bit) for module in (*experts.gate_up_projs, *experts.down_projs))
    assert type(model.lm_head) is nn.Linear
    for module in model.modules():
        if isinstance(module, Linear4bit):  # computing in bfloat16, as config.json asks, is off by more than 1e-5
            module.compute_dtype, module.weight.quant_state.dtype = torch.float32, torch.float32
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():  # transformers leaves some weights in the dtype that is stored
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    monkeypatch.undo()
    with torch.no_grad():
        found, expected = model(prompt).logits, reference_model(trained, "nf4")(prompt).logits
    assert (found - expected).norm() / expected.norm() <= TOLERANCE


def test_stock_transformers_leaves_the_experts_random(unsloth: Path) -> None:
    """The trap that the command warns of: experts and routers are missing, and no error is raised."""
    _, info = AutoModelForCausalLM.from_pretrained(unsloth, output_loading_info=True)
    missing = {name.split(".mlp.")[1] for name in info["missing_keys"]}
    projections = {f"experts.{kind}_proj{suffix}" for kind in ("gate_up", "down") for suffix in ("", "_bias")}
    assert missing == projections | {"router.weight", "router.bias"}


def test_load_model_gives_the_logits_of_our_own_layout(
    unsloth: Path, quantized: dict[str, Path], prompt: Tensor
) -> None:
    """It loads really in 4 bits, with the very logits of the same weights in our own layout."""
    (theirs, _), (ours, _) = (load_model(folder, dtype="float32") for folder in (unsloth, quantized["nf4"]))
    assert placement(theirs) == placement(ours)
    assert placement(theirs).parameters_4bit > 0.9 * placement(theirs).parameters
    with torch.no_grad():
        assert torch.equal(theirs(prompt).logits, ours(prompt).logits)


def test_saved_again_it_has_our_own_layout(unsloth: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    """save_pretrained of the loaded model writes a checkpoint that stock transformers refuses."""
    model, tokenizer = load_model(unsloth)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    report = verify(tmp_path / "saved", quantized["nf4"])
    assert report.whole
    assert not report.plan.unsloth
    assert report.comparison is not None
    assert not any(distance.squares for distance in report.comparison.roles.values())
    stated = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert stated["quant_method"] == "ossquant"


def test_run_answers(unsloth: Path) -> None:
    """`ossquant run` answers from it as from any other checkpoint."""
    result = run_cli("run", unsloth, "What is the capital of France?", "--reasoning-effort", "low", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["final"] == "The capital of France is Paris."
