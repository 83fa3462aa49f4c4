"""Charts of a page: curves, histograms and points as inline SVG. No script, no font.

What is here says where things lie; `sections.html.j2` writes the tags. Colours are those of the
style sheet, so charts are readable on dark pages; dots tell their numbers under a pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

WIDTH, HEIGHT = 640, 300  # of a chart, in its own units: it is as wide as its card
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 38  # outside of the axes
COLOURS = 6  # that series get in turn: --c0 to --c5 of report.css
MAX_POINTS = 400  # of a curve; more would not be seen
MANY_DOTS = 60  # dots get smaller above

XY = tuple[float, float]


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
        """One that holds all finite values, with about `count` ticks.

        Its ends are ticks unless it is tight.
        """
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0, 10.0]
        low, high = min(known), max(known)
        places = _decades(low, high, count) if log else ticks(low, high, count)
        if tight and high > low:
            return cls(low, high, tuple(t for t in places if low <= t <= high), log)
        return cls(places[0], places[-1], tuple(places), log)

    def share(self, value: float) -> float:
        """Where a value is, 0 at the low end and 1 at the high one; cut off at the ends."""
        if self.log:
            value = max(value, self.low)
            place = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            place = (value - self.low) / ((self.high - self.low) or 1.0)
        return min(1.0, max(0.0, place))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose low and high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float, count: int) -> list[float]:
    """Powers of ten that enclose low and high; 2 and 5 times them too where they are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, math.ceil((last - first) / count))
    last = first + step * max(1, math.ceil((last - first) / step))
    decades = [10.0**power for power in range(first, last + 1, step)]
    if last - first > 2:
        return decades
    return sorted(d * m for d in decades for m in (1, 2, 5) if d * m <= decades[-1])


def label(value: float, digits: int = 4) -> str:
    """A short number: 0.25, 1,500, 125k, 3e-06."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.{digits}g}M"
    if size >= 1e4:
        return f"{value / 1e3:,.{digits}g}k"
    return f"{value:,.{digits}g}" if size >= 1e-3 or not size else f"{value:.{digits - 2}g}"


def labels(values: Sequence[float]) -> list[str]:
    """Short numbers that differ where the values do: 1.5440, 1.5442 …"""
    for digits in range(4, 9):
        words = [label(value, digits) for value in values]
        if len(set(words)) == len(set(values)):
            break
    return words


@dataclass(frozen=True)
class Plane:
    """Axes and their places in the picture, with what the template asks for."""

    x: Axis
    y: Axis
    marks: Sequence[Mark] = ()
    width, height, left, top = WIDTH, HEIGHT, LEFT, TOP
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(self, x: float, y: float) -> XY:
        """Units from the left and from the top."""
        right = LEFT + (self.right - LEFT) * self.x.share(x)
        return right, self.floor - (self.floor - TOP) * self.y.share(y)

    def across(self) -> list[tuple[float, str]]:
        """Ticks of x: place and label."""
        places = (self.at(x, self.y.low)[0] for x in self.x.ticks)
        return list(zip(places, labels(self.x.ticks), strict=True))

    def up(self) -> list[tuple[float, str]]:
        """Ticks of y: place and label."""
        places = (self.at(self.x.low, y)[1] for y in self.y.ticks)
        return list(zip(places, labels(self.y.ticks), strict=True))

    def lines(self) -> list[tuple[float, bool, str]]:
        """Marks: place, whether their words are to the left of it, words."""
        places = [(self.at(mark.value, self.y.low)[0], mark.text) for mark in self.marks]
        return [(place, place > 0.6 * WIDTH, text) for place, text in places]


@dataclass(frozen=True)
class Chart:
    """Series of (x, y) by name on axes of their own; a point that is not finite leaves a gap.

    Attributes:
        series: by name; on a logarithmic axis, points that are not above 0 leave gaps too.
        y_range: of the axis, where the values do not say it.
        stems: dots on stems instead of lines.
        colours: of CSS, by name; default: the palette in turn.
        last: whether the legend has the last value of each series.
    """

    series: Mapping[str, Sequence[XY]]
    title: str = ""
    text: str = ""
    x_label: str = "step"
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    y_range: XY | None = None
    marks: Sequence[Mark] = ()
    stems: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)
    last: bool = False
    wide: bool = False
    kind = "chart"

    def plane(self) -> Plane | None:
        """Over all points that can be drawn; None where there is none."""
        points = [p for rows in self.series.values() for p in rows if self._is_known(p)]
        if not points:
            return None
        ys = [y for _, y in points] + list(self.y_range or ())
        return Plane(
            Axis.over([x for x, _ in points], 6, self.x_log, tight=not self.stems),
            Axis.over(ys, 5, self.y_log),
            self.marks,
        )

    def runs(self, plane: Plane) -> list[tuple[str, str, list[tuple[float, float, str]]]]:
        """Name, colour and places (with what they say) of each line without a gap."""
        return [
            (name, self._colour(i, name), [(*plane.at(x, y), self._tip(x, y)) for x, y in run])
            for i, (name, rows) in enumerate(self.series.items())
            for run in _runs(thin(rows, self._is_known), self._is_known)
        ]

    @property
    def radius(self) -> float:
        """Of a dot."""
        return 4 if sum(map(len, self.series.values())) <= MANY_DOTS else 2.5

    def legend(self) -> list[tuple[str, str, str]]:
        """Colour, name and last value of each series; nothing where one needs none."""
        if len(self.series) == 1 and not self.last:
            return []
        entries = []
        for i, (name, rows) in enumerate(self.series.items()):
            known = [y for _, y in rows if math.isfinite(y)]
            value = label(known[-1]) if known else "–"
            entries.append((self._colour(i, name), name, value if self.last else ""))
        return entries

    def _colour(self, place: int, name: str) -> str:
        return self.colours.get(name, f"var(--c{place % COLOURS})")

    def _tip(self, x: float, y: float) -> str:
        return f"{label(x)} {self.x_label}: {label(y)}"

    def _is_known(self, point: XY) -> bool:
        x, y = point
        finite = math.isfinite(x) and math.isfinite(y)
        return finite and (x > 0 or not self.x_log) and (y > 0 or not self.y_log)


def thin(rows: Sequence[XY], is_known: Callable[[XY], bool]) -> list[XY]:
    """At most 400 points: of each bucket the lowest and the highest, so that spikes stay."""
    if len(rows) <= MAX_POINTS:
        return list(rows)
    size = math.ceil(len(rows) / (MAX_POINTS // 2))
    kept: list[XY] = []
    for i in range(0, len(rows), size):
        bucket = rows[i : i + size]
        known = [row for row in bucket if is_known(row)]
        if not known:
            kept.append(bucket[0])
            continue
        kept += sorted({min(known, key=lambda row: row[1]), max(known, key=lambda row: row[1])})
    return kept


def _runs(rows: Sequence[XY], is_known: Callable[[XY], bool]) -> list[list[XY]]:
    """Points between gaps."""
    runs: list[list[XY]] = [[]]
    for row in rows:
        if is_known(row):
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@dataclass(frozen=True)
class Histogram:
    """Counts between edges; one more edge than counts. Bars have the colour of where they lie.

    Attributes:
        colours: of CSS: below the first mark, and above it.
    """

    edges: Sequence[float]
    counts: Sequence[float]
    title: str = ""
    text: str = ""
    x_label: str = ""
    y_label: str = "images"
    y_log: bool = False
    marks: Sequence[Mark] = ()
    colours: tuple[str, str] = ("var(--c0)", "var(--c0)")
    wide: bool = False
    kind = "histogram"

    def plane(self) -> Plane | None:
        """Over all bars; None where all are empty."""
        if not any(self.counts):
            return None
        heights = [c for c in self.counts if c] + ([] if self.y_log else [0])
        up = Axis.over(heights, 5, self.y_log)
        if self.y_log:  # so that a bar of one can be seen
            up = replace(up, low=up.low * 0.6)
        across = Axis.over([self.edges[0], self.edges[-1]], 6, tight=True)
        return Plane(across, up, self.marks)

    def bars(self, plane: Plane) -> list[tuple[float, float, float, float, str, str]]:
        """Left, top, width, height, colour and words of each bar that is not empty."""
        bars = []
        for (low, high), count in zip(pairwise(self.edges), self.counts, strict=True):
            if not count:
                continue
            left, top = plane.at(low, count)
            width = max(0.8, plane.at(high, count)[0] - left - 1)  # a gap of 1 between bars
            above = bool(self.marks) and low >= self.marks[0].value - 1e-9
            words = f"{label(low)} to {label(high)}: {count:,}"
            bars.append((left + 0.5, top, width, plane.floor - top, self.colours[above], words))
        return bars


@dataclass(frozen=True)
class Points:
    """Points in a plane without axes, by group, drawn in the order given.

    Attributes:
        groups: (x, y) from 0 to 1, y upwards, by name.
        colours: of CSS, by name.
    """

    groups: Mapping[str, Sequence[XY]]
    colours: Mapping[str, str]
    title: str = ""
    text: str = ""
    wide: bool = True
    kind = "points"

    @property
    def size(self) -> int:
        """Of a dot, where the plane is 1,000 wide."""
        count = sum(map(len, self.groups.values()))
        return 5 if count > 5000 else 7 if count > 1000 else 10

    def paths(self) -> list[tuple[str, str, str]]:
        """Name, colour and one path of all dots of a group: 20,000 points are 200 KB."""
        return [
            (
                name,
                self.colours[name],
                "".join(f"M{20 + 960 * x:.0f} {580 - 560 * y:.0f}h0" for x, y in places),
            )
            for name, places in self.groups.items()
        ]

    def legend(self) -> list[tuple[str, str, str]]:
        """Colour and name of each group that has points, with their number."""
        counts = {name: len(places) for name, places in self.groups.items()}
        return [(self.colours[name], f"{name} ({n:,})", "") for name, n in counts.items() if n]
