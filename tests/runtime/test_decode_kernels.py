"""The kernels are given to a model only where they compute what the plain way does, and faster."""

import subprocess
import sys
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on this platform")

import triton.language as tl
from peft import LoraConfig, inject_adapter_in_model
from triton.runtime.interpreter import InterpretedFunction

from ossquant import load_model
from ossquant.errors import UnsupportedError
from ossquant.runtime import expert_kernels
from ossquant.runtime.chosen import FEW_TOKENS
from ossquant.runtime.decode_kernels import TOLERANCE, chosen_experts, error_of, use_decode_kernels
from ossquant.runtime.kernels import check_alive

CPU = "cpu"  # where Triton's interpreter stands for a GPU
IN_PROCESS_WITHOUT_INTERPRETER = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
from ossquant import load_model
from ossquant.errors import UnsupportedError
from ossquant.runtime.decode_kernels import use_decode_kernels
model, _ = load_model(sys.argv[1], scheme="hybrid")
use_decode_kernels(model, print, "cpu")
print([layer.mlp.experts.chosen for layer in model.model.layers])
"""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program."""
    monkeypatch.setattr(expert_kernels, "ROWS", 256)


@pytest.fixture
def model(trained: Path) -> Any:
    return load_model(trained, scheme="nf4", dtype="float32")[0]


def decided(model: Any, **options: Any) -> str:
    """The line that says what was decided."""
    said: list[str] = []
    use_decode_kernels(model, said.append, CPU, **options)
    (line,) = said
    return line


def chosen(model: Any) -> list[bool]:
    return [layer.mlp.experts.chosen is not None for layer in model.model.layers]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("scheme", ("hybrid", "mxfp4", "nf4", "fp4"))
def test_right_kernels_are_used(scheme: str, dtype: str, trained: Path) -> None:
    """Kernels that agree and win are used for few tokens, and the line that says so gives the error."""
    model, _ = load_model(trained, scheme=scheme, dtype=dtype)
    keep_layout(model)
    # five calls of one second in the plain way, then five of a tenth
    ticks = accumulate(chain([0.0], [1.0, 0.0] * 4, [1.0, 0.0], [0.1, 0.0] * 5))
    said = decided(model, clock=lambda: next(ticks))
    assert said.startswith("experts by Triton's kernels: checked here, off by ")
    assert "10.0 times as fast" in said
    assert chosen(model) == [True] * 4


def keep_layout(model: Any) -> None:
    """With AVX512-BF16 bitsandbytes repacks weights for the CPU, which no GPU does."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def test_slow_kernels_are_left(model: Any) -> None:
    """The interpreter agrees and is a thousand times slower: it is said, and every layer computes as before."""
    said = decided(model)
    assert said.startswith("experts are asked for one by one: Triton's kernels are 0.0")
    assert chosen(model) == [False] * 4


def test_wrong_kernels_are_left(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose arithmetic is another than ours is found out before it is used."""

    def doubled(exponent):  # type: ignore[no-untyped-def]
        return ((exponent.to(tl.uint32) + 1) << 23).to(tl.float32, bitcast=True)

    monkeypatch.setattr(expert_kernels, "_power_of_two", InterpretedFunction(doubled))
    model, _ = load_model(trained, scheme="hybrid", dtype="float32")
    said = decided(model)
    assert "Triton's kernels are off by" in said
    assert chosen(model) == [False] * 4


def test_failing_kernels_are_left(trained: Path) -> None:
    """Triton without a GPU fails as it would on one that it does not know: the reason is told, nothing is raised."""
    program = [sys.executable, "-c", IN_PROCESS_WITHOUT_INTERPRETER, str(trained)]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith("experts are asked for one by one: Triton's kernels failed here: ")
    assert said[1] == "[None, None, None, None]"


def test_a_dead_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access a GPU answers nothing: the error says how to load without the kernels."""

    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    with pytest.raises(UnsupportedError, match=r"Triton's kernels have left cuda:0 unusable: .* illegal") as caught:
        check_alive(torch.device("cuda:0"), "Triton's kernels", "never")
    assert "--kernels never" in caught.value.hint
    check_alive(torch.device("cpu"), "Triton's kernels", "never")


def test_kernels_that_give_no_number_are_left(trained: Path) -> None:
    """NaN is no small error."""
    model, _ = load_model(trained, scheme="hybrid", dtype="float32")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj_bias.fill_(torch.nan)
    assert "off by nan" in decided(model)
    assert chosen(model) == [False] * 4


@pytest.mark.parametrize("tokens", (1, FEW_TOKENS))
def test_the_trial_reaches_the_limit_of_the_gate(tokens: int, model: Any) -> None:
    """Kernels that knew no limit would be found out: some of the tokens that are tried go beyond it."""
    layer = model.model.layers[0].mlp.experts
    right = chosen_experts(layer)
    assert error_of(layer, right, tokens) <= TOLERANCE[torch.float32]
    assert error_of(layer, replace(right, limit=1e9), tokens) > TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("scheme", ("hybrid", "nf4"))
def test_moving_a_model_forgets_the_addresses(scheme: str, trained: Path) -> None:
    """Not all that kernels read is compared at each call, so whatever touches weights ends their use."""
    model, _ = load_model(trained, scheme=scheme, dtype="float32")
    for layer in model.model.layers:
        layer.mlp.experts.chosen = chosen_experts(layer.mlp.experts)
    model.to("cpu")
    assert chosen(model) == [False] * 4


def test_no_experts_no_word(trained: Path) -> None:
    """On the CPU, and in bf16, there is nothing to decide."""
    said: list[str] = []
    use_decode_kernels(load_model(trained, scheme="nf4")[0], said.append)
    use_decode_kernels(load_model(trained, scheme="bf16")[0], said.append, CPU)
    assert said == []


@pytest.mark.parametrize("scheme", ("hybrid", "nf4"))
def test_kernels_see_the_weights_of_now(scheme: str, trained: Path) -> None:
    """What is trained, wrapped, moved or long goes the plain way: kernels know one place of the weights alone."""
    model, _ = load_model(trained, scheme=scheme, dtype="float32")
    experts = model.model.layers[0].mlp.experts
    experts.chosen = chosen_experts(experts)
    few, many = torch.zeros(FEW_TOKENS, 192), torch.zeros(FEW_TOKENS + 1, 192)

    def takes(states: torch.Tensor) -> bool:
        return experts.chosen.takes(states, experts.matrices() if scheme == "nf4" else experts.stacks())

    with torch.no_grad():
        assert takes(few)
        assert not takes(many)
        assert not takes(few.bfloat16())
    assert not takes(few)  # with grad
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.data = parameter.data.clone()
        assert not takes(few)
        experts.chosen = chosen_experts(experts)
        assert takes(few)
        if scheme == "nf4":
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["gate_up_projs.1"]), model)
            assert not takes(few)
