"""`search.html`: each query with its picture, and its neighbours with theirs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.embed.vectors import VectorSet
from pipeline.errors import PipelineError, one_line, shortened
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import MAX_PIXELS, decode_image, decode_shrunk
from pipeline.images.value_range import FULL, ValueRange, from_json
from pipeline.report.page import (
    Fold,
    Gallery,
    Group,
    Heading,
    Section,
    Table,
    Text,
    Tile,
    write_report,
)
from pipeline.report.pictures import shrunk
from pipeline.search.answers import Answer, Answers, Neighbour
from pipeline.search.queries import Query
from pipeline.search.rows import Rows

log = logging.getLogger("pipeline.search")

TILE = 144  # pixels
QUERIES = 20  # that the page shows
NEIGHBOURS = 100  # of each

KEPT = "kept"  # what most images of a curated set are, so not said of each
SIGNS = {  # sign, frame, words
    True: ("✓", "right", ", the same label"),
    False: ("✗", "wrong", ", another label"),
    None: ("", "", ""),
}

Shown = tuple[Answer, list[Neighbour]]


@dataclass(frozen=True)
class Pictures:
    """Where the page has its pictures from.

    Attributes:
        images: gives encoded bytes by image id; None where the shards cannot be reached.
        missing: then, one sentence that says so.
        max_pixels: of an image that is decoded.
        value_range: of the set, see `images.decode`.
    """

    images: Any
    missing: str = ""
    max_pixels: int = MAX_PIXELS
    value_range: ValueRange = FULL

    @classmethod
    def of(cls, vectors: VectorSet, rows: Rows, max_pixels: int = MAX_PIXELS) -> Pictures:
        """From the shards that the vectors name."""
        values = from_json(vectors.facts.get("value_range")) or FULL
        try:
            return cls(rows.images(vectors), "", max_pixels, values)
        except (PipelineError, OSError) as error:
            return cls(None, f"Without pictures of the set: {one_line(error)}", max_pixels, values)

    def of_image(self, image_id: str) -> bytes:
        """A small JPEG of an image of the set; b"" where there is none to be had."""
        try:
            return self.small(bytes(self.images[image_id])) if self.images is not None else b""
        except (KeyError, PipelineError, OSError) as error:
            log.warning("search      no picture of %s: %s", image_id, one_line(error))
            return b""

    def small(self, encoded: bytes) -> bytes:
        """A small JPEG of an image, decoded as every stage does it; b"" of what is no image."""
        try:
            pixels = decode_shrunk(encoded, 8, 3, self.max_pixels, self.value_range)[0]
            if max(pixels.shape) < TILE:
                pixels = decode_image(encoded, 3, self.max_pixels, self.value_range)
        except BadImage:
            return b""
        return shrunk(pixels, TILE)[0]


def write_page(
    path: Path, answers: Answers, shown: Sequence[Shown], pictures: Pictures, texts: Sequence[str]
) -> None:
    """Writes the page.

    Args:
        path: of the file.
        answers: that told those that are shown.
        shown: QUERIES of them at most.
        pictures: of the set.
        texts: what else is to be said, a sentence each; the first is the subtitle.
    """
    sections: list[Section] = []
    if notes := [*texts[1:], pictures.missing] if pictures.missing else texts[1:]:
        sections.append(Text("\n\n".join(notes)))
    for number, (answer, neighbours) in enumerate(shown, 1):
        title = _title(answers, answer.query)
        sections.append(Heading(f"{number}. {title}" if len(shown) > 1 else title))
        sections += _sections(answers, answer, neighbours[:NEIGHBOURS], pictures)
    write_report(path, "Images that are alike", sections, texts[0])


def _sections(
    answers: Answers, answer: Answer, neighbours: Sequence[Neighbour], pictures: Pictures
) -> list[Section]:
    query = answer.query
    label = answers.label_of(query.row) if query.row >= 0 else ""
    tiles = [_query_tile(answers, query, label, pictures)]
    tiles += [_tile(one, label, pictures) for one in neighbours]
    said = said_of(answer, neighbours)
    columns: dict[str, list[Any]] = {
        "rank": [one.rank for one in neighbours],
        "similarity": [f"{one.similarity:.4f}" for one in neighbours],
        "image": [one.image_id for one in neighbours],
        "source": [one.source for one in neighbours],
        "label": [one.label for one in neighbours],
        "decision": [one.decision.text if one.decision else "" for one in neighbours],
    }
    table = Table({name: values for name, values in columns.items() if any(map(str, values))})
    gallery = Gallery([Group(tiles, text=said, close=True)], tile=TILE)
    return (
        [gallery, Fold([table], "As a table", "ids, sources, labels")] if neighbours else [gallery]
    )


def _title(answers: Answers, query: Query) -> str:
    """The file's name; of an image of the set the last part of its source."""
    known = query.row >= 0 and query.name == answers.rows.id_of(query.row)
    name = answers.rows.source_of(query.row) if known else query.name
    return name.rstrip("/").rpartition("/")[2] or query.name


def said_of(answer: Answer, neighbours: Sequence[Neighbour]) -> str:
    """What is to know of an answer as a whole, or ""."""
    same = sum(one.same for one in neighbours)
    if not neighbours:
        if answer.best != answer.best:  # no number: there is nobody else
            return "There is no other image in the set."
        return f"No image is as similar as was asked; the nearest has {answer.best:.4f}."
    if same:
        what = "1 image has" if same == 1 else f"{same:,} images have"
        return f"{what} the same vector: copies, or images that the model cannot tell apart."
    return ""


def _tile(one: Neighbour, asked: str, pictures: Pictures) -> Tile:
    """A neighbour; with labels whether it has the one of the image that was asked for."""
    right = one.label == asked if one.label and asked else None
    sign, frame, said = SIGNS[right]
    decision = one.decision.text if one.decision and one.decision.text != KEPT else ""
    similarity = f"{one.similarity:.3f}" + ", same vector" * one.same
    words = [f"{sign} {one.label}".strip(), similarity, decision, _file(one.source)]
    return Tile(
        pictures.of_image(one.image_id),
        [word for word in words if word],
        alt=f"neighbour {one.rank}: {one.source}{said}",
        frame=frame,
        tip=f"{one.source}\n{one.image_id}",
        colour=one.decision.colour if decision and one.decision else "",
    )


def _file(source: str) -> str:
    """The last part of a path."""
    return shortened(source.rstrip("/").rpartition("/")[2], 40)


def _query_tile(answers: Answers, query: Query, label: str, pictures: Pictures) -> Tile:
    inside = query.row >= 0
    own = answers.rows.id_of(query.row) if inside else ""
    picture = pictures.small(query.encoded) if query.encoded else b""
    words = [label, "asked for", shortened(_title(answers, query), 40), "in the set" * inside]
    return Tile(
        picture or (pictures.of_image(own) if inside else b""),
        [word for word in words if word],
        alt=f"asked for: {_title(answers, query)}",
        frame="query",
        tip=own or query.name,
    )
