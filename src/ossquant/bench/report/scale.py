"""Scale: from values to places on an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from low to high at places from start to end; logarithmic where all are above 0."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; one outside is put at the edge."""
        low, high, at = (self._along(each) for each in (self.low, self.high, value))
        share = min(1.0, max(0.0, (at - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def _along(self, value: float) -> float:
        return math.log(max(value, self.low)) if self.logarithmic else value

    def ticks(self, most: int = 6) -> list[float]:
        """Round values along it."""
        return self._decades() if self.logarithmic else self._steps(most)

    def _steps(self, most: int) -> list[float]:
        power = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(power * each for each in (1, 2, 5, 10, 20) if (self.high - self.low) / (power * each) <= most)
        return [step * index for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _decades(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        fine = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [each * 10.0**decade for decade in decades for each in fine]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def from_zero(values: Sequence[float], start: float, end: float) -> Scale:
    """A scale from 0 to a little more than the largest value."""
    return Scale(0.0, 1.05 * max([*values, 0.0]) or 1.0, start, end)


def around(values: Sequence[float], start: float, end: float, margin: float = 0.1) -> Scale:
    """A scale around all values."""
    low, high = min(values), max(values)
    spare = margin * (high - low) or margin * abs(high) or 1.0
    return Scale(low - spare, high + spare, start, end)


def decades(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale around the values above 0, with room to both sides."""
    above = [value for value in values if value > 0] or [1.0]
    return Scale(min(above) / 1.6, max(above) * 1.6, start, end, logarithmic=True)
