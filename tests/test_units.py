"""Numbers to words and back."""

import pytest

from ossquant.errors import UsageError
from ossquant.units import count, nearest, parse_size, size, size_both


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1000", 1000), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("4.5GiB", 4831838208), ("512MiB", 2**29),
     ("1.001kB", 1001), ("2T", 2 * 10**12), (" 8 KiB ", 8192), ("0", 0)],
)  # fmt: skip
def test_parse_size(text: str, nbytes: int) -> None:
    """Sizes are read in decimal and binary units, in any case, to the byte."""
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "5IB", "-5GB", "1e9", "five", "5GB 5GB", "1.GB", pytest.param("9" * 400, id="huge")]
)
def test_parse_size_refuses(text: str) -> None:
    """What is no size is a usage error that shows how to write one."""
    with pytest.raises(UsageError, match="5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_999, "1.00 MB"), (999_999_999, "1.00 GB"),
     (13_761_264_768, "13.76 GB")],
)  # fmt: skip
def test_size(nbytes: int, words: str) -> None:
    """Bytes are said in the largest decimal unit that leaves at least one of it, after rounding."""
    assert size(nbytes) == words


def test_size_both() -> None:
    """Where the units differ enough to matter, both are said."""
    assert size_both(13_761_264_768) == "13.76 GB (12.82 GiB)"
    assert size_both(2_000_000) == "2.00 MB"


def test_count() -> None:
    """Parameters are said in billions, millions and thousands."""
    assert [count(n) for n in (20_914_757_184, 3_219_952, 1728, 64)] == ["20.91 B", "3.22 M", "1.73 k", "64"]


def test_nearest() -> None:
    """A near miss is answered with the word meant, anything else with all words."""
    assert nearest("NF5", ("hybrid", "nf4", "fp4")) == "did you mean 'nf4'?"
    assert nearest("zzz", ("hybrid", "nf4")) == "known: hybrid, nf4"
