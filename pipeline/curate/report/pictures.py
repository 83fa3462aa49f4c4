"""Pictures of a curation for MLflow: square grids, a row for each thing, its name first.

uint8 [H, H, 3], white between the tiles. MLflow shows pictures in square cards, so a grid that is
not square would be small, and so would be one picture on a large white square.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.curate.report.copies import Component
from pipeline.curate.report.read import Shown
from pipeline.curate.report.sets import Match
from pipeline.curate.report.summary import Summary
from pipeline.curate.report.words import REMOVED, RGB, images, name_of, similarity

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

CELL = 112  # side of a tile, pixels
GAP = 4  # white between tiles, pixels
BORDER = 5  # of a frame, pixels
COLUMNS = 7  # the name and six tiles
MOST_LINES = 12
MAP_SIDE = 800  # pixels
INK, BLANK = (29, 36, 48), (233, 236, 240)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """A picture (b"" where there is none) and the colour of its frame."""

    jpeg: bytes
    frame: Colour | None = None


@dataclass(frozen=True)
class Line:
    """A row of the grid."""

    name: str
    cells: Sequence[Cell]


def pictures(summary: Summary) -> dict[str, Pixels]:
    """Square grids by key; a key is there where it has something to show."""
    lines = {
        "removed": _removed(summary),
        "copies": _copies(summary),
        "borderline": _borderline(summary),
        "leaks": _leaks(summary),
        "seeds": _seeds(summary),
        "clusters": _clusters(summary),
    }
    sheets = {name: square(cells) for name, cells in lines.items() if cells}
    if summary.map is not None:
        sheets["map"] = _map(summary)
    return sheets


def square(lines: Sequence[Line]) -> Pixels:
    """The grid, with as few columns as rows need: of a few pictures a small one without much white.

    Pictures of a line that has no more room go on below it. Of a line that is longer than the
    widest grid the first ones are shown.
    """
    widest = max(COLUMNS, len(lines))
    count = next(
        (n for n in range(2, widest) if sum(_rows(line, n) for line in lines) <= n), widest
    )
    side = count * CELL + (count - 1) * GAP
    sheet = Image.new("RGB", (side, side), (255, 255, 255))
    top = 0
    for line in lines:
        rows = _rows(line, count) if count < widest else 1
        sheet.paste(_words(line.name), (0, top * (CELL + GAP)))
        for number, cell in enumerate(line.cells[: rows * (count - 1)]):
            down, across = divmod(number, count - 1)
            sheet.paste(_cell(cell), ((across + 1) * (CELL + GAP), (top + down) * (CELL + GAP)))
        top += rows
    return np.asarray(sheet)


def _rows(line: Line, columns: int) -> int:
    """That a line takes in a grid of so many columns, the first of which is for its name."""
    return max(1, -(-len(line.cells) // (columns - 1)))


def _cell(cell: Cell) -> Image.Image:
    tile = Image.new("RGB", (CELL, CELL), BLANK)
    room = CELL - 2 * BORDER
    if cell.jpeg:
        try:
            with Image.open(io.BytesIO(cell.jpeg)) as image:
                small = ImageOps.contain(image.convert("RGB"), (room, room))
        except OSError:
            small = Image.new("RGB", (room, room), BLANK)
        tile.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    if cell.frame is not None:
        ImageDraw.Draw(tile).rectangle((0, 0, CELL - 1, CELL - 1), outline=cell.frame, width=BORDER)
    return tile


def _words(text: str) -> Image.Image:
    """Words in a white tile, broken into lines that fit."""
    tile = Image.new("RGB", (CELL, CELL), (255, 255, 255))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(15)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= CELL - 4 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 6:
        lines = [*lines[:5], "…"]
    draw.multiline_text((2, 2), "\n".join(lines), fill=INK, font=font, spacing=3)
    return tile


def _shown(summary: Summary, row: int, frame: Colour | None = None) -> Cell:
    one = summary.shown.get(row)
    return Cell(one.thumbnail if one else b"", frame)


def _reason(summary: Summary, row: int) -> Colour:
    one = summary.shown.get(row)
    return RGB.get(one.reason if one else "", INK)


def _removed(summary: Summary) -> list[Line]:
    """Of each reason and rule a few, in the colour that the report gives the reason."""
    counts = summary.counts
    order = sorted(counts.samples.items(), key=lambda kv: (REMOVED.index(kv[0][0]), kv[0][1]))
    return [
        Line(
            f"{name_of(reason)} {rule if len(rule) < 16 else ''} {counts.by_rule[reason, rule]:,}",
            [_shown(summary, row, RGB[reason]) for row in rows],
        )
        for (reason, rule), rows in order
        if any(summary.shown[row].thumbnail for row in rows if row in summary.shown)
    ][:MOST_LINES]


def _copies(summary: Summary) -> list[Line]:
    parts = summary.components
    if parts is None:
        return []

    def cells(one: Component) -> list[Cell]:
        return [
            _shown(summary, m.row, RGB["kept"] if m.keeper else _reason(summary, m.row))
            for m in one.members[: COLUMNS - 1]
        ]

    chosen = {one.name: one for one in (*parts.largest[:3], *parts.chains[:2])}
    lines = [Line(images(one.size), cells(one)) for one in chosen.values()]
    row: list[Cell] = []  # small groups share one
    for one in parts.random:
        group = [] if one.name in chosen else cells(one)
        if len(row) + len(group) > COLUMNS - 1:
            lines.append(Line("by chance", row))
            row = []
        row += group
    return [*lines, *([Line("by chance", row)] if row else [])][:COLUMNS]


def _borderline(summary: Summary) -> list[Line]:
    lines = []
    for band in summary.edges.bands if summary.edges else ():
        colour = RGB["duplicate_near"] if band.copies else RGB["undecodable"]
        cells = [_shown(summary, row, colour) for p in band.pairs for row in (p.a, p.b)]
        ends = f"{similarity(max(band.low, 0))} to {similarity(min(1, band.high))}"
        words = "copies" if band.copies else "not copies"
        lines.append(Line(f"{ends}: {words} {band.count:,} pairs", cells))
    return lines


def _leaks(summary: Summary) -> list[Line]:
    lines = []
    for leak in summary.leaks:
        for what, matches in (("most alike", leak.top), ("least alike", leak.low)):
            name = f"{leak.name}: {leak.leaked:,} leaked, {what}"
            cells = _pairs(summary, matches, leak.pictures)
            for start in range(0, len(cells), COLUMNS - 1):
                lines.append(Line("" if start else name, cells[start : start + COLUMNS - 1]))
    return lines[:MOST_LINES]


def _pairs(summary: Summary, matches: Sequence[Match], known: Any) -> list[Cell]:
    cells = []
    for match in matches:
        one: Shown | None = known.get(match.query)
        cells.append(Cell(one.thumbnail if one else b"", RGB["leaks_evaluation"]))
        cells.append(_shown(summary, match.row))
    return cells


def _seeds(summary: Summary) -> list[Line]:
    lines = []
    for part in summary.retrieved:
        for matches in part.seeds:
            one = part.pictures.get(matches[0].query)
            seed = Cell(one.thumbnail if one else b"", RGB["not_retrieved"])
            lines.append(Line(part.name, [seed, *(_shown(summary, m.row) for m in matches)]))
    return lines[:COLUMNS]


def _clusters(summary: Summary) -> list[Line]:
    return [
        Line(
            f"{images(sheet.before)}, {sheet.after:,} chosen",
            [_shown(summary, row, RGB["kept"] if yes else None) for row, yes in sheet.rows],
        )
        for sheet in (summary.clusters.sheets if summary.clusters else ())
        if sheet.rows
    ]


def _map(summary: Summary) -> Pixels:
    """Dots in the colours of the reasons; kept ones first, so that what goes is seen."""
    assert summary.map is not None
    sheet = Image.new("RGB", (MAP_SIDE, MAP_SIDE), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    places, reasons = summary.map.places, summary.map.reasons
    radius = 2 if len(reasons) > 5000 else 3
    order = sorted(range(len(reasons)), key=lambda i: reasons[i] != "kept")
    room = MAP_SIDE - 40
    for i in order:
        x, y = 20 + room * places[i, 0], 20 + room * (1 - places[i, 1])
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, fill=RGB.get(reasons[i], INK))
    return np.asarray(sheet)
