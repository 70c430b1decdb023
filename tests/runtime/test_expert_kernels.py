"""Triton's kernels: in its interpreter against bitsandbytes' and transformers' own, and compiled for every GPU."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not on this platform")

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from ossquant.runtime import expert_kernels
from ossquant.runtime.chosen import FEW_TOKENS, ChosenExperts, Matrices, bnb_matrices, mxfp4_matrices
from ossquant.runtime.kernels import every_mxfp4, expand_with_triton, mxfp4_values

EXPERTS, TOP_K = 6, 4
ALPHA, LIMIT = 1.702, 7.0
CPU = torch.device("cpu")

# weights (experts, outputs, inputs) and biases (experts, outputs) as floats, and our view of them
Stack = tuple[Tensor, Tensor, Matrices]


def mxfp4_stack(outputs: int, inputs: int) -> Stack:
    """Random experts in MXFP4, expanded by transformers."""
    blocks = torch.randint(0, 256, (EXPERTS, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 122, (EXPERTS, outputs, inputs // 32), dtype=torch.uint8)
    biases = torch.randn(EXPERTS, outputs)
    weights = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    return weights, biases, mxfp4_matrices(blocks, scales, biases, mxfp4_values(CPU))


def bnb_stack(outputs: int, inputs: int, quant_type: str, nested: bool) -> Stack:
    """Random experts, quantized and dequantized by bitsandbytes."""
    biases = torch.randn(EXPERTS, outputs)
    coded = [
        quantize_4bit(matrix, blocksize=64, quant_type=quant_type, compress_statistics=nested)
        for matrix in torch.randn(EXPERTS, outputs, inputs) / 20
    ]
    parameters = [Params4bit(codes, False, quant_state=state, bnb_quantized=True) for codes, state in coded]
    return torch.stack([dequantize_4bit(*each) for each in coded]), biases, bnb_matrices(parameters, list(biases))


def stack(name: str, outputs: int, inputs: int) -> Stack:
    """Experts of a format, such as 'nf4, double'."""
    if name == "mxfp4":
        return mxfp4_stack(outputs, inputs)
    return bnb_stack(outputs, inputs, name[:3], name.endswith("double"))


def in_float64(gate_up: Stack, down: Stack, states: Tensor, indices: Tensor, routing: Tensor) -> Tensor:
    """What the experts of a layer give, slot by slot."""
    mixed = torch.zeros(len(states), down[0].shape[1], dtype=torch.float64)
    for token, slot in product(range(len(states)), range(TOP_K)):
        expert = indices[token, slot]
        both = gate_up[0][expert].double() @ states[token].double() + gate_up[1][expert]
        gate, up = both[::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
        gated = (up + 1) * gate * torch.sigmoid(gate * ALPHA)
        mixed[token] += routing[token, slot] * (down[0][expert].double() @ gated + down[1][expert])
    return mixed


@pytest.mark.parametrize("tokens", (1, FEW_TOKENS))
@pytest.mark.parametrize("name", ("mxfp4", "nf4, double", "nf4", "fp4, double", "fp4"))
def test_kernels_compute_the_experts(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's experts, with rows and groups that fill no program, within 1e-6 of float64 on the same weights."""
    torch.manual_seed(0)
    hidden, intermediate = 192 + 4 * 64, 2 * 64
    gate_up, down = stack(name, 2 * intermediate, hidden), stack(name, hidden, intermediate)
    monkeypatch.setattr(expert_kernels, "ROWS", 512)  # more than there are of outputs
    states = torch.randn(tokens, hidden)
    indices = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    routing = torch.rand(tokens, TOP_K).softmax(-1)
    with torch.inference_mode():
        found = ChosenExperts(gate_up[2], down[2], ALPHA, LIMIT)(states, indices, routing)
    expected = in_float64(gate_up, down, states, indices, routing)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", ("mxfp4", "nf4, double"))
def test_kernels_know_the_published_width(name: str) -> None:
    """2,880 inputs, 90 or 45 groups of them, over as many programs as there are on a GPU."""
    torch.manual_seed(1)
    gate_up, down = stack(name, 128, 2880), stack(name, 20, 64)
    states, indices = torch.randn(1, 2880), torch.tensor([[5, 0, 3, 2]])
    routing = torch.rand(1, TOP_K).softmax(-1)
    with torch.inference_mode():
        found = ChosenExperts(gate_up[2], down[2], ALPHA, LIMIT)(states, indices, routing)
    expected = in_float64(gate_up, down, states, indices, routing)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_expanding_is_exact() -> None:
    """Every pair of codes under every scale that bf16 holds: the bits of transformers' own function."""
    blocks, scales = every_mxfp4(CPU)
    assert {
        (pair, scale)
        for row, of_row in zip(blocks.tolist(), scales.tolist(), strict=True)
        for group, scale in zip(row, of_row, strict=True)
        for pair in group
    } == set(product(range(256), range(253)))
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.bfloat16)[0].t()
    assert torch.equal(expand_with_triton(blocks, scales), expected)


@pytest.mark.parametrize("capability", (75, 80, 89, 90, 100, 120))
def test_kernels_compile_for_every_gpu(capability: int, tmp_path: Path) -> None:
    """From Turing to Blackwell NVIDIA's assembler takes them, in every format, and no thread spills."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), str(capability)]
    told = subprocess.run(
        program, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    usage = json.loads(told.stdout)
    assert len(usage) == 9
    for name, of_a_thread in usage.items():
        assert of_a_thread["STACK"] == of_a_thread["LOCAL"] == 0, name
        assert 0 < of_a_thread["REG"] <= 80, name
