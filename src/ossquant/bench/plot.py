"""Plot: candidates as points of cost and KLD, the Pareto front drawn, in one SVG file that needs nothing else."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape  # xml.sax would load urllib and ssl

from ossquant.bench.metrics import Better

WIDTH, HEIGHT = 720, 460
LEFT, RIGHT, TOP, BOTTOM = 84, 150, 24, 56  # room for ticks on the left, for names on the right
ERRORS = 2  # standard errors to each side
LONGEST_NAME = 20
_STYLE = """
svg { font: 13px system-ui, sans-serif; background: #fff; --ink: #1c1e21; --faint: #c9ced6; --point: #1f6feb; }
@media (prefers-color-scheme: dark) { svg { background: #15181c; --ink: #e4e7eb; --faint: #414851; --point: #6cb0ff; } }
text { fill: var(--ink); } .grid { stroke: var(--faint); stroke-width: 1; }
.front { fill: none; stroke: var(--point); stroke-width: 2; stroke-dasharray: 5 4; }
.best { fill: var(--point); } .other { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.error { stroke: var(--ink); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Point:
    """One candidate: x is what it costs or yields, y its KLD with its standard error."""

    name: str
    x: float
    y: float
    se: float | None


@dataclass(frozen=True)
class Axis:
    """A scale from low to high; a logarithmic one is in decades."""

    low: float
    high: float
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """How far along the axis a value lies, 0 to 1; what lies outside is drawn at the edge."""
        at = math.log10(value) if self.logarithmic and value > 0 else -math.inf if self.logarithmic else value
        return min(1.0, max(0.0, (at - self.low) / (self.high - self.low)))

    def ticks(self) -> list[float]:
        """Round values along it."""
        if self.logarithmic:
            return [10.0**decade for decade in range(math.ceil(self.low), math.floor(self.high) + 1)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(each for each in (1, 2, 5, 10) if (self.high - self.low) / (step * each) <= 6)
        return [tick * step for tick in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def pareto_front(points: Sequence[Point], better: Better) -> list[Point]:
    """The points that no other one matches in both and beats in one: x the better way, y lower; by x."""
    sign = 1 if better == "lower" else -1

    def beaten(point: Point) -> bool:
        return any(
            sign * other.x <= sign * point.x and other.y <= point.y and (other.x, other.y) != (point.x, point.y)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: (point.x, -point.y))


def scatter(points: Sequence[Point], x_label: str, better: Better, title: str) -> str:
    """Draw points as SVG: KLD upwards in decades, better x to the left if lower is better, names beside them."""
    xs, ys = _linear([point.x for point in points]), _decades([point.y for point in points])
    front = pareto_front(points, better)
    line = " ".join(f"{_x(xs, point):.1f},{_y(ys, point.y):.1f}" for point in front)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        *(_x_tick(xs, tick) for tick in xs.ticks()),
        *(_y_tick(ys, tick) for tick in ys.ticks()),
        f'<text x="{LEFT}" y="{HEIGHT - 12}">{escape(x_label)}; filled and joined: the Pareto front</text>',
        f'<text x="16" y="{HEIGHT / 2:.0f}" transform="rotate(-90 16 {HEIGHT / 2:.0f})" text-anchor="middle">'
        f"mean KLD, ± {ERRORS} standard errors</text>",
        f'<polyline class="front" points="{line}"/>',
        *(_dot(xs, ys, point, point in front) for point in points),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _linear(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    return Axis(low - margin, high + margin)


def _decades(values: Sequence[float]) -> Axis:
    """Whole decades around what is above zero; a KLD of zero is drawn on the floor."""
    above = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(above)) - (0.0 in values))
    return Axis(low, max(low + 1, math.ceil(math.log10(max(above)))), logarithmic=True)


def _x(axis: Axis, point: Point) -> float:
    return LEFT + axis.share(point.x) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _x_tick(axis: Axis, tick: float) -> str:
    x = LEFT + axis.share(tick) * (WIDTH - LEFT - RIGHT)
    return (
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.6g}</text>'
    )


def _y_tick(axis: Axis, tick: float) -> str:
    y = _y(axis, tick)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
    )


def _dot(xs: Axis, ys: Axis, point: Point, best: bool) -> str:
    x, y = _x(xs, point), _y(ys, point.y)
    spread = ERRORS * (point.se or 0)
    return (
        f'<line class="error" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(ys, point.y - spread):.1f}" '
        f'y2="{_y(ys, point.y + spread):.1f}"/>'
        f'<circle class="{"best" if best else "other"}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{x + 10:.1f}" y="{y - 7:.1f}">{escape(_shown(point.name))}</text>'
    )


def _shown(name: str) -> str:
    """A name as there is room for it; XML has no place for control characters."""
    plain = "".join(letter for letter in name if letter.isprintable())
    return plain if len(plain) <= LONGEST_NAME else f"{plain[: LONGEST_NAME - 1]}…"
