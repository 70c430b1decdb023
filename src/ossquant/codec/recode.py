"""From the form a matrix has to the form a scheme asks for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ossquant.codec import bnb4, int4, mxfp4
from ossquant.codec.mxfp4 import Bf16Bits, Bytes
from ossquant.scheme import Scheme, expert_name, int4_prefix

Parts = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Mxfp4Matrix:
    """One matrix in MXFP4: blocks (out, G, 16) and scales (out, G), uint8."""

    blocks: Bytes
    scales: Bytes


Matrix = Bf16Bits | Mxfp4Matrix  # bf16 as its bits, (out, in)


def recode(source: Matrix, scheme: Scheme, name: str, expert: int | None = None) -> Parts:
    """Code one matrix of the tensor called name, or one expert's of a stack.

    Returns the stored parts by their full names; of a stack that stays one, this expert's slice of each.
    Raises CheckpointError for weights that are not finite.
    """
    if scheme.is_bnb:
        name = name if expert is None else expert_name(name, expert)
        if isinstance(source, Mxfp4Matrix):
            parts = bnb4.transcode(source.blocks, source.scales, scheme, name)
        else:
            parts = bnb4.quantize(source, scheme, name)
        return {name + suffix: part for suffix, part in parts.items()}
    if scheme.format == "int4":
        prefix = int4_prefix(name, expert or 0)
        if isinstance(source, Mxfp4Matrix):
            parts = int4.transcode(source.blocks, source.scales, name)
        else:
            parts = int4.quantize(source, name)
        return {prefix + suffix: part for suffix, part in parts.items()}
    rows = mxfp4.dequantize(source.blocks, source.scales, name) if isinstance(source, Mxfp4Matrix) else source
    if scheme.format == "mxfp4":
        blocks, scales = mxfp4.quantize(rows, name)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return {name: np.ascontiguousarray(rows.T) if expert is not None else rows}
