"""A report of a run: one HTML file that needs nothing else, below 2 MB, also shown by MLflow."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.report.gallery import Heading
from pipeline.report.svg import label, line_chart
from pipeline.track.state import atomic_write
from pipeline.uri import public

LIMIT_BYTES = 2_000_000
TABLE_ROWS = 200


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length; rows over 200 are counted, not shown."""

    columns: Mapping[str, Sequence[Any]]
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """Series of (x, y) by name."""

    series: Mapping[str, Sequence[tuple[float, float]]]
    title: str = ""
    x_label: str = "step"


@dataclass(frozen=True)
class Picture:
    """A picture, uint8 [H,W,3], or a file of one."""

    pixels: Any
    title: str = ""
    caption: str = ""


class Drawn(Protocol):
    """A section that draws itself: those of `charts`, `gallery` and `matrix`."""

    @property
    def title(self) -> str:
        """Above it, or ""."""

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width."""

    def html(self, side: int) -> str:
        """Itself, with pictures that shrink with the side (1,200 pixels at first)."""


Section = Text | Table | Chart | Picture | Heading | Drawn


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    limit: int = LIMIT_BYTES,
) -> None:
    """Writes the report. If it gets too large, its pictures get smaller until it fits.

    Headings make chapters, with a list of contents at the top.
    """
    css = (Path(__file__).parent / "report.css").read_text()
    head = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{css}</style></head><body><main>"
        f"<header><h1>{html.escape(title)}</h1><p class='note'>{html.escape(subtitle)}</p>"
        f"{_contents(sections)}</header>"
    )
    plain = Text | Table | Chart | Heading
    pictures = sum(not isinstance(section, plain) for section in sections)
    chapters = any(isinstance(section, Heading) for section in sections)
    for side in (1200, 900, 600, 400, 250, 120):
        body = "".join(_section(section, side, chapters) for section in sections)
        page = public(f"{head}{body}</main></body></html>").encode()
        if len(page) <= limit or not pictures:
            break
    atomic_write(path, page)


def _contents(sections: Sequence[Section]) -> str:
    titles = [section.title for section in sections if isinstance(section, Heading)]
    links = "".join(f"<a href='#{_anchor(title)}'>{html.escape(title)}</a>" for title in titles)
    return f"<nav aria-label='contents'>{links}</nav>" if links else ""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "chapter"


def _section(section: Section, side: int, chapters: bool) -> str:
    if isinstance(section, Heading):
        said = f"<p>{html.escape(section.text)}</p>" if section.text else ""
        name = html.escape(section.title)
        return (
            f"<div class='chapter wide' id='{_anchor(section.title)}'><h2>{name}</h2>{said}</div>"
        )
    level = "h3" if chapters else "h2"
    inner = f"<{level}>{html.escape(section.title)}</{level}>" if section.title else ""
    if isinstance(section, Text):
        blocks = section.text.strip().split("\n\n")
        inner += "".join(f"<p>{html.escape(block)}</p>" for block in blocks)
    elif isinstance(section, Table):
        inner += _table(section)
    elif isinstance(section, Chart):
        inner += line_chart(section.series, section.x_label)
    elif isinstance(section, Picture):
        inner += _picture(section, side)
    else:
        inner += section.html(side)
    wide = isinstance(section, Text | Table) or getattr(section, "wide", False)
    shape = "wide" if wide else "half"
    return f"<section class='{shape}'>{inner}</section>"


def _table(table: Table) -> str:
    rows = list(zip(*table.columns.values(), strict=True))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    lines = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows[:TABLE_ROWS])
    more = len(rows) - TABLE_ROWS
    note = f"<p class='note'>and {more:,} more rows</p>" if more > 0 else ""
    return f"<div class='scroll'><table><tr>{head}</tr>{lines}</table></div>{note}"


def _cell(value: Any) -> str:
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else label(value)
    return f"<td class='number'>{text}</td>"


def _picture(section: Picture, side: int) -> str:
    from PIL import Image

    source = section.pixels
    image = Image.open(source) if isinstance(source, str | Path) else Image.fromarray(source)
    image = image.convert("RGB")
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    code = base64.b64encode(data.getvalue()).decode()
    caption = html.escape(section.caption)
    return (
        f"<figure><img alt='{html.escape(section.title)}' width='{image.width}' "
        f"height='{image.height}' src='data:image/jpeg;base64,{code}'>"
        f"<figcaption>{caption}</figcaption></figure>"
    )
