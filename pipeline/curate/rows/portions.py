"""Rows in portions that fit a task, and reading their vectors.

A task takes the rows of one portion: a part of a large embedding file, one file, or several small
ones. So neither a file of a million rows nor a million files of one row make a task large or many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.exact import Doubles, Halves, Ints
from pipeline.curate.rows.tables import InputFile, Vectors, ids_of, matrix, read_table
from pipeline.errors import DataError
from pipeline.uri import join, public

PORTION_BYTES = 96 * 2**20  # of the vectors of a portion, at most
PORTIONS = 32  # of small sets, so that all CPUs have work
PORTION_ROWS = 4096  # of a portion of a small set, at least
CROPS = 9  # of an image with views
OFF_UNIT = 0.02  # lengths may be that far from 1: rounding to half precision gives 0.001

Ids = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Part:
    """Rows `first` to `end` of the embedding file `name`; `whole`: it has no others."""

    name: str
    first: int
    end: int
    whole: bool


@dataclass(frozen=True)
class Portion:
    """Rows of a task."""

    name: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Rows:
    """Rows with their vectors.

    Attributes:
        row: int64 [n], ascending in each file.
        ids: uint8 [n, 16].
        vectors: half precision [n, d], unit length.
        crops: half precision [n, 9, d], or None.
    """

    row: Ints
    ids: Ids
    vectors: Halves
    crops: Halves | None

    def __len__(self) -> int:
        return len(self.row)

    def only(self, chosen: np.ndarray[Any, Any]) -> Rows:
        """Some of the rows, by mask or place."""
        crops = None if self.crops is None else self.crops[chosen]
        return Rows(self.row[chosen], self.ids[chosen], self.vectors[chosen], crops)


def portions(
    files: Iterable[InputFile], vectors: Vectors, rows: int | None = None
) -> list[Portion]:
    """The portions of embedded files, in the order of their rows.

    Args:
        files: the inputs that the vectors are of.
        vectors: of them.
        rows: most in a portion; default: by the bytes of their vectors and by all rows.
    """
    each = vectors.dim * 2 * (2 * (CROPS + 1) if vectors.views else 1)
    files, names = list(files), set(vectors.names)
    even = max(PORTION_ROWS, sum(file.rows for file in files) // PORTIONS)
    most = rows or max(1, PORTION_BYTES // each)
    even = min(most, even)
    found: list[list[Part]] = []
    room = 0
    for file in files:
        if file.name not in names:
            continue
        for begin in range(0, file.rows, most):
            end = min(file.rows, begin + most)
            part = Part(file.name, file.first + begin, file.first + end, file.rows <= most)
            # Parts of a file cost a reading of the file each, so only what is too large is cut.
            if end - begin > room:
                found.append([])
                room = rows or even
            found[-1].append(part)
            room -= end - begin
    return [Portion(f"{number:05d}", tuple(parts)) for number, parts in enumerate(found)]


def read_rows(vectors: Vectors, portion: Portion, exact: str = "", views: bool = False) -> Rows:
    """Rows of a portion that were not left out before, with their vectors.

    Vectors of zeros have no direction and are like nothing: they are left out too.

    Args:
        vectors: where they are.
        portion: which rows.
        exact: folder of `tables.EXACT`: only rows that are their own keeper; empty: all.
        views: with the crops, where there are any.

    Raises:
        DataError: a file is damaged or holds vectors that are not of unit length; names it.
    """
    crops = views and vectors.views
    columns = ["row", "image_id", vectors.column, *["views"] * crops]
    found = []
    for part in portion.parts:
        table = read_table(vectors.folder, part.name, columns, filters=_filter(part))
        row = table.column("row").to_numpy()
        full = matrix(table.column(vectors.column), vectors.dim)
        keep = np.ones(len(row), bool)
        if exact:
            own = read_table(exact, part.name, ["row", "keeper"], filters=_filter(part))
            of, keeper = own.column("row").to_numpy(), own.column("keeper").to_numpy()
            keep = np.isin(row, of[of == keeper])
        wide = full.astype(np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        bad = keep & ~((length == 0) | (np.abs(length - 1) < OFF_UNIT))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{public(str(join(vectors.folder, part.name)))}.parquet: the vector of row "
                f"{row[first]} has length {length[first]:.3g} instead of 1",
                "the embedder gave values that are no numbers, or the file is not one of ours",
            )
        keep &= length > 0
        rows = Rows(row, ids_of(table.column("image_id")), full, _crops(table, vectors, crops))
        found.append(rows if keep.all() else rows.only(keep))
    if len(found) == 1:
        return found[0]
    return Rows(
        np.concatenate([f.row for f in found]),
        np.concatenate([f.ids for f in found]),
        np.concatenate([f.vectors for f in found]),
        np.concatenate([f.crops for f in found if f.crops is not None]) if crops else None,
    )


def _crops(table: pa.Table, vectors: Vectors, crops: bool) -> Halves | None:
    if not crops:
        return None
    return matrix(table.column("views"), CROPS * vectors.dim).reshape(-1, CROPS, vectors.dim)


def _filter(part: Part) -> Any:
    return None if part.whole else [("row", ">=", part.first), ("row", "<", part.end)]


def read_range(
    folder: str, names: Sequence[str], first: int, end: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Rows `first` to `end` of each table of a folder whose rows ascend."""
    for name in names:
        table = read_table(folder, name, columns, [("row", ">=", first), ("row", "<", end)])
        if len(table):
            yield table


def big_endian(ids: Ids) -> tuple[Any, Any]:
    """Ids as two columns of numbers that are ordered as the ids are."""
    halves = np.ascontiguousarray(ids).view(">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def order_by_id(ids: Ids, row: Ints) -> Ints:
    """Places in the order of the ids; of equal ids the smaller row is first."""
    high, low = big_endian(ids)
    return np.lexsort((row, low, high))


def self_dots(vectors: Halves) -> Doubles:
    """Exact dot product of each vector with itself, [n]."""
    found = np.empty(len(vectors))
    for begin in range(0, len(vectors), 8192):
        wide = vectors[begin : begin + 8192].astype(np.float64)
        found[begin : begin + 8192] = np.einsum("nd,nd->n", wide, wide)
    return found
