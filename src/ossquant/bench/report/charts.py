"""Charts: inline SVG, coloured by the page's style."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from ossquant.bench.comparison import Change
from ossquant.bench.plot import Point, pareto_front
from ossquant.bench.report.scale import Scale, around, decades, from_zero
from ossquant.bench.report.tree import element
from ossquant.bench.words import metric_name, percent

ROW = 26  # height of a row of a chart
Say = Callable[[float], str]


@dataclass(frozen=True)
class Range:
    """A row of percentiles, from the median up; those that too few requests leave out are None."""

    name: str
    percentiles: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class Line:
    """A curve through points (x, y) in the order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


def forest(changes: Sequence[Change]) -> Element:
    """A row a change: its interval, and how far it may go."""
    width, left, right = 860, 330, 24
    ends = [(ratio - 1) * 100 for each in changes for ratio in (each.low, each.high, each.ratio, _edge(each)) if ratio]
    x = around([*ends, 0.0], left, width - right)
    height = ROW * len(changes) + 40
    rows = [_forest_row(x, change, ROW * index + ROW / 2 + 4) for index, change in enumerate(changes)]
    label = "change from base to head, %; | is what the gate allows"
    return _svg(width, height, label, [*_x_axis(x, 4, height - 34, lambda tick: percent(1 + tick / 100)),
                                       *(each for row in rows for each in row)])  # fmt: skip


def _edge(change: Change) -> float | None:
    if change.max_regression is None:
        return None
    return 1 - change.max_regression if change.better == "higher" else 1 + change.max_regression


def _forest_row(x: Scale, change: Change, y: float) -> list[Element]:
    name = f"{change.scenario} · {metric_name(change)}"
    made = [element("text", _short(name, 46), x=8, y=y + 4, class_="name")]
    kind = f"v-{change.verdict}"
    if (edge := _edge(change)) is not None:
        at = x((edge - 1) * 100)
        made.append(element("line", x1=at, x2=at, y1=y - 9, y2=y + 9, class_="limit"))
    if change.low and change.high:
        low, high = ((ratio - 1) * 100 for ratio in (change.low, change.high))
        made.append(element("line", x1=x(low), x2=x(high), y1=y, y2=y, class_=f"whisker {kind}"))
    if change.ratio:
        title = element("title", f"{name}: {percent(change.ratio)}, {change.verdict}")
        made.append(element("circle", title, cx=x((change.ratio - 1) * 100), cy=y, r=5, class_=f"dot {kind}"))
    return made


def ranges(rows: Sequence[Range], say: Say) -> Element:
    """A row a scenario: the median as a dot, a line up to the highest percentile that is known."""
    width, left, right = 480, 130, 96
    known = [value for row in rows for _, value in row.percentiles if value is not None]
    x = from_zero(known, left, width - right)
    height = ROW * len(rows) + 44
    marks = [each for index, row in enumerate(rows) for each in _range_row(x, row, ROW * index + ROW / 2 + 4, say)]
    first, *others = dict.fromkeys(name for row in rows for name, value in row.percentiles if value is not None)
    label = f"● {first}{'  ❘ ' if others else ''}{', '.join(others)}"
    return _svg(width, height, label, [*_x_axis(x, 4, height - 38, say, most=4), *marks])


def _range_row(x: Scale, row: Range, y: float, say: Say) -> list[Element]:
    known = [(name, value) for name, value in row.percentiles if value is not None]
    made = [element("text", _short(row.name, 19), x=2, y=y + 4, class_="name")]
    if not known:
        return made
    first, last = known[0][1], known[-1][1]
    made.append(element("line", x1=x(first), x2=x(last), y1=y, y2=y, class_="whisker"))
    for index, (name, value) in enumerate(known):
        title = element("title", f"{row.name}: {name} {say(value)}")
        if index == 0:
            made.append(element("circle", title, cx=x(value), cy=y, r=5, class_="dot"))
        else:
            made.append(element("rect", title, x=x(value) - 1.5, y=y - 6, width=3, height=12, class_="tick-mark"))
    made.append(element("text", f"{known[-1][0]} {say(last)}", x=x(last) + 8, y=y + 4, class_="value"))
    return made


def curves(lines: Sequence[Line], x_label: str, say: Say) -> Element:
    """Lines over a logarithmic x, from 0 up."""
    width, height, left, right, bottom = 320, 220, 56, 16, 42
    xs = [x for line in lines for x, _ in line.points]
    x = decades(xs, left, width - right)
    y = from_zero([each for line in lines for _, each in line.points], height - bottom, 12)
    grid = [*_y_axis(y, left, width - right, say)]
    for value in sorted(set(xs)):
        grid.append(element("text", f"{value:g}", x=x(value), y=height - bottom + 18, text_anchor="middle"))
    marks = [each for index, line in enumerate(lines) for each in _curve(x, y, line, index, say)]
    return _svg(width, height, x_label, [*grid, *marks])


def _curve(x: Scale, y: Scale, line: Line, index: int, say: Say) -> list[Element]:
    path = " ".join(f"{x(at)},{y(value)}" for at, value in line.points)
    made = [element("polyline", points=path, class_=f"line s{index}")]
    for at, value in line.points:
        title = element("title", f"{line.name} at {at:g}: {say(value)}")
        made.append(element("circle", title, cx=x(at), cy=y(value), r=4, class_=f"dot s{index}"))
    if line.name:
        at, value = line.points[-1]
        made.append(element("text", line.name, x=x(at), y=y(value) - 9, text_anchor="end", class_=f"name s{index}"))
    return made


def pareto(points: Sequence[Point], x_label: str, higher_is_better: bool, say: Say) -> Element:
    """KLD upwards, logarithmic, over a cost or a rate; the points that none beats in both are joined."""
    width, height, left, right, bottom = 560, 340, 66, 150, 46
    x = around([point.x for point in points], left, width - right, 0.12)
    y = decades([y for point in points for y in (point.y, point.y + 2 * (point.se or 0.0))], height - bottom, 14)
    front = pareto_front(points, "higher" if higher_is_better else "lower")
    path = " ".join(f"{x(point.x)},{y(point.y)}" for point in front)
    grid = [*_x_axis(x, 14, height - bottom, say, most=4), *_y_axis(y, left, width - right, lambda tick: f"{tick:g}")]
    label = element("text", "mean KLD, nat", x=14, y=height / 2, text_anchor="middle",
                    transform=f"rotate(-90 14 {height / 2:g})")  # fmt: skip
    dots = [each for point in points for each in _pareto_dot(x, y, point, point in front, say)]
    marks = [label, element("polyline", points=path, class_="front"), *dots]
    return _svg(width, height, f"{x_label}; filled and joined: the Pareto front", [*grid, *marks])


def _pareto_dot(x: Scale, y: Scale, point: Point, best: bool, say: Say) -> list[Element]:
    reach = 2 * (point.se or 0.0)
    title = element("title", f"{point.name}: KLD {point.y:.3g} at {say(point.x)}")
    return [
        element("line", x1=x(point.x), x2=x(point.x), y1=y(point.y - reach), y2=y(point.y + reach), class_="whisker"),
        element("circle", title, cx=x(point.x), cy=y(point.y), r=6, class_="dot" if best else "dot open"),
        element("text", _short(point.name, 20), x=x(point.x) + 11, y=y(point.y) - 7, class_="name"),
    ]


def _svg(width: int, height: float, label: str, children: Iterable[Element]) -> Element:
    caption = element("text", label, x=width / 2, y=height - 4, text_anchor="middle", class_="caption")
    return element("svg", *children, caption, viewBox=f"0 0 {width} {height:g}", role="img", aria_label=label,
                   class_="chart", width=width, height=f"{height:g}")  # fmt: skip


def _x_axis(x: Scale, top: float, bottom: float, say: Say, most: int = 6) -> list[Element]:
    made = []
    for tick in x.ticks(most):
        made.append(element("line", x1=x(tick), x2=x(tick), y1=top, y2=bottom, class_="grid"))
        made.append(element("text", say(tick), x=x(tick), y=bottom + 15, text_anchor="middle"))
    return made


def _y_axis(y: Scale, left: float, right: float, say: Say) -> list[Element]:
    made = []
    for tick in y.ticks(5):
        made.append(element("line", x1=left, x2=right, y1=y(tick), y2=y(tick), class_="grid"))
        made.append(element("text", say(tick), x=left - 7, y=y(tick) + 4, text_anchor="end"))
    return made


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
