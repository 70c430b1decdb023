"""Scheme: the stored tensors that stand for one tensor, and their bytes."""

import json
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from ossquant.errors import UnsupportedError

ITEMSIZE = {"BF16": 2, "F32": 4, "U8": 1, "I32": 4}  # safetensors' dtype names
# weights and bytes of a block, by ggml's type name; ggml-common.h, 2026-11-22
GGML_BLOCKS = {"MXFP4": (32, 17), "Q4_0": (32, 18), "Q5_0": (32, 22), "Q8_0": (32, 34)}
GGML_FORMATS = ("q8_0", "q5_0", "q4_0")  # of a GGUF file alone
BNB_FORMATS = ("nf4", "fp4")  # bitsandbytes' 4-bit types
MXFP4_BLOCK = 32
INT4_GROUP = 32
NESTED_BLOCK = 256  # absmax values per nested absmax; fixed in bitsandbytes
BLOCK_SIZES = (
    32,
    64,
)  # 2880 = 45 x 64: larger blocks would straddle rows, which bitsandbytes decodes wrongly
_OFFSET_WIDTH = 24  # the longest repr of a float


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a file; dtype is safetensors' name for it, or ggml's for a GGUF block type."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        if self.dtype in GGML_BLOCKS:
            weights, nbytes = GGML_BLOCKS[self.dtype]
            return prod(self.shape) // weights * nbytes
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Scheme:
    """How a tensor is stored: bf16, f32, mxfp4, nf4, fp4, int4, or GGUF's q8_0, q5_0 and q4_0.

    block_size and double_quant matter to nf4 and fp4 only.
    """

    format: str
    block_size: int = 64
    double_quant: bool = True

    @property
    def is_bnb(self) -> bool:
        """Whether bitsandbytes reads it: one matrix an expert, with its statistics beside it."""
        return self.format in BNB_FORMATS

    @property
    def is_4bit(self) -> bool:
        """Whether its weights take four bits."""
        return self.format in ("mxfp4", "int4", "q4_0", *BNB_FORMATS)

    def table(self) -> dict[str, Any]:
        """The scheme as a recipe's table has it."""
        table: dict[str, Any] = {"format": self.format}
        if self.is_bnb:
            table |= {"block_size": self.block_size, "double_quant": self.double_quant}
        return table

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UnsupportedError where a block would straddle a row of the tensor called name."""
        block = _BLOCKS.get(self.format, self.block_size)
        if shape[-1] % block:
            raise UnsupportedError(f"{name}: rows of {shape[-1]} do not divide into blocks of {block}")

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        """The stored tensors of a weight: a vector, a matrix (out, in) or a stack (expert, out, in).

        Source: the published gpt-oss index (mxfp4), transformers' GptOssExperts (bf16), bitsandbytes'
        Linear4bit state dict (nf4, fp4), vLLM's compressed-tensors loader (int4), ggml (f32, GGML_BLOCKS).
        """
        if self.format == "bf16":
            return (StoredTensor(name, "BF16", _transposed(shape)),)
        if self.format in ("f32", *GGML_FORMATS):
            return (StoredTensor(name, self.format.upper(), shape),)
        if self.format == "mxfp4":
            return _mxfp4(name, shape)
        if self.format == "int4":
            return _int4(name, shape)
        if len(shape) == 3:
            return tuple(part for e in range(shape[0]) for part in self.stored(expert_name(name, e), shape[1:]))
        return self._bnb(name, (shape[0], shape[1]))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the stored tensors of a weight."""
        return _nbytes(self, shape)

    def _sum(self, shape: tuple[int, ...]) -> int:
        if self.is_bnb and len(shape) == 3:
            return shape[0] * self.nbytes(shape[1:])
        if self.format == "int4" and shape[0] > 1:
            return shape[0] * self.nbytes((1, *shape[1:]))
        return sum(part.nbytes for part in self.stored("", shape))

    def _bnb(self, name: str, shape: tuple[int, int]) -> tuple[StoredTensor, ...]:
        numel = prod(shape)
        blocks = numel // self.block_size
        parts = {"": ("U8", (numel // 2, 1)), ".quant_map": ("F32", (16,))}
        if self.double_quant:
            parts[".absmax"] = ("U8", (blocks,))
            parts[".nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCK),))
            parts[".nested_quant_map"] = ("F32", (256,))
        else:
            parts[".absmax"] = ("F32", (blocks,))
        parts[f".{self.state_name}"] = ("U8", (len(self.quant_state(shape)),))
        return tuple(StoredTensor(name + suffix, dtype, dims) for suffix, (dtype, dims) in parts.items())

    @property
    def state_name(self) -> str:
        """The name under which bitsandbytes keeps what is not a tensor."""
        return f"quant_state.bitsandbytes__{self.format}"

    def quant_state(self, shape: tuple[int, int], offset: float = 0.0) -> bytes:
        """What bitsandbytes keeps beside a 4-bit matrix, as JSON.

        Padded with spaces to a length that does not depend on offset, the mean taken off the absmax
        before it is quantized again, so that a Plan knows every byte.
        """
        state: dict[str, object] = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": "bfloat16",
            "shape": shape,
        }
        padding = 0
        if self.double_quant:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
            padding = _OFFSET_WIDTH - len(repr(offset))
        text = json.dumps(state)
        return text.encode().ljust(len(text) + padding)


@cache
def _nbytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    return scheme._sum(shape)


def expert_name(name: str, expert: int) -> str:
    """Name one expert's matrix or bias: `gate_up_proj` of expert 3 is `gate_up_projs.3.weight`."""
    kind = "bias" if name.endswith("_bias") else "weight"
    return f"{name.removesuffix('_bias')}s.{expert}.{kind}"


_BLOCKS = {"bf16": 1, "f32": 1, "mxfp4": MXFP4_BLOCK, "int4": INT4_GROUP} | {
    name: GGML_BLOCKS[name.upper()][0] for name in GGML_FORMATS
}


def int4_prefix(name: str, expert: int) -> str:
    """Begin the names of one expert's parts as vLLM reads them: `gate_up_proj` of expert 3 is `3.w13`."""
    experts, projection = name.rpartition(".")[::2]
    matrix = {"gate_up_proj": "w13", "down_proj": "w2"}.get(projection, projection)
    return f"{experts}.{expert}.{matrix}"


def _int4(name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    packed, groups = (shape[1], shape[2] // 8), (shape[1], shape[2] // INT4_GROUP)
    return tuple(
        StoredTensor(f"{int4_prefix(name, expert)}_weight_{part}", dtype, dims)
        for expert in range(shape[0])
        for part, dtype, dims in (("packed", "I32", packed), ("scale", "BF16", groups))
    )


def _mxfp4(name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    groups = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
    return (
        StoredTensor(f"{name}_blocks", "U8", (*groups, MXFP4_BLOCK // 2)),
        StoredTensor(f"{name}_scales", "U8", groups),
    )


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # transformers multiplies from the left: it keeps expert stacks as (expert, in, out)
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
