"""The images of a set in units of work: read and decoded here, on CPUs that need no model.

What a unit holds follows from the set and the size of its images alone, so that every run, on any
number of machines, makes the same parts with the same bytes. A unit is several row groups of a
file, or a piece of a large one.

Shapes: n images of a unit, S side in pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from pipeline.embed.embedders import prepared
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image
from pipeline.shards.row_group import RowGroup, read_group, read_sources
from pipeline.shards.shard_set import ShardColumns, ShardSet

UNIT_IMAGES = 1024  # at most: what a kill can cost a worker
UNIT_BYTES = 128 * 2**20  # of decoded images: what waits in an object store is a few of these


@dataclass(frozen=True)
class Unit:
    """One part of the table.

    Attributes:
        number: of the part.
        path: of the file, in the file system of the set.
        groups: row groups of it.
        start: rows of the first of them that are passed over.
        rows: n and the bad ones.
        first: row of the set that is its first.
    """

    number: int
    path: str
    groups: tuple[int, ...]
    start: int
    rows: int
    first: int


@dataclass(frozen=True)
class Decoding:
    """What a decode task needs to know.

    Attributes:
        columns: of the set, with the range of values that the model was trained with.
        kind: of the embedder.
        size: S.
        channels: C.
        max_pixels: larger images are refused.
    """

    columns: ShardColumns
    kind: str
    size: int
    channels: int
    max_pixels: int


@dataclass(frozen=True)
class Decoded:
    """A unit with its images prepared.

    Attributes:
        unit: which.
        images: uint8 [n, S, S, C].
        places: int64 [n], each image's place among the rows of the unit.
        ids: hex digits of each.
        sources: where each is from.
        labels: int64 [n], -1 where unknown.
        bad: rows of the bad image table.
    """

    unit: Unit
    images: np.ndarray[Any, np.dtype[np.uint8]]
    places: np.ndarray[Any, np.dtype[np.int64]]
    ids: list[str]
    sources: list[str]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    bad: list[dict[str, str]]


def units_of(shards: ShardSet, image_bytes: int) -> list[Unit]:
    """The units of a set.

    Args:
        shards: the set.
        image_bytes: of a prepared image.
    """
    most = max(1, min(UNIT_IMAGES, UNIT_BYTES // image_bytes))
    units: list[Unit] = []
    first = 0

    def add(path: str, groups: Sequence[int], start: int, rows: int) -> None:
        nonlocal first
        units.append(Unit(len(units), path, tuple(groups), start, rows, first))
        first += rows

    for file in shards.files:
        together: list[int] = []
        for group, rows in enumerate(file.row_groups):
            waiting = sum(file.row_groups[g] for g in together)
            if together and waiting + rows > most:
                add(file.path, together, 0, waiting)
                together = []
            if rows > most:
                for start in range(0, rows, most):
                    add(file.path, [group], start, min(most, rows - start))
            elif rows:
                together.append(group)
        if together:
            add(file.path, together, 0, sum(file.row_groups[g] for g in together))
    return units


def reads_of(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that a task takes together: pieces of one row group, which is then read once."""
    return [list(same) for _, same in groupby(units, lambda unit: (unit.path, unit.groups))]


def decoded_units(units: Sequence[Unit], decoding: Decoding) -> Iterator[Decoded]:
    """Reads units of the same row groups and decodes their images, one unit after the other.

    Raises:
        DataError: a file is gone or cannot be read.
    """
    columns, path = decoding.columns, units[0].path
    groups = [read_group(columns, path, group) for group in units[0].groups]
    sources = [s for group in units[0].groups for s in read_sources(columns, path, group)]
    rows = [(group, row) for group in groups for row in range(len(group))]
    for unit in units:
        part = slice(unit.start, unit.start + unit.rows)
        yield _decoded(unit, rows[part], sources[part], decoding)


def _decoded(
    unit: Unit, rows: Sequence[tuple[RowGroup, int]], sources: Sequence[str], decoding: Decoding
) -> Decoded:
    size, channels = decoding.size, decoding.channels
    depth = 1 if decoding.kind == "descriptor" else channels
    images = np.empty((len(rows), size, size, depth), np.uint8)
    places: list[int] = []
    bad = []
    ids = [bytes(group.image_ids[row]).hex() for group, row in rows]
    for place, (group, row) in enumerate(rows):
        try:
            pixels = decode_image(
                group.checked(row), channels, decoding.max_pixels, decoding.columns.value_range
            )
            images[len(places)] = prepared(decoding.kind, size, pixels)
        except BadImage as error:
            why = {"reason": error.reason, "detail": error.detail}
            bad.append({"source": sources[place], "image_id": ids[place], "stage": "embed", **why})
            continue
        places.append(place)
    return Decoded(
        unit,
        images[: len(places)],
        np.asarray(places, np.int64),
        [ids[place] for place in places],
        [sources[place] for place in places],
        np.asarray([rows[p][0].labels[rows[p][1]] for p in places], np.int64),
        bad,
    )
