from xml.etree import ElementTree

import pytest

from ossquant.bench.plot import Axis, Point, pareto_front, scatter

POINTS = [
    Point("hybrid", 12.8, 0.02, 0.001),
    Point("nf4", 12.5, 0.03, 0.002),
    Point("fp4", 12.5, 0.05, None),
    Point("large", 14.0, 0.02, 0.001),
    Point("itself", 13.8, 0.0, 0.0),
]
SVG = "{http://www.w3.org/2000/svg}"


def parse(drawn: str) -> ElementTree.Element:
    """Read our own picture back."""
    return ElementTree.fromstring(drawn)  # noqa: S314


def test_the_front_is_what_nothing_beats() -> None:
    """A point that another matches in both and beats in one is not on the front, whichever way x is better."""
    assert [point.name for point in pareto_front(POINTS, "lower")] == ["nf4", "hybrid", "itself"]
    assert [point.name for point in pareto_front(POINTS, "higher")] == ["itself", "large"]


def test_equal_points_are_both_on_the_front() -> None:
    """Two candidates with the same figures do not push each other out."""
    twins = [Point("a", 1.0, 0.1, None), Point("b", 1.0, 0.1, None)]
    assert pareto_front(twins, "lower") == twins


def test_the_file_needs_nothing_else() -> None:
    """The SVG is well-formed, refers to no other file, and marks as many points as the front has."""
    drawn = scatter(POINTS, "bytes, GB", "lower", "KLD against bytes")
    root = parse(drawn)
    circles = [each.get("class") for each in root.iter(f"{SVG}circle")]
    assert (circles.count("best"), circles.count("other")) == (3, 2)
    assert drawn.count("http") == 1  # the name of SVG itself
    assert "href" not in drawn and "url(" not in drawn


def test_better_is_further_down() -> None:
    """A smaller KLD stands lower, zero on the floor, and more bytes stand further right."""
    root = parse(scatter(POINTS, "bytes, GB", "lower", "t"))
    places = [(float(each.get("cx", "")), float(each.get("cy", ""))) for each in root.iter(f"{SVG}circle")]
    x, y = ({point.name: place[axis] for point, place in zip(POINTS, places, strict=True)} for axis in (0, 1))
    assert x["nf4"] == x["fp4"] < x["hybrid"] < x["itself"] < x["large"]
    assert y["fp4"] < y["nf4"] < y["hybrid"] < y["itself"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a"b&c', "nul\x00esc\x1b[2J", "x" * 300])
def test_hostile_names_are_text(name: str) -> None:
    """A name from outside is text in the picture, whatever stands in it."""
    root = parse(scatter([Point(name, 1.0, 0.1, None)], "x", "lower", name.replace("\x00", "")[:5]))
    assert not list(root.iter(f"{SVG}script"))
    assert any(each.text and each.text[:2] == name[:2] for each in root.iter(f"{SVG}text"))


def test_ticks_are_round() -> None:
    """Ticks are round numbers within the axis, a handful of them."""
    assert Axis(-3, 0, logarithmic=True).ticks() == pytest.approx([0.001, 0.01, 0.1, 1])
    ticks = Axis(12.3, 14.1).ticks()
    assert ticks == pytest.approx([12.5, 13, 13.5, 14])
