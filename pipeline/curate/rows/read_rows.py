"""Reading rows with their vectors, and how they are cut into tasks.

Copies are looked for in portions: a task takes a part of a large embedding file, one file, or
several small ones. So neither a file of a million rows nor a million files of one row make a task
large or many. What chooses images (`choose`) works on a `RowSet`: whole files, without the rows
that earlier steps left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pipeline.curate.rows.exact import Doubles, Halves, Ints
from pipeline.curate.rows.tables import HALF, InputFile, Vectors, ids_of, matrix, read_table
from pipeline.errors import DataError
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import join, public

PORTION_BYTES = 96 * 2**20  # of the vectors of a portion, at most
PORTIONS = 32  # of small sets, so that all CPUs have work
PORTION_ROWS = 4096  # of a portion of a small set, at least
CROPS = 9  # of an image with views
FILE_GROUPS = 256  # tasks that write tables by input file, at least where there are as many files
FILE_GROUP_ROWS = 4_000_000  # of the files of such a task
OFF_UNIT = 0.02  # lengths may be that far from 1: rounding to half precision gives 0.001

Array = np.ndarray[Any, Any]
Ids = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class FileSlice:
    """Rows `first` to `end` of the embedding file `name`; `whole`: it has no others."""

    name: str
    first: int
    end: int
    whole: bool

    @property
    def filter(self) -> Any:
        """For `read_table`."""
        return None if self.whole else [("row", ">=", self.first), ("row", "<", self.end)]


@dataclass(frozen=True)
class Portion:
    """Rows of a task, from one or several files."""

    name: str
    slices: tuple[FileSlice, ...]

    @property
    def span(self) -> tuple[int, int]:
        """The first row and the one after the last."""
        return self.slices[0].first, self.slices[-1].end


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
) -> dict[str, Portion]:
    """The portions of embedded files by name, in the order of their rows.

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
    groups: list[list[FileSlice]] = []
    room = 0
    for file in files:
        if file.name not in names:
            continue
        for begin in range(0, file.rows, most):
            end = min(file.rows, begin + most)
            cut = FileSlice(file.name, file.first + begin, file.first + end, file.rows <= most)
            # Slices of a file cost a reading of it each, so only what is too large is cut.
            if end - begin > room:
                groups.append([])
                room = rows or even
            groups[-1].append(cut)
            room -= end - begin
    named = [Portion(f"{number:05d}", tuple(slices)) for number, slices in enumerate(groups)]
    return {portion.name: portion for portion in named}


def file_groups(files: Sequence[InputFile]) -> dict[str, tuple[InputFile, ...]]:
    """Neighbouring input files in groups for a task each, called after their first file."""
    rows = files[-1].end - files[0].first if files else 0
    count = min(len(files), max(FILE_GROUPS, -(-rows // FILE_GROUP_ROWS)))
    bounds = [len(files) * i // count for i in range(count + 1)] if count else []
    return {files[a].name: tuple(files[a:b]) for a, b in pairwise(bounds) if b > a}


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
    read = []
    for cut in portion.slices:
        table = read_table(vectors.folder, cut.name, columns, cut.filter)
        row = table.column("row").to_numpy()
        full = matrix(table.column(vectors.column), vectors.dim)
        keep = np.ones(len(row), bool)
        if exact:
            keep = np.isin(row, own_rows(exact, cut.name, cut.filter))
        wide = full.astype(np.float32)
        length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        bad = keep & ~((length == 0) | (np.abs(length - 1) < OFF_UNIT))
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{public(str(join(vectors.folder, cut.name)))}.parquet: the vector of row "
                f"{row[first]} has length {length[first]:.3g} instead of 1",
                "the embedder gave values that are no numbers, or the file is not one of ours",
            )
        views_of = matrix(table["views"], CROPS * vectors.dim) if crops else None
        of_slice = Rows(
            row,
            ids_of(table.column("image_id")),
            full,
            None if views_of is None else views_of.reshape(-1, CROPS, vectors.dim),
        )
        keep &= length > 0
        read.append(of_slice if keep.all() else of_slice.only(keep))
    if len(read) == 1:
        return read[0]
    return Rows(
        np.concatenate([rows.row for rows in read]),
        np.concatenate([rows.ids for rows in read]),
        np.concatenate([rows.vectors for rows in read]),
        np.concatenate([rows.crops for rows in read if rows.crops is not None]) if crops else None,
    )


def own_rows(exact: str, name: str, filters: Any = None) -> Array:
    """Rows of a file that are kept of their group of equals, int64, ascending.

    Args:
        exact: folder of `tables.EXACT`.
        name: of the file.
        filters: for `read_table`.
    """
    table = read_table(exact, name, ["row", "keeper"], filters)
    row, keeper = table.column("row").to_numpy(), table.column("keeper").to_numpy()
    return np.asarray(row[row == keeper], np.int64)


def self_dots(vectors: Halves) -> Doubles:
    """Exact dot product of each vector with itself, [n]."""
    products = np.empty(len(vectors))
    for begin in range(0, len(vectors), 8192):
        wide = vectors[begin : begin + 8192].astype(np.float64)
        products[begin : begin + 8192] = np.einsum("nd,nd->n", wide, wide)
    return products


# ---- Whole files, without the rows that earlier steps left out.


class Points(NamedTuple):
    """Rows in memory: int64 [n], ids uint8 [n, 16], vectors [n, d]."""

    rows: Array
    ids: Array
    vectors: Halves


@dataclass(frozen=True)
class Source:
    """Where a task reads rows from; small however many files there are.

    Attributes:
        folder: of the vectors.
        kept: folder of `NNNNN.parquet` with the column `row`: the rows that count; "" for all.
        dim: width of a vector.
        column: that holds the vectors.
    """

    folder: str
    kept: str
    dim: int
    column: str

    def read(self, name: str) -> Points:
        """The rows of a file, in its order."""
        table = read_table(self.folder, name, ["row", "image_id", self.column])
        rows = np.asarray(table["row"].to_numpy(), np.int64)
        ids, vectors = ids_of(table["image_id"]), matrix(table[self.column], self.dim)
        if not self.kept:
            return Points(rows, ids, vectors)
        mask = np.isin(rows, kept_rows(self.kept, name), assume_unique=True)
        return Points(rows[mask], ids[mask], vectors[mask])

    def ids(self, names: Sequence[str]) -> Array:
        """Ids of the rows of several files, uint8 [n, 16]; vectors are not read without need."""
        if self.kept:
            return self.read_all(names).ids
        tables = [read_table(self.folder, name, ["image_id"]) for name in names]
        return np.concatenate([ids_of(table["image_id"]) for table in tables])

    def read_all(self, names: Sequence[str]) -> Points:
        """The rows of several files."""
        files = [self.read(name) for name in names]
        if not files:
            empty = np.zeros(0, np.int64)
            return Points(empty, np.zeros((0, 16), np.uint8), np.zeros((0, self.dim), HALF))
        return Points(*(np.concatenate(columns) for columns in zip(*files, strict=True)))


@dataclass(frozen=True)
class RowSet:
    """The rows that a step works on.

    Attributes:
        source: where they are read from.
        names: of the files.
        counts: rows of each file that count.
        key: changes when any of the rows may have changed.
    """

    source: Source
    names: tuple[str, ...]
    counts: tuple[int, ...]
    key: str

    @classmethod
    def of(
        cls, vectors: Vectors, counts: Sequence[int], kept: str = "", kept_key: str = ""
    ) -> RowSet:
        """The rows of `vectors` that are in the files of `kept`.

        Args:
            vectors: with one file per input file.
            counts: rows of each file that count; the accounts of the step that wrote `kept` or,
                without it, the vectors have them.
            kept: folder of `NNNNN.parquet` with a column `row`; "" for all rows.
            kept_key: of the step that wrote `kept`.
        """
        if len(counts) != len(vectors.names):
            raise DataError(
                f"{len(counts)} counts of rows for {len(vectors.names)} files of vectors",
                "this is a bug: the steps were run on other inputs",
            )
        source = Source(vectors.folder, kept, vectors.dim, vectors.column)
        key = fingerprint([vectors.key, vectors.column, list(vectors.names), kept_key])
        return cls(source, vectors.names, tuple(int(n) for n in counts), key)

    @property
    def rows(self) -> int:
        """How many in all."""
        return sum(self.counts)

    def within(self, kept: str, kept_key: str, counts: Sequence[int]) -> RowSet:
        """Fewer of the same rows: those in the files of `kept`, which must be among these."""
        source = Source(self.source.folder, kept, self.source.dim, self.source.column)
        key = fingerprint([self.key, kept_key])
        return RowSet(source, self.names, tuple(int(n) for n in counts), key)

    def groups(self, at_least: int) -> list[tuple[str, ...]]:
        """Neighbouring files together, each group but the last with so many rows."""
        groups: list[tuple[str, ...]] = []
        group: list[str] = []
        rows = 0
        for name, count in zip(self.names, self.counts, strict=True):
            group.append(name)
            rows += count
            if rows >= at_least:
                groups.append(tuple(group))
                group, rows = [], 0
        return [*groups, tuple(group)] if group else groups


def kept_rows(folder: str, name: str) -> Array:
    """The rows of an input file that a step kept, int64."""
    return np.asarray(read_table(folder, name, ["row"])["row"].to_numpy(), np.int64)
