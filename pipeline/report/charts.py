"""Sections of a report that draw numbers: curves, histograms, bars, points. No script, no font."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from pipeline.report.plane import BOTTOM, HEIGHT, Axis, Mark, Plane
from pipeline.report.svg import COLOURS, label, thin

MANY_DOTS = 60  # dots get smaller above


@dataclass(frozen=True)
class Curve:
    """Series of (x, y) by name on axes of their own.

    Attributes:
        series: by name; points that are not finite, or not above 0 on a log axis, are left out.
        y_range: of the axis, where the values do not say it.
        stems: dots on stems instead of lines.
        colours: of CSS, by name; default: the palette in turn.
    """

    series: Mapping[str, Sequence[tuple[float, float]]]
    title: str = ""
    text: str = ""
    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    y_log: bool = False
    y_range: tuple[float, float] | None = None
    marks: Sequence[Mark] = ()
    stems: bool = False
    colours: Mapping[str, str] = field(default_factory=dict)
    wide: bool = False

    def html(self, side: int) -> str:
        """The chart, its legend and its text."""
        shown = {name: self._known(rows) for name, rows in self.series.items()}
        points = [p for rows in shown.values() for p in rows]
        if not points:
            return "<p class='note'>no values</p>" + _text(self.text)
        ys = [y for _, y in points] + list(self.y_range or ())
        plane = Plane(
            Axis.over([x for x, _ in points], 6, self.x_log, tight=not self.stems),
            Axis.over(ys, 5, self.y_log),
        )
        inner = ""
        for i, (name, rows) in enumerate(shown.items()):
            colour = self.colours.get(name, f"var(--c{i % COLOURS})")
            inner += self._dots(plane, rows, colour) if self.stems else _line(plane, rows, colour)
        legend = {
            name: self.colours.get(name, f"var(--c{i % COLOURS})") for i, name in enumerate(shown)
        }
        about = f"{self.title}. {self.text}"
        return (
            plane.svg(inner, self.x_label, self.y_label, about, self.marks)
            + (_legend(legend) if len(shown) > 1 else "")
            + _text(self.text)
        )

    def _known(self, rows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        kept = [(x, y) for x, y in rows if math.isfinite(x) and math.isfinite(y)]
        kept = [(x, y) for x, y in kept if (x > 0 or not self.x_log) and (y > 0 or not self.y_log)]
        return thin(kept)

    def _dots(self, plane: Plane, rows: Sequence[tuple[float, float]], colour: str) -> str:
        radius = 4 if len(rows) <= MANY_DOTS else 2.5
        parts = []
        for x, y in rows:
            right, down = plane.at(x, y)
            tip = f"<title>{label(x)} {html.escape(self.x_label)}: {label(y)}</title>"
            parts.append(
                f"<path class='stem' d='M{right:.1f} {down:.1f}V{HEIGHT - BOTTOM}' "
                f"style='stroke:{colour}'/><circle cx='{right:.1f}' cy='{down:.1f}' r='{radius}' "
                f"style='fill:{colour}'>{tip}</circle>"
            )
        return "".join(parts)


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

    def html(self, side: int) -> str:
        """The chart and its text."""
        if not any(self.counts):
            return "<p class='note'>no values</p>" + _text(self.text)
        heights = [c for c in self.counts if c] + ([] if self.y_log else [0])
        across = Axis.over([self.edges[0], self.edges[-1]], 6, tight=True)
        up = Axis.over(heights, 5, self.y_log)
        if self.y_log:  # so that a bar of one can be seen
            up = replace(up, low=up.low * 0.6)
        plane = Plane(across, up)
        floor = plane.at(0, plane.y.low)[1]
        parts = []
        for (left, right), count in zip(pairwise(self.edges), self.counts, strict=True):
            if not count:
                continue
            above = bool(self.marks) and left >= self.marks[0].value - 1e-9
            a, top = plane.at(left, count)
            b, _ = plane.at(right, count)
            tip = f"<title>{label(left)} to {label(right)}: {count:,}</title>"
            parts.append(
                f"<rect x='{a + 0.5:.1f}' y='{top:.1f}' width='{max(0.8, b - a - 1):.1f}' "
                f"height='{floor - top:.1f}' style='fill:{self.colours[above]}'>{tip}</rect>"
            )
        about = f"{self.title}. {self.text}"
        chart = plane.svg("".join(parts), self.x_label, self.y_label, about, self.marks)
        return chart + _text(self.text)


@dataclass(frozen=True)
class Bar:
    """A bar: its parts as (value, colour of CSS), and what stands before and behind it."""

    name: str
    parts: Sequence[tuple[float, str]]
    text: str = ""
    tip: str = ""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars; `whole` is the value of a full one (default: the largest)."""

    bars: Sequence[Bar]
    title: str = ""
    text: str = ""
    whole: float = 0.0
    head: tuple[str, str] = ("", "")
    wide: bool = True

    def html(self, side: int) -> str:
        """A table, so that it reads well aloud and without styles."""
        largest = max((sum(v for v, _ in bar.parts) for bar in self.bars), default=0.0)
        whole = self.whole or largest or 1.0
        rows = "".join(self._row(bar, whole) for bar in self.bars)
        first, last = map(html.escape, self.head)
        head = f"<tr><th>{first}</th><th></th><th>{last}</th></tr>" if any(self.head) else ""
        return f"{_text(self.text, 'p')}<table class='bars'>{head}{rows}</table>"

    def _row(self, bar: Bar, whole: float) -> str:
        parts = "".join(
            f"<i style='width:{max(100 * value / whole, 0.25):.2f}%;background:{colour}'></i>"
            for value, colour in bar.parts
            if value > 0
        )
        tip = f"<small>{html.escape(bar.tip)}</small>" if bar.tip else ""
        return (
            f"<tr><th scope='row'>{html.escape(bar.name)}{tip}</th>"
            f"<td class='bar'><span>{parts}</span></td><td>{html.escape(bar.text)}</td></tr>"
        )


@dataclass(frozen=True)
class Points:
    """Points in a plane without axes, by group, drawn in the order given.

    Attributes:
        groups: (x, y) from 0 to 1, y upwards, by name.
        colours: of CSS, by name.
    """

    groups: Mapping[str, Sequence[tuple[float, float]]]
    colours: Mapping[str, str]
    title: str = ""
    text: str = ""
    wide: bool = True

    def html(self, side: int) -> str:
        """One path a group: 20,000 points are 200 KB."""
        count = sum(map(len, self.groups.values()))
        size = 5 if count > 5000 else 7 if count > 1000 else 10
        paths = []
        for name, places in self.groups.items():
            dots = "".join(f"M{20 + 960 * x:.0f} {580 - 560 * y:.0f}h0" for x, y in places)
            style = f"stroke:{self.colours[name]};stroke-width:{size}"
            paths.append(
                f"<path class='dots' d='{dots}' style='{style}'><title>{html.escape(name)}</title>"
                "</path>"
            )
        about = html.escape(f"{self.title}. {self.text}", quote=True)
        names = {f"{n} ({len(p):,})": self.colours[n] for n, p in self.groups.items() if len(p)}
        return (
            f"<svg viewBox='0 0 1000 600' role='img' class='chart' aria-label='{about}'>"
            f"{''.join(paths)}</svg>{_legend(names)}{_text(self.text)}"
        )


def _line(plane: Plane, rows: Sequence[tuple[float, float]], colour: str) -> str:
    places = " ".join("{:.1f},{:.1f}".format(*plane.at(x, y)) for x, y in rows)
    return f"<polyline points='{places}' style='stroke:{colour}'/>"


def _legend(colours: Mapping[str, str]) -> str:
    items = "".join(
        f"<span><i class='dot' style='background:{colour}'></i>{html.escape(name)}</span>"
        for name, colour in colours.items()
    )
    return f"<div class='legend'>{items}</div>"


def _text(text: str, kind: str = "p class='note'") -> str:
    return f"<{kind}>{html.escape(text)}</p>" if text else ""
