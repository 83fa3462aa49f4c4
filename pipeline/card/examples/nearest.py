"""The nearest images of a few, read from the tables of vectors block by block.

Shapes: q images that are asked, n images of the reference, k neighbours, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.embed.vectors import VectorSet
from pipeline.search.exact import Doubles, Floats, Ints, Nearest

ROWS = 32_768  # of a block of vectors
FIRST = 65_536  # rows that images are picked from


@dataclass(frozen=True)
class Row:
    """A row of a table: id, where it is from, and its class (-1: unknown)."""

    image_id: str
    source: str
    label: int


@dataclass(frozen=True)
class Answered:
    """An image that was asked, with its nearest rows and their cosines, the nearest first."""

    query: Row
    rows: tuple[Row, ...]
    cosines: tuple[float, ...]


def nearest_of(
    reference: VectorSet, queries: VectorSet | None, count: int, k: int, output: str = "cls"
) -> list[Answered]:
    """The k nearest rows by the cosine, of a few images: with labels one of each of as many
    classes, else at even steps. An image is no neighbour of itself.

    Args:
        reference: the table that is searched.
        queries: the table that images are picked from; None: the reference.
        count: images that are asked.
        k: neighbours of each.
        output: column of the vectors.
    """
    table = queries or reference
    size = min(FIRST, table.rows)
    labels = table.labels()[:size]
    picks = picked(labels, count)
    if not len(picks):
        return []
    asked = _single(table.read(output, slice(0, size))[picks])
    ids = table.ids()[picks]
    rows, cosines = search(reference, asked, ids.tolist(), k, output)
    known = reference.columns("image_id", "source", "label")
    own = table.columns("image_id", "source", "label") if queries else known
    return [
        Answered(
            _row(own, int(pick)),
            tuple(_row(known, int(one)) for one in numbers if one >= 0),
            tuple(float(one) for one, row in zip(values, numbers, strict=True) if row >= 0),
        )
        for pick, numbers, values in zip(picks, rows, cosines, strict=True)
    ]


def picked(labels: Ints, count: int) -> Ints:
    """Rows to ask: the first of each of `count` classes, at even steps through the classes; then
    further ones where there are fewer classes. Tables are in the order of a hash, so the first
    rows are as good as drawn.
    """
    count = min(count, len(labels))
    known = np.unique(labels[labels >= 0])
    if len(known) < 2:
        return np.unique(((2 * np.arange(count) + 1) * len(labels)) // max(1, 2 * count))
    order: list[int] = []
    turns = -(-count // len(known))
    steps = (np.arange(min(count, len(known))) * len(known)) // min(count, len(known))
    for turn in range(turns):
        for one in known[steps]:
            rows = np.flatnonzero(labels == one)
            if turn < len(rows):
                order.append(int(rows[turn]))
    return np.array(order[:count], np.int64)


def search(
    reference: VectorSet, asked: Floats, ids: Sequence[str], k: int, output: str = "cls"
) -> tuple[Ints, Doubles]:
    """Rows [q, k] of the reference nearest to vectors [q, D], and cosines; -1 where there are
    fewer. Rows with the id of who asks are left out; of equal ones the first row comes first.
    """
    nearest = Nearest(asked, k + 1)  # who asks may be among them, once
    own = np.full((len(asked), 1), -1, np.int64)
    first = 0
    for vectors, block_ids in reference.blocks(ROWS, output):
        nearest.see(_single(vectors), first)
        who, where = np.nonzero(np.asarray(ids)[:, None] == block_ids[None])
        own[who, 0] = first + where
        first += len(vectors)
    others = np.argsort((nearest.rows == own) & (own >= 0), 1, kind="stable")[:, :k]
    rows = np.take_along_axis(nearest.rows, others, 1)
    return rows, np.take_along_axis(nearest.similarity, others, 1)


def _single(vectors: Any) -> Floats:
    return np.ascontiguousarray(vectors, np.float32).reshape(len(vectors), -1)


def _row(table: Any, number: int) -> Row:
    label = table["label"][number].as_py()
    return Row(
        str(table["image_id"][number].as_py()),
        str(table["source"][number].as_py()),
        -1 if label is None else int(label),
    )
