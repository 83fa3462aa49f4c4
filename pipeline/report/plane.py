"""The plane that a chart is drawn on: linear or logarithmic axes with round ticks, in SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.svg import label, ticks

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 38


@dataclass(frozen=True)
class Mark:
    """A vertical line at a value, with a word beside it."""

    value: float
    text: str


@dataclass(frozen=True)
class Axis:
    """From low to high; logarithmic ones need values above 0."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def over(
        cls, values: Sequence[float], count: int, log: bool = False, tight: bool = False
    ) -> Axis:
        """One that holds all finite values; its ends are ticks unless it is tight."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(known), max(known)) if known else (1.0, 10.0)
        if not log:
            places = ticks(low, high, count)
            if tight and high > low:
                return cls(low, high, tuple(t for t in places if low <= t <= high))
            return cls(places[0], places[-1], tuple(places))
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        last = max(last, first + 1)
        step = max(1, math.ceil((last - first) / count))
        decades = [10.0**power for power in range(first, last + 1, step)]
        if last - first <= 2:
            decades = sorted(d * m for d in decades for m in (1, 2, 5) if d * m <= 10.0**last)
        if tight and high > low:
            return cls(low, high, tuple(t for t in decades if low <= t <= high), log=True)
        return cls(10.0**first, 10.0**last, tuple(decades), log=True)

    def share(self, value: float) -> float:
        """Where a value is, 0 at the low end and 1 at the high one; cut off at the ends."""
        if self.log:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / ((self.high - self.low) or 1.0)
        return min(1.0, max(0.0, place))


@dataclass(frozen=True)
class Plane:
    """Axes and their places in the picture."""

    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels from the left and from the top."""
        right = LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x)
        return right, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * self.y.share(y)

    def svg(
        self, inner: str, x_label: str, y_label: str, about: str, marks: Sequence[Mark] = ()
    ) -> str:
        """The whole chart: grid and labels below `inner`, marks above it."""
        floor = HEIGHT - BOTTOM
        parts = [
            f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' class='chart' "
            f"aria-label='{html.escape(about, quote=True)}'>"
        ]
        for y in self.y.ticks:
            down = self.at(self.x.low, y)[1]
            parts.append(f"<path class='grid' d='M{LEFT} {down:.1f}H{WIDTH - RIGHT}'/>")
            place = f"x='{LEFT - 8}' y='{down + 4:.1f}' text-anchor='end'"
            parts.append(f"<text {place}>{label(y)}</text>")
        for x in self.x.ticks:
            right = self.at(x, self.y.low)[0]
            place = f"x='{right:.1f}' y='{floor + 18}' text-anchor='middle'"
            parts.append(f"<text {place}>{label(x)}</text>")
        place = f"x='{WIDTH - RIGHT}' y='{HEIGHT - 3}' text-anchor='end'"
        parts.append(f"<text {place}>{html.escape(x_label)}</text>")
        parts.append(f"<text x='4' y='14'>{html.escape(y_label)}</text>{inner}")
        for mark in marks:
            right = self.at(mark.value, self.y.low)[0]
            left_side = right > 0.6 * WIDTH
            place = f"x='{right + (-6 if left_side else 6):.1f}' y='{TOP - 4}'"
            anchor = "end" if left_side else "start"
            parts.append(f"<path class='mark' d='M{right:.1f} {TOP - 14}V{floor}'/>")
            place = f"class='marked' {place} text-anchor='{anchor}'"
            parts.append(f"<text {place}>{html.escape(mark.text)}</text>")
        return "".join(parts) + "</svg>"
