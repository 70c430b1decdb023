"""The stored tensors that stand for one tensor."""

import json

import pytest

from ossquant.errors import UnsupportedError
from ossquant.scheme import BNB_FORMATS, GGML_BLOCKS, Scheme, StoredTensor, expert_name

SCHEMES = [Scheme("bf16"), Scheme("mxfp4")] + [
    Scheme(quant_type, block, double) for quant_type in BNB_FORMATS for block in (32, 64) for double in (True, False)
]


def test_mxfp4() -> None:
    """An MXFP4 stack is blocks of 16 bytes and their scales, as published."""
    assert Scheme("mxfp4").stored("w", (32, 5760, 2880)) == (
        StoredTensor("w_blocks", "U8", (32, 5760, 90, 16)),
        StoredTensor("w_scales", "U8", (32, 5760, 90)),
    )


def test_bf16() -> None:
    """A matrix lies as it is, a stack of experts transposed, as transformers multiplies from the left."""
    assert Scheme("bf16").stored("w", (4096, 2880)) == (StoredTensor("w", "BF16", (4096, 2880)),)
    assert Scheme("bf16").stored("w", (32, 5760, 2880)) == (StoredTensor("w", "BF16", (32, 2880, 5760)),)


def test_nf4() -> None:
    """An NF4 matrix is what bitsandbytes' Linear4bit keeps: 4-bit codes and five tensors beside them."""
    parts = {part.name: (part.dtype, part.shape) for part in Scheme("nf4").stored("w", (4096, 2880))}
    state = parts.pop("w.quant_state.bitsandbytes__nf4")
    assert parts == {
        "w": ("U8", (4096 * 2880 // 2, 1)), "w.absmax": ("U8", (184320,)), "w.nested_absmax": ("F32", (720,)),
        "w.quant_map": ("F32", (16,)), "w.nested_quant_map": ("F32", (256,)),
    }  # fmt: skip
    assert state[0] == "U8"


def test_experts_apart() -> None:
    """bitsandbytes takes experts one by one: expert 31 of gate_up_proj is gate_up_projs.31, its bias beside it."""
    scheme = Scheme("fp4", 32, double_quant=False)
    names = [part.name for part in scheme.stored("mlp.gate_up_proj", (32, 5760, 2880))]
    assert names[-4:] == [f"mlp.gate_up_projs.31.weight{end}" for end in
                          ("", ".quant_map", ".absmax", ".quant_state.bitsandbytes__fp4")]  # fmt: skip
    assert len(names) == 32 * 4
    assert expert_name("mlp.gate_up_proj_bias", 31) == "mlp.gate_up_projs.31.bias"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(2880,), (64, 192), (3, 256, 192), (1, 64, 64)])
def test_nbytes(scheme: Scheme, shape: tuple[int, ...]) -> None:
    """The bytes by formula are the sum over the stored tensors."""
    if len(shape) > 1 or not scheme.is_bnb:  # vectors are never bitsandbytes'
        assert scheme.nbytes(shape) == sum(part.nbytes for part in scheme.stored("w", shape))


@pytest.mark.parametrize("offset", [0.0, 0.1, -1.1754943508222875e-38, 3.4028234663852886e38, 0.028366088867187504])
def test_quant_state(offset: float) -> None:
    """The quant state has one length whatever its offset is, and is JSON with it."""
    scheme = Scheme("nf4")
    text = scheme.quant_state((4096, 2880), offset)
    assert len(text) == scheme.stored("w", (4096, 2880))[-1].nbytes
    assert json.loads(text) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4096, 2880],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip


def test_check() -> None:
    """A row that does not divide into blocks is refused: bitsandbytes would decode it wrongly."""
    Scheme("nf4", 32).check("w", (64, 96))
    for scheme in (Scheme("nf4", 64), Scheme("fp4", 64)):
        with pytest.raises(UnsupportedError, match="w: rows of 96"):
            scheme.check("w", (64, 96))
    with pytest.raises(UnsupportedError, match="blocks of 32"):
        Scheme("mxfp4").check("w", (4, 64, 48))


@pytest.mark.parametrize("name", GGML_BLOCKS)
def test_ggml_blocks(name: str) -> None:
    """A block of a GGUF type has as many weights and bytes as the gguf package says, and no row ends inside one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    assert GGML_BLOCKS[name] == GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    weights, nbytes = GGML_BLOCKS[name]
    scheme = Scheme(name.lower())
    assert scheme.nbytes((3, 5 * weights)) == 15 * nbytes
    with pytest.raises(UnsupportedError, match=f"do not divide into blocks of {weights}"):
        scheme.check("x", (3, weights + 1))
