"""Sections of a report that show small pictures: groups of tiles with words below each."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

TILE = 96  # pixels of a tile's longer side at most, as it comes


@dataclass(frozen=True)
class Tile:
    """A picture with words below it.

    Attributes:
        jpeg: encoded; b"" where there is none.
        lines: words below it, the first stronger.
        alt: what it is, for those who cannot see it.
        frame: "" or "keep" (the one that stays), "gone", "ask" (an image from another set).
        tip: shown where the pointer rests, such as its path.
        colour: of CSS, of the dot before the words.
    """

    jpeg: bytes
    lines: Sequence[str] = ()
    alt: str = ""
    frame: str = ""
    tip: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Group:
    """Tiles that belong together, closely where they are one thing such as a pair."""

    tiles: Sequence[Tile]
    title: str = ""
    text: str = ""
    close: bool = False
    below: str = ""


@dataclass(frozen=True)
class Gallery:
    """Groups, one below the other; `flow` sets them beside one another."""

    groups: Sequence[Group]
    title: str = ""
    text: str = ""
    flow: bool = False
    wide: bool = True

    def html(self, side: int) -> str:
        """All groups; smaller and fewer tiles for a smaller side (of 1,200)."""
        size = max(40, int(TILE * (side / 1200) ** 0.5))
        most = 1000 if side > 250 else 12 if side > 120 else 6
        inner = "".join(_group(group, size, most) for group in self.groups)
        text = f"<p>{html.escape(self.text)}</p>" if self.text else ""
        if not self.groups:
            return f"{text}<p class='note'>nothing to show</p>"
        return f"{text}<div class='{'flow' if self.flow else 'groups'}'>{inner}</div>"


@dataclass(frozen=True)
class Heading:
    """The title of a chapter, with a sentence; the contents at the top lead to it."""

    title: str
    text: str = ""


@dataclass(frozen=True)
class Numbers:
    """The few numbers to know, large: (number, what it is)."""

    numbers: Sequence[tuple[str, str]]
    title: str = ""
    text: str = ""
    note: str = ""
    problem: str = ""
    wide: bool = True

    def html(self, side: int) -> str:
        """A sentence, then the numbers; a problem is said first."""
        items = "".join(
            f"<div><b>{html.escape(number)}</b><span>{html.escape(what)}</span></div>"
            for number, what in self.numbers
        )
        problem = f"<p class='problem'>{html.escape(self.problem)}</p>" if self.problem else ""
        said = f"<p class='lead'>{html.escape(self.text)}</p>" if self.text else ""
        note = f"<p class='note'>{html.escape(self.note)}</p>" if self.note else ""
        return f"{problem}{said}<div class='numbers'>{items}</div>{note}"


def shrunk(jpeg: bytes, size: int) -> tuple[bytes, int, int]:
    """A JPEG no larger than size pixels, with its width and height; as it is where it fits.

    What cannot be read as a picture gives b"" and a square.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(jpeg)) as image:
            if max(image.size) <= size and image.format == "JPEG":
                return jpeg, *image.size
            small = image.convert("RGB")
    except OSError:
        return b"", size, size
    small.thumbnail((size, size))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return stream.getvalue(), *small.size


def _group(group: Group, size: int, most: int) -> str:
    title = f"<h4>{html.escape(group.title)}</h4>" if group.title else ""
    text = f"<p class='note'>{html.escape(group.text)}</p>" if group.text else ""
    tiles = "".join(_tile(tile, size) for tile in group.tiles[:most])
    left = len(group.tiles) - most
    more = f"<p class='note'>and {left:,} more</p>" if left > 0 else ""
    below = f"<p class='below'>{html.escape(group.below)}</p>" if group.below else ""
    kind = "tiles close" if group.close else "tiles"
    return f"<div class='group'>{title}{text}<div class='{kind}'>{tiles}</div>{below}{more}</div>"


def _tile(tile: Tile, size: int) -> str:
    jpeg, width, height = shrunk(tile.jpeg, size) if tile.jpeg else (b"", size, size)
    alt = html.escape(tile.alt, quote=True)
    if jpeg:
        code = base64.b64encode(jpeg).decode()
        times = max(1, size // max(width, height))  # icons are enlarged, pixel by pixel
        kind = " class='enlarged'" if times > 1 else ""
        shown = (
            f"<img{kind} alt='{alt}' width='{times * width}' height='{times * height}' "
            f"src='data:image/jpeg;base64,{code}'>"
        )
    else:
        shown = f"<span class='blank' role='img' aria-label='{alt}'>no picture</span>"
    dot = f"<i class='dot' style='background:{tile.colour}'></i>" if tile.colour else ""
    words = [html.escape(line) for line in tile.lines]
    lines = "".join(
        f"<{kind}>{dot if not i else ''}{word}</{kind}>"
        for i, word in enumerate(words)
        for kind in ("b" if not i else "span",)
    )
    tip = f" title='{html.escape(tile.tip, quote=True)}'" if tile.tip else ""
    return (
        f"<figure class='tile {tile.frame}'{tip}><div>{shown}</div>"
        f"<figcaption>{lines}</figcaption></figure>"
    )
