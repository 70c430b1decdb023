#!/usr/bin/env python3
"""Print what each 4-bit format adds in error: relative Frobenius norm on normal weights of gpt-oss' shape."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from ossquant.codec import bnb4, mxfp4, nested
from ossquant.scheme import Scheme

Floats = npt.NDArray[np.float32]
SCHEMES = {
    "NF4, block 64, double quantization": Scheme("nf4"),
    "NF4, block 64": Scheme("nf4", double_quant=False),
    "NF4, block 32": Scheme("nf4", 32, double_quant=False),
    "FP4, block 64, double quantization": Scheme("fp4"),
}


def floats(bits: npt.NDArray[np.uint16]) -> Floats:
    """bf16's bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode(parts: dict[str, Any], scheme: Scheme) -> Floats:
    """A quantized matrix back in float32, flat."""
    absmax = parts[".absmax"]
    if scheme.double_quant:
        state = json.loads(bytes(parts[f".{scheme.state_name}"]))
        absmax = nested.dequantize(absmax, parts[".nested_absmax"], state["nested_offset"])
    return bnb4.dequantize(parts[""], absmax, scheme)


def error(found: Floats, wanted: Floats) -> float:
    """Relative Frobenius norm of the difference."""
    return float(np.linalg.norm(found.reshape(-1) - wanted.reshape(-1)) / np.linalg.norm(wanted))


def main() -> None:
    """Print a table."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((2880, 2880), np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    bf16 = weights.astype(np.uint16)
    blocks, scales = mxfp4.quantize(bf16)
    source = mxfp4.dequantize(blocks, scales)
    print(f"{'':36}{'from MXFP4':>12}{'from bf16':>12}")
    print(f"{'MXFP4':36}{0.0:12.3f}{error(floats(source), floats(bf16)):12.3f}")
    for name, scheme in SCHEMES.items():
        from_mxfp4 = error(decode(bnb4.transcode(blocks, scales, scheme), scheme), floats(source))
        from_bf16 = error(decode(bnb4.quantize(bf16, scheme), scheme), floats(bf16))
        print(f"{name:36}{from_mxfp4:12.3f}{from_bf16:12.3f}")


if __name__ == "__main__":
    main()
