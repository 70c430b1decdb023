"""From the form a matrix has to the form a scheme asks for."""

import numpy as np
import pytest

from ossquant.codec import bnb4, mxfp4
from ossquant.codec.recode import Mxfp4Matrix, recode
from ossquant.errors import CheckpointError
from ossquant.scheme import Scheme

RNG = np.random.default_rng(0)
PACKED = Mxfp4Matrix(RNG.integers(0, 256, (64, 4, 16), dtype=np.uint8), RNG.integers(118, 124, (64, 4), dtype=np.uint8))
ROWS = mxfp4.dequantize(PACKED.blocks, PACKED.scales)


@pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("fp4", 32, double_quant=False)], ids=str)
def test_to_bitsandbytes(scheme: Scheme) -> None:
    """One expert becomes a matrix of its own name; from MXFP4 or from bf16, it is the same."""
    expected = bnb4.quantize(ROWS, scheme)
    for source in (PACKED, ROWS):
        found = recode(source, scheme, "experts.down_proj", expert=3)
        assert set(found) == {f"experts.down_projs.3.weight{suffix}" for suffix in expected}
        for suffix, part in expected.items():
            assert found[f"experts.down_projs.3.weight{suffix}"].tobytes() == part.tobytes()


@pytest.mark.parametrize("scheme", [Scheme("nf4"), Scheme("nf4", 32), Scheme("fp4", 64, double_quant=False)], ids=str)
def test_parts_are_as_planned(scheme: Scheme) -> None:
    """Names, shapes and bytes of the parts are those that the scheme has foretold."""
    parts = recode(ROWS, scheme, "q_proj.weight")
    planned = {part.name: (part.shape, part.nbytes) for part in scheme.stored("q_proj.weight", ROWS.shape)}
    assert {name: (part.shape, part.nbytes) for name, part in parts.items()} == planned


def test_to_bf16() -> None:
    """A matrix stays (out, in), an expert's slice of a stack is (in, out)."""
    assert np.array_equal(recode(PACKED, Scheme("bf16"), "w")["w"], ROWS)
    piece = recode(PACKED, Scheme("bf16"), "w", expert=0)["w"]
    assert np.array_equal(piece, ROWS.T)
    assert piece.flags.c_contiguous


def test_to_mxfp4() -> None:
    """From bf16, the same values in MXFP4; the stack keeps its name."""
    parts = recode(ROWS, Scheme("mxfp4"), "w", expert=1)
    assert set(parts) == {"w_blocks", "w_scales"}
    assert np.array_equal(mxfp4.dequantize(parts["w_blocks"], parts["w_scales"]), ROWS)


@pytest.mark.parametrize("form", ["nf4", "mxfp4"])
def test_broken_weights(form: str) -> None:
    """Weights that are not finite are refused by the name that a user knows."""
    rows = ROWS.copy()
    rows[0, 0] = 0x7FC0
    with pytest.raises(CheckpointError, match=r"experts\.down_proj.*NaN"):
        recode(rows, Scheme(form), "experts.down_proj", expert=1)
