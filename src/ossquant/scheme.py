"""Scheme: the stored tensors that stand for one tensor, and their bytes."""

import json
from dataclasses import dataclass
from math import prod

from ossquant.errors import UnsupportedError

ITEMSIZE = {"BF16": 2, "F32": 4, "U8": 1}  # safetensors' dtype names
BNB_FORMATS = ("nf4", "fp4")  # bitsandbytes' 4-bit types
FORMATS = ("bf16", "mxfp4", *BNB_FORMATS)
MXFP4_BLOCK = 32
NESTED_BLOCK = 256  # absmax values per nested absmax; fixed in bitsandbytes
BLOCK_SIZES = (
    32,
    64,
)  # 2880 = 45 x 64: larger blocks would straddle rows, which bitsandbytes decodes wrongly
_OFFSET_WIDTH = 24  # the longest repr of a float


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as it lies in a safetensors file; dtype is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Scheme:
    """How a tensor is stored. block_size and double_quant matter to nf4 and fp4 only."""

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
        return self.format != "bf16"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UnsupportedError where a block would straddle a row of the tensor called name."""
        block = {"bf16": 1, "mxfp4": MXFP4_BLOCK}.get(self.format, self.block_size)
        if shape[-1] % block:
            raise UnsupportedError(f"{name}: rows of {shape[-1]} do not divide into blocks of {block}")

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        """The stored tensors of a weight: a vector, a matrix (out, in) or a stack (expert, out, in).

        Source: the published gpt-oss index (mxfp4), transformers' GptOssExperts (bf16), bitsandbytes'
        Linear4bit state dict (nf4, fp4).
        """
        if self.format == "bf16":
            return (StoredTensor(name, "BF16", _transposed(shape)),)
        if self.format == "mxfp4":
            return _mxfp4(name, shape)
        if len(shape) == 3:
            return tuple(part for e in range(shape[0]) for part in self.stored(expert_name(name, e), shape[1:]))
        return self._bnb(name, (shape[0], shape[1]))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the stored tensors of a weight."""
        if self.is_bnb and len(shape) == 3:
            return shape[0] * self.nbytes(shape[1:])
        return sum(part.nbytes for part in self.stored("", shape))

    def stored_bias(self, name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
        """The stored tensors of the biases (expert, out) that belong to experts of this scheme."""
        if not self.is_bnb:
            return (StoredTensor(name, "BF16", shape),)
        return tuple(StoredTensor(expert_name(name, e), "BF16", shape[1:]) for e in range(shape[0]))

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


def expert_name(name: str, expert: int) -> str:
    """Name one expert's matrix or bias: `gate_up_proj` of expert 3 is `gate_up_projs.3.weight`."""
    kind = "bias" if name.endswith("_bias") else "weight"
    return f"{name.removesuffix('_bias')}s.{expert}.{kind}"


def _mxfp4(name: str, shape: tuple[int, ...]) -> tuple[StoredTensor, ...]:
    groups = (*shape[:-1], shape[-1] // MXFP4_BLOCK)
    return (
        StoredTensor(f"{name}_blocks", "U8", (*groups, MXFP4_BLOCK // 2)),
        StoredTensor(f"{name}_scales", "U8", groups),
    )


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    # transformers multiplies from the left: it keeps expert stacks as (expert, in, out)
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape
