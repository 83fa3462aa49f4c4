"""Sections of a page that show pictures: one large, galleries of tiles, a mosaic.

A picture is given as encoded bytes (b"" where there is none), as a file, or as uint8 pixels
[H, W, 3] or [H, W]. Pages hold JPEGs of the size that they show.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TILE = 96  # pixels of a tile's longer side at most, as it comes
FULL = 1200  # pixels of a large picture's longer side at most, as it comes


@dataclass(frozen=True)
class Embedded:
    """A picture as a page holds it.

    Attributes:
        url: with the whole picture in it; "" where there was none.
        width: pixels to show.
        height: pixels to show.
        enlarged: shown larger than it is, pixel by pixel.
    """

    url: str
    width: int
    height: int
    enlarged: bool = False


@dataclass(frozen=True)
class Picture:
    """A large picture."""

    image: Any
    title: str = ""
    caption: str = ""
    wide: bool = False
    kind = "picture"

    def embedded(self, side: int) -> Embedded:
        """At most `side` pixels high and wide."""
        return embedded(self.image, side, quality=85)


@dataclass(frozen=True)
class Tile:
    """A small picture with words below it.

    Attributes:
        image: see the top of this module.
        lines: words below it, the first stronger.
        alt: what it is, for those who cannot see it.
        frame: "" or "keep" (the one that stays), "gone", "ask" (an image from another set).
        tip: shown where the pointer rests, such as its path.
        colour: of CSS, of the dot before the words.
    """

    image: Any
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
    """Groups, one below the other; `flow` sets them beside one another.

    Attributes:
        tile: pixels of a tile's longer side, where the page has room.
    """

    groups: Sequence[Group]
    title: str = ""
    text: str = ""
    flow: bool = False
    wide: bool = True
    tile: int = TILE
    kind = "gallery"

    def size(self, side: int) -> int:
        """Of tiles, on a page whose large pictures have `side` pixels."""
        return max(40, int(self.tile * (side / FULL) ** 0.5))

    def most(self, side: int) -> int:
        """Tiles of a group that are shown: all, but on pages that would get too large."""
        return 1000 if side > 250 else 12 if side > 120 else 6

    def embedded(self, tile: Tile, side: int) -> Embedded:
        """The tile's picture; icons are enlarged."""
        return embedded(tile.image, self.size(side), enlarge=True)


@dataclass(frozen=True)
class Mosaic:
    """Pictures on a grid, each at a (column, line); those with the frame "gone" are faded.

    Attributes:
        tiles: column, line, tile; its words are shown where the pointer rests.
        grid: columns and lines.
    """

    tiles: Sequence[tuple[int, int, Tile]]
    grid: tuple[int, int]
    title: str = ""
    text: str = ""
    wide: bool = True
    kind = "mosaic"

    def embedded(self, tile: Tile, side: int) -> Embedded:
        """The tile's picture, 64 pixels large at most."""
        return embedded(tile.image, max(24, int(64 * (side / FULL) ** 0.5)))


def embedded(image: Any, size: int, quality: int = 80, enlarge: bool = False) -> Embedded:
    """The picture as a JPEG no larger than size pixels; what is no picture has no URL."""
    jpeg, width, height = shrunk(image, size, quality)
    if not jpeg:
        return Embedded("", width, height)
    url = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    times = size / max(width, height) if enlarge else 1.0
    if times >= 2:  # whole times, so that its pixels stay squares
        return Embedded(url, int(times) * width, int(times) * height, True)
    return Embedded(url, round(max(times, 1.0) * width), round(max(times, 1.0) * height))


def shrunk(image: Any, size: int, quality: int = 80) -> tuple[bytes, int, int]:
    """A JPEG no larger than size pixels, with its width and height; as it is where it fits.

    Bytes that cannot be read as a picture give b"" and a square.
    """
    from PIL import Image

    encoded = image.read_bytes() if isinstance(image, Path) else image
    try:
        if isinstance(encoded, bytes):
            with Image.open(io.BytesIO(encoded)) as opened:
                if max(opened.size) <= size and opened.format == "JPEG":
                    return encoded, *opened.size
                small = opened.convert("RGB")
        else:
            small = Image.fromarray(encoded).convert("RGB")
    except OSError:
        return b"", size, size
    small.thumbnail((size, size))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return stream.getvalue(), *small.size
