"""transformers' MXFP4 kernels, with a stand-in for the package that holds them: used rightly, or left, and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import Behaviour, stand_in
from peft import LoraConfig, PeftModel, get_peft_model

from gpu_check_case import Setting, SkipCase
from gpu_check_tiny import check_kernels
from ossquant.errors import OssquantError, UnsupportedError, UsageError
from ossquant.runtime import hub_kernels
from ossquant.runtime.experts import NativeMxfp4Experts
from ossquant.runtime.generate import generate
from ossquant.runtime.hub_experts import KernelExperts
from ossquant.runtime.hub_kernels import obstacle, use_mxfp4_kernels
from ossquant.runtime.hub_trial import TOLERANCE, try_kernels
from ossquant.runtime.load import load_model, placement
from ossquant.runtime.quantizer import parameters_4bit

HOPPER = (9, 0)
CPU = torch.device("cpu")
ANSWER = "The capital of France is Paris."
Install = Callable[..., Behaviour]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Have transformers and the package kernels bring a stand-in."""

    def bring(**behaviour: Any) -> Behaviour:
        made = Behaviour(**behaviour)
        monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
        monkeypatch.setattr(hub_kernels, "is_triton_available", lambda version: True)
        monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, version: stand_in(made))
        return made

    return bring


def decide(model: Any, reserve: int = 0, capability: tuple[int, int] | None = HOPPER) -> list[str]:
    """What is said of a model on a device of this compute capability."""
    said: list[str] = []
    use_mxfp4_kernels(model, reserve, said.append, capability_of=lambda device: capability)
    return said


def kinds(model: Any) -> list[type]:
    return [type(layer.mlp.experts) for layer in model.model.layers]


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 600, (2, 60), generator=torch.Generator().manual_seed(0))
    return model(ids).logits.float()


def answer(model: Any, tokenizer: Any) -> Any:
    return generate(model, tokenizer, [{"role": "user", "content": "What is the capital of France?"}],
                    max_new_tokens=48).final  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "triton", "kernels", "limit", "expected"),
    [
        (None, torch.bfloat16, True, True, 7.0, "CUDA GPU"),
        ((7, 0), torch.bfloat16, True, True, 7.0, "compute capability 7.5"),
        ((7, 5), torch.float32, True, True, 7.0, "bfloat16, not in float32"),
        (HOPPER, torch.float16, True, True, 7.0, "bfloat16, not in float16"),
        (HOPPER, torch.bfloat16, False, True, 7.0, "pip install 'triton"),
        (HOPPER, torch.bfloat16, True, False, 7.0, "pip install 'kernels"),
        (HOPPER, torch.bfloat16, True, True, 5.0, "limit 7.0, the model's 1.702 and 5.0"),
        ((7, 5), torch.bfloat16, True, True, 7.0, ""),
        ((12, 0), torch.bfloat16, True, True, 7.0, ""),
    ],
)
def test_obstacles(
    capability: tuple[int, int] | None, dtype: torch.dtype, triton: bool, kernels: bool, limit: float, expected: str,
    trained: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What keeps the kernels from being used is found before anything is fetched, and said with its cure."""
    monkeypatch.setattr(hub_kernels, "is_triton_available", lambda version: triton)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: kernels)
    model, _ = load_model(trained, scheme="mxfp4")
    mlp = model.model.layers[0].mlp
    mlp.experts.gate.limit = limit
    found = obstacle(capability, dtype, mlp, model.config)
    assert expected in found and bool(found) == bool(expected)


@pytest.mark.parametrize("scheme", ["mxfp4", "hybrid"])
def test_used(scheme: str, trained: Path, install: Install) -> None:
    """Blocks, scales, biases, routing, alpha and limit reach the kernels: logits of the plain way, and its answer."""
    install()
    model, tokenizer = load_model(trained, scheme=scheme)
    expected, expected_answer, before = logits(model), answer(model, tokenizer), placement(model)
    (said,) = decide(model)
    assert kinds(model) == [KernelExperts] * 4
    assert said.startswith("MXFP4 kernels of transformers on cpu: checked (error 0.") and said.endswith(", used")
    assert "times as fast for 512 tokens" in said
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < TOLERANCE
    assert answer(model, tokenizer) == expected_answer == ANSWER
    assert parameters_4bit(model) == model.hf_quantizer.plan.parameters_4bit
    assert placement(model) == before


def test_every_part_counts(trained: Path, install: Install) -> None:
    """The trial's inputs reach the limit, the biases and the routing: without one the error is far over the bound."""
    made = install()
    model, _ = load_model(trained, scheme="mxfp4")
    mlp = model.model.layers[0].mlp
    hub_kernels.mxfp4.triton_kernels_hub = stand_in(made)
    assert try_kernels(mlp, model.config, CPU)[1].error < TOLERANCE / 2
    for slip in ("no limit", "no bias", "scattered wrongly"):
        made.slip = slip
        assert try_kernels(mlp, model.config, CPU)[1].error > 3 * TOLERANCE, slip


def test_equal_experts_are_no_error(trained: Path, install: Install) -> None:
    """Which of two experts that weigh the same is chosen is left open: such tokens are not compared."""
    install(slip="last of equals")
    model, _ = load_model(trained, scheme="mxfp4")
    router = model.model.layers[0].mlp.router
    with torch.no_grad():
        router.weight[5], router.bias[5] = router.weight[0], router.bias[0]
    (said,) = decide(model)
    assert said.endswith(", used")


@pytest.mark.parametrize("slip", ["no limit", "no bias", "scattered wrongly"])
def test_wrong_kernels_are_left(slip: str, trained: Path, install: Install) -> None:
    """Kernels that disagree with ours are not used, which is said, and the logits stay as they were."""
    install(slip=slip)
    model, _ = load_model(trained, scheme="mxfp4")
    expected = logits(model)
    (said,) = decide(model)
    assert "not used: they disagree with ours (error " in said
    assert kinds(model) == [NativeMxfp4Experts] * 4
    assert torch.equal(logits(model), expected)


def test_failing_kernels_are_left(trained: Path, install: Install) -> None:
    """An error of the kernels is said in a line, and the plain way stays."""
    install(error=RuntimeError("\nPTX was compiled for another GPU\nat line 1\n"))
    model, _ = load_model(trained, scheme="mxfp4")
    expected = logits(model)
    assert decide(model) == [
        "MXFP4 kernels of transformers on cpu: not used: RuntimeError: PTX was compiled for another GPU"
    ]
    assert kinds(model) == [NativeMxfp4Experts] * 4
    assert torch.equal(logits(model), expected)


def test_failing_midway(trained: Path, install: Install) -> None:
    """Where memory ends after some layers, those are used, the others computed as before, and it is said."""
    install(error=torch.OutOfMemoryError("no memory"), error_from=10)
    model, tokenizer = load_model(trained, scheme="mxfp4")
    (said,) = decide(model)
    assert said.endswith("used for 2 of 4 layers: OutOfMemoryError: no memory")
    assert kinds(model) == [KernelExperts] * 2 + [NativeMxfp4Experts] * 2
    assert answer(model, tokenizer) == ANSWER


def test_slow_kernels_are_left(trained: Path, install: Install) -> None:
    """Kernels that take longer are not used."""
    install(waste=0.05)
    model, _ = load_model(trained, scheme="mxfp4")
    (said,) = decide(model)
    assert "not used: they are not faster (checked" in said
    assert kinds(model) == [NativeMxfp4Experts] * 4


def test_no_room_for_their_layout(trained: Path, install: Install) -> None:
    """A layout that needs more than is free beside the cache is not used; one that needs no more always is."""
    install(growth=2)
    model, _ = load_model(trained, scheme="mxfp4")
    (said,) = decide(model, reserve=2**62)
    assert "more, which are not free beside the cache" in said
    assert kinds(model) == [NativeMxfp4Experts] * 4
    install()
    (said,) = decide(model, reserve=2**62)
    assert said.endswith(", used")


@pytest.mark.parametrize("capability", [None, (7, 0)])
def test_nothing_to_say(capability: tuple[int, int] | None, trained: Path) -> None:
    """Where no GPU could run them, nothing is said, and load_model says nothing of them on a CPU."""
    said: list[str] = []
    model, _ = load_model(trained, scheme="mxfp4", announce=said.append)
    assert decide(model, capability=capability) == []
    assert not any("MXFP4 kernels" in line for line in said)


def test_missing_package_is_said(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that could run them a missing package is named, and nothing is fetched."""
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: False)
    model, _ = load_model(trained, scheme="mxfp4")
    (said,) = decide(model)
    assert "not used: they need the package kernels: pip install 'kernels>=" in said


def test_experts_away_from_their_router_stay(trained: Path, install: Install) -> None:
    """Experts on another device than their layer are not put on the kernels."""
    install()
    model, _ = load_model(trained, scheme="mxfp4")
    router = model.model.layers[1].mlp.router
    router.weight = torch.nn.Parameter(router.weight.to("meta"))
    decide(model)
    assert kinds(model) == [KernelExperts, NativeMxfp4Experts, KernelExperts, KernelExperts]


def test_what_it_cannot_do_is_refused(trained: Path, tmp_path: Path, install: Install) -> None:
    """Saving, moving and training are errors that say how to load instead; nothing is written."""
    install()
    model, _ = load_model(trained, scheme="mxfp4")
    decide(model)
    hint = "kernels='own'"
    with pytest.raises(UnsupportedError, match="cannot be saved") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert hint in caught.value.hint
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not model.hf_quantizer.is_trainable
    loss = model(torch.arange(8)[None]).logits.float().sum()  # without a gradient it would be one of the rest alone
    with pytest.raises(UnsupportedError, match="cannot be trained through"):
        loss.backward()
    with pytest.raises(UnsupportedError, match="cannot be moved"):
        model.to("meta")


def test_an_adapter_works(trained: Path, tmp_path: Path, install: Install) -> None:
    """An adapter on attention is loaded and used; one on the router, which the kernels would pass by, is an error."""
    install()
    plain, _ = load_model(trained, scheme="mxfp4")
    trained_on = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trained_on.save_pretrained(tmp_path)
    expected = logits(trained_on)
    model, _ = load_model(trained, scheme="mxfp4")
    without = logits(model)
    decide(model)
    found = logits(PeftModel.from_pretrained(model, tmp_path))
    assert (found - expected).norm() < 0.2 * (without - expected).norm()
    adapted = LoraConfig(target_modules=[], target_parameters=["mlp.router.weight"])
    with pytest.raises(UnsupportedError, match="adapted router"):
        logits(get_peft_model(model, adapted))


def test_check_of_a_gpu(trained: Path, tmp_path: Path, install: Install) -> None:
    """scripts/gpu_check's check passes with right kernels, fails with wrong ones, and is skipped without a GPU."""
    setting = Setting("cpu", trained, tmp_path)
    behaviour = install()
    right = check_kernels(setting, "mxfp4", capability_of=lambda device: HOPPER)
    assert not right.faults
    assert right.figures["used"] is True and right.bounds["error"]
    behaviour.slip = "no bias"
    assert "used: no" in check_kernels(setting, "mxfp4", capability_of=lambda device: HOPPER).faults
    with pytest.raises(SkipCase, match="CUDA GPU"):
        check_kernels(setting, "mxfp4")


def test_own_kernels_alone(trained: Path) -> None:
    """'own' leaves all as it is; another word is a UsageError before anything is read."""
    model, _ = load_model(trained, scheme="mxfp4", kernels="own")
    assert kinds(model) == [NativeMxfp4Experts] * 4
    with pytest.raises(UsageError, match="kernels 'nevre'") as caught:
        load_model("/nowhere", kernels="nevre")
    assert "never" in caught.value.hint
    assert isinstance(caught.value, OssquantError)
