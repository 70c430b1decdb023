import pytest

from ossquant.bench.words import figure, percent, plain, with_error, with_unit


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [(0.0123, "s", "12.3 ms"), (2.5, "s", "2.5 s"), (12_820_000_000, "B", "12.82 GB"), (98.14, "%", "98.14 %"),
     (1234.5, "tokens/s", "1,234"), (0.00123456, "nat", "0.001235"), (None, "s", "-"), (0.0, "s", "0 ms")],
)  # fmt: skip
def test_figure(value: float | None, unit: str, said: str) -> None:
    """Seconds are said in ms below one, bytes in decimal units, others in four digits."""
    assert figure(value, unit) == said


def test_units() -> None:
    """A unit that the figure does not say is added, one is not said."""
    assert with_unit(40.0, "tokens/s") == "40 tokens/s"
    assert with_unit(1.02, "1") == "1.02"
    assert with_unit(0.5, "s") == "500 ms"


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.92, "−8.0 %"), (1.05, "+5.0 %"), (1.0, "0.0 %"), (0.99999, "0.0 %"), (None, "-")]
)
def test_percent(ratio: float | None, said: str) -> None:
    """A ratio is a signed change."""
    assert percent(ratio) == said


@pytest.mark.parametrize(
    ("value", "se", "unit", "said"),
    [(0.0031, 0.00018, "nat", "0.00310 ± 0.00018"), (98.14, 0.21, "%", "98.14 ± 0.21 %"), (5.0, None, "nat", "5"),
     (1e-7, 2e-9, "nat", "1.00e-07 ± 2e-09"), (120.0, 30.0, "1", "120 ± 30"), (0.0041, 0.3, "nat", "0.0041 ± 0.3000"),
     (0.0, 0.3, "nat", "0.00 ± 0.30")],
)  # fmt: skip
def test_with_error(value: float, se: float | None, unit: str, said: str) -> None:
    """The smaller of value and error gets two digits, and the other as many places."""
    assert with_error(value, se, unit) == said


def test_plain() -> None:
    """What does not print is spelled out, and nothing is endless."""
    assert plain("a\nb\x1b[2J\u202e\ud800") == r"a\nb\x1b[2J\u202e\ud800"
    assert len(plain("x" * 10_000)) == 300
