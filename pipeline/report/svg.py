"""Line charts as inline SVG: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Series = Mapping[str, Sequence[tuple[float, float]]]

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
COLOURS = 6  # --c0 … --c5 in report.css
MAX_POINTS = 400


def line_chart(series: Series, x_label: str = "step") -> str:
    """Draws named series of (x, y) in one chart; points that are not finite leave a gap."""
    points = [p for rows in series.values() for p in rows if math.isfinite(p[1])]
    if not points:
        return "<p class='note'>no values</p>"
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), 6)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points), 5)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    x_span = (x_high - x_low) or 1.0
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / x_span
        down = TOP + (HEIGHT - TOP - BOTTOM) * (y_high - y) / (y_high - y_low)
        return right, down

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' class='chart'>"]
    for y in y_ticks:
        _, down = at(x_low, y)
        parts.append(f"<path class='grid' d='M{LEFT} {down:.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x='{LEFT - 8}' y='{down + 4:.1f}' text-anchor='end'>{label(y)}</text>")
    for x in x_ticks:
        if x_low <= x <= x_high:
            right, _ = at(x, y_low)
            place = f"x='{right:.1f}' y='{HEIGHT - BOTTOM + 18}'"
            parts.append(f"<text {place} text-anchor='middle'>{label(x)}</text>")
    place = f"x='{WIDTH - RIGHT}' y='{HEIGHT - 2}' text-anchor='end'"
    parts.append(f"<text {place}>{html.escape(x_label)}</text>")
    for i, (name, rows) in enumerate(series.items()):
        colour = f"var(--c{i % COLOURS})"
        title = f"<title>{html.escape(name)}</title>"
        for run in _runs(thin(rows)):
            places = [at(x, y) for x, y in run]
            if len(places) == 1:
                x, y = places[0]
                parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' style='fill:{colour}'/>")
            else:
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
                parts.append(
                    f"<polyline points='{line}' style='stroke:{colour}'>{title}</polyline>"
                )
    parts.append("</svg>")
    return "".join(parts) + _legend(series)


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


def label(value: float) -> str:
    """A short number: 0.25, 1,500, 125k, 3e-06."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:,.4g}M"
    if size >= 1e4:
        return f"{value / 1e3:,.4g}k"
    return f"{value:,.4g}" if size >= 1e-3 or not size else f"{value:.2g}"


def thin(rows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 points: of each bucket the lowest and the highest, so that spikes stay."""
    if len(rows) <= MAX_POINTS:
        return list(rows)
    size = math.ceil(len(rows) / (MAX_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for i in range(0, len(rows), size):
        bucket = rows[i : i + size]
        known = [row for row in bucket if math.isfinite(row[1])]
        if not known:
            kept.append(bucket[0])
            continue
        ends = {min(known, key=lambda row: row[1]), max(known, key=lambda row: row[1])}
        kept += sorted(ends)
    return kept


def _runs(rows: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for row in rows:
        if math.isfinite(row[1]):
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _legend(series: Series) -> str:
    items = []
    for i, (name, rows) in enumerate(series.items()):
        known = [y for _, y in rows if math.isfinite(y)]
        last = label(known[-1]) if known else "–"
        swatch = f"<i style='background:var(--c{i % COLOURS})'></i>"
        items.append(f"<span>{swatch}{html.escape(name)} <b>{last}</b></span>")
    return f"<div class='legend'>{''.join(items)}</div>"
