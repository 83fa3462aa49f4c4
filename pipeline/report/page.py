r"""Pages: one look for every HTML file that we write. A page needs nothing but itself.

    from pipeline.report.page import Chart, Gallery, Group, Picture, Table, Text, Tile, write_report

    write_report(path, "Search", [
        Text("What was asked.\n\nBlank lines part paragraphs.", title="Question"),
        Table({"image": ["a", "b"], "similarity": [0.91, 0.87]}, title="Nearest"),
        Gallery([Group([Tile(encoded, ("0.91", "cats"), alt="image a")])], title="Pictures"),
        Picture(pixels, title="Attention", caption="head 3"),
        Chart({"recall": [(1, 0.5), (10, 0.9)]}, title="Recall", x_label="k"),
    ], subtitle="2,000 images")

Sections stand in the order given, two beside each other where they are not `wide`:

* `Text`, `Table`, `Matrix` (counts that add up), `Numbers` (the few to know, large), `Code`;
* `Statement`: what the page comes to, on top;
* `Picture` and `Gallery` of `Group`s of `Tile`s, `Mosaic`: see `pictures.py` for what an image is;
* `Chart` (curves), `Histogram`, `Points`: see `charts.py`; `Bars`: see `bars.py`;
* `Links`: to other pages;
* `Heading`: begins a chapter; the contents at the top lead to it;
* `Fold`: sections behind one line, for what few readers need; paper leaves it out.

All words are escaped. Tags are in `sections.html.j2`, a macro for each kind of section; the frame
is `page.html.j2`. A page that needs more, such as a form, is a template of its own that extends it:
`render("Title", [], template=Path(__file__).parent / "mine.html.j2", values={"limit": 5})`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from pipeline.report.bars import Bar, Bars
from pipeline.report.charts import Chart, Histogram, Mark, Points, label
from pipeline.report.pictures import FULL, Gallery, Group, Mosaic, Picture, Tile
from pipeline.track.state import atomic_write
from pipeline.uri import public

__all__ = [
    "Bar", "Bars", "Chart", "Code", "Column", "Fold", "Gallery", "Group", "Heading", "Histogram",
    "Links", "Mark", "Matrix", "Mosaic", "Numbers", "Picture", "Points", "Section", "Statement",
    "Table", "Text", "Tile", "render", "write_report",
]  # fmt: skip

HERE = Path(__file__).parent
LIMIT_BYTES = 2_000_000
TABLE_ROWS = 200
DIGEST = re.compile(r"\b[0-9a-f]{32}\b")
UNIT = r"±\s[\d,.]+|%|s|min|h|d|[KMGT]?B|\d+\s(?:s|min)"
NUMBER = re.compile(rf"[+<>\u2212-]?\s?\d[\d,.]*(?:\s(?:{UNIT}))*|–")  # a cell that is one
SIDES = (FULL, 900, 600, 400, 250, 120)  # pixels of large pictures, until the page fits


class Section(Protocol):
    """What stands on a page: the macro of `sections.html.j2` called `kind` draws it."""

    @property
    def kind(self) -> str:
        """Name of the macro."""

    @property
    def title(self) -> str:
        """Above it, or ""."""

    @property
    def wide(self) -> bool:
        """Whether it takes the whole width."""


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines."""

    text: str
    title: str = ""
    wide: bool = True
    kind = "text"

    def paragraphs(self) -> list[str]:
        """The parts between blank lines."""
        return self.text.strip().split("\n\n")


@dataclass(frozen=True)
class Statement:
    """What a page comes to, in one or two sentences; its sign says so without colours.

    Attributes:
        mood: "good", "bad" or "open".
        note: below it, smaller.
    """

    text: str
    mood: str = "open"
    title: str = ""
    note: str = ""
    wide: bool = True
    kind = "statement"

    @property
    def sign(self) -> str:
        """Before the sentence."""
        return {"good": "✓", "bad": "✗"}.get(self.mood, "?")


@dataclass(frozen=True)
class Code:
    """Lines to copy, with a button that does it; without scripts they can still be selected."""

    text: str
    title: str = ""
    wide: bool = True
    kind = "code"


@dataclass(frozen=True)
class Table:
    """Columns by name, all of one length; rows over 200 are counted, not shown."""

    columns: Mapping[str, Sequence[Any]]
    title: str = ""
    wide: bool = True
    note: str = ""
    kind = "table"

    def head(self) -> list[tuple[bool, str]]:
        """Of each column whether all of it are numbers, which stand on the right, and its name."""
        cells = {name: [_cell(value) for value in values] for name, values in self.columns.items()}
        return [
            (any(words for _, words in each) and all(n or not words for n, words in each), name)
            for name, each in cells.items()
        ]

    def rows(self) -> list[list[tuple[bool, str, str]]]:
        """Of each cell whether its column is of numbers, its words, and the whole of what they
        shorten ("" where they do not).
        """
        numbers = [number for number, _ in self.head()]
        rows = list(zip(*self.columns.values(), strict=True))[:TABLE_ROWS]
        return [
            [(number, *_shortened(value)) for number, value in zip(numbers, row, strict=True)]
            for row in rows
        ]

    def more(self) -> int:
        """Rows that are not shown."""
        return max(0, max(map(len, self.columns.values()), default=0) - TABLE_ROWS)


def _cell(value: Any) -> tuple[bool, str]:
    """Whether it is a number, and its words."""
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return bool(NUMBER.fullmatch(str(value))), str(value)
    return True, f"{value:,}" if isinstance(value, int) else label(value)


def _shortened(value: Any) -> tuple[str, str]:
    """The words of a cell, of digests the first digits; then the whole where that is more."""
    words = _cell(value)[1]
    short = DIGEST.sub(lambda digest: f"{digest[0][:8]}…", words)
    return short, words if short != words else ""


@dataclass(frozen=True)
class Heading:
    """The title of a chapter, with a sentence; the contents at the top lead to it."""

    title: str
    text: str = ""
    wide: bool = True
    kind = "heading"

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "chapter"


@dataclass(frozen=True)
class Links:
    """Other pages: (words, address), beside one another."""

    links: Sequence[tuple[str, str]]
    title: str = ""
    wide: bool = True
    note: str = ""
    kind = "links"


@dataclass(frozen=True)
class Fold:
    """Sections behind one line that opens them.

    Attributes:
        sections: shown when it is open; they have no chapters of their own.
        title: the line.
        text: in the line, softer: what is inside.
    """

    sections: Sequence[Section]
    title: str = ""
    text: str = ""
    wide: bool = True
    kind = "fold"


@dataclass(frozen=True)
class Numbers:
    """The few numbers to know, large: (number, what it is); a problem is said first."""

    numbers: Sequence[tuple[str, str]]
    title: str = ""
    text: str = ""
    note: str = ""
    problem: str = ""
    wide: bool = True
    kind = "numbers"


@dataclass(frozen=True)
class Column:
    """A column's name, its tip and its colour of CSS."""

    name: str
    tip: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Matrix:
    """Counts by row and column, which add up.

    Attributes:
        columns: the first is the whole of a row: cells are shaded by their share of it.
        rows: counts by the row's name, one for each column.
        total: of each column, the last row.
    """

    columns: Sequence[Column]
    rows: Mapping[str, Sequence[int]]
    total: Sequence[int]
    corner: str = ""
    title: str = ""
    text: str = ""
    note: str = ""
    wide: bool = True
    kind = "matrix"


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    limit: int = LIMIT_BYTES,
) -> None:
    """Writes a page of at most `limit` bytes: its pictures get smaller until it fits."""
    pictures = any(isinstance(one, Picture | Gallery | Mosaic) for one in _flat(sections))
    for side in SIDES if pictures else SIDES[:1]:
        page = render(title, sections, subtitle, side=side).encode()
        if len(page) <= limit:
            break
    atomic_write(path, page)


def render(
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    side: int = FULL,
    template: Path = HERE / "page.html.j2",
    values: Mapping[str, Any] | None = None,
) -> str:
    """The HTML of a page.

    Args:
        title: above it, and in the browser's tab.
        sections: in their order.
        subtitle: below the title.
        side: pixels of large pictures; small ones shrink with it.
        template: one that extends page.html.j2.
        values: what it needs, by name.
    """
    page = _environment(template.parent).get_template(template.name)
    known = {
        "title": title,
        "subtitle": subtitle,
        "sections": sections,
        "side": side,
        "headings": [one for one in sections if isinstance(one, Heading)],
        "copies": any(isinstance(one, Code) for one in _flat(sections)),
        "css": _css(),
    }
    # Words of users, such as a data set's URL, may hold a secret; no page does.
    return public(page.render(**known, **(values or {})))


def _flat(sections: Sequence[Section]) -> Iterator[Section]:
    """All of them, also those that are folded."""
    for one in sections:
        yield one
        if isinstance(one, Fold):
            yield from _flat(one.sections)


@lru_cache
def _css() -> str:
    return (HERE / "report.css").read_text()


@lru_cache
def _environment(folder: Path) -> Any:
    import jinja2  # 60 ms, which the help of a job need not wait for

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
