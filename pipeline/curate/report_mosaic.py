"""A grid of small pictures at the places of the map."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.curate.report_read import Shown
from pipeline.curate.report_words import name_of
from pipeline.track.gallery import shrunk

CELL = 64  # pixels of a picture, at most


@dataclass(frozen=True)
class Mosaic:
    """Pictures by (column, line); `grid` is how many of each there are."""

    pictures: Sequence[tuple[int, int, Shown]]
    grid: tuple[int, int]
    title: str = ""
    text: str = ""
    wide: bool = True

    def html(self, side: int) -> str:
        """A CSS grid."""
        size = max(24, int(CELL * (side / 1200) ** 0.5))
        cells = "".join(_cell(x, y, one, size) for x, y, one in self.pictures)
        return (
            f"<p>{html.escape(self.text)}</p><div class='mosaic' "
            f"style='grid-template-columns:repeat({self.grid[0]},minmax(0,1fr))'>{cells}</div>"
        )


def _cell(x: int, y: int, one: Shown, size: int) -> str:
    jpeg, _, _ = shrunk(one.thumbnail, size)
    if not jpeg:
        return ""
    code = base64.b64encode(jpeg).decode()
    words = html.escape(f"{name_of(one.reason)}: {one.path or one.image_id}", quote=True)
    gone = "" if one.reason == "kept" else " class='gone'"
    place = f"grid-column:{x + 1};grid-row:{y + 1}"
    return (
        f"<img{gone} alt='{words}' title='{words}' style='{place}' "
        f"src='data:image/jpeg;base64,{code}'>"
    )
