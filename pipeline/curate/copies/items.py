"""What a join reads: vectors in the buckets of their cells.

An item is a vector that is compared: the vector of a row (view 0), or for images with views its
mirrored vector, a crop or a mirrored crop. A row is a member of the cell that is nearest to its
vector, and all items visit the nearest cells. An item is written once for each bucket that has one
of its cells. Bucket b of the join is 2 b (members) and 2 b + 1 (visitors) in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cells import Cells
from pipeline.curate.copies.collapse import Distinct
from pipeline.curate.rows.bucketed import raw, read_bucket, shelves_of, unraw, write_buckets
from pipeline.curate.rows.exact import Floats, Halves, Ints
from pipeline.curate.rows.read_rows import Ids, Portion, Rows, portions
from pipeline.curate.rows.tables import Inputs, Vectors, id_array, ids_of

Array = np.ndarray[Any, Any]
# visiting(full [n, d], crops [n, 9, d]) -> (further items [n, v, d], which are of crops bool [v])
Visiting = Callable[[Halves, Halves], tuple[Halves, Array]]


@dataclass(frozen=True)
class ImageSet:
    """Images that are compared, with each other or with those of another set.

    Attributes:
        inputs: their files.
        vectors: of them.
        exact: folder of `tables.EXACT` and key of its step: rows with another keeper are left out;
            empty: all rows count.
        visiting: further items of an image with views (`descriptor.visiting`); needed where
            `vectors.views`.
    """

    inputs: Inputs
    vectors: Vectors
    exact: tuple[str, str] = ("", "")
    visiting: Visiting | None = None

    def portions(self, rows: int | None) -> list[Portion]:
        """What its tasks read, at most so many rows each."""
        return portions(self.inputs.files, self.vectors, rows)

    def distinct(self, copies: tuple[str, Sequence[str]] = ("", ())) -> Distinct:
        """The rows that count, without `copies`."""
        return Distinct(self.vectors, self.exact[0], copies)


def visiting_of(rows: Rows, visiting: Visiting | None) -> tuple[Halves, Array]:
    """The items of rows, their own vectors first: [n, v, d], and which of the v are of crops."""
    own = rows.vectors[:, None]
    if rows.crops is None or visiting is None:
        return own, np.zeros(1, bool)
    items, crops = visiting(rows.vectors, rows.crops)
    return np.concatenate([own, items], axis=1), np.append(False, crops)


@dataclass(frozen=True)
class Items:
    """Items of a bucket.

    Attributes:
        row: int64 [n].
        ids: uint8 [n, 16].
        view: uint8 [n]; 0: the row's own vector.
        cells: int32 [n, p]; -1 where the cell is in another bucket.
        member: bool [n]: its first cell is the one that it is a member of.
        vectors: single precision [n, d].
    """

    row: Ints
    ids: Ids
    view: np.ndarray[Any, np.dtype[np.uint8]]
    cells: np.ndarray[Any, np.dtype[np.int32]]
    member: np.ndarray[Any, np.dtype[np.bool_]]
    vectors: Floats

    def __len__(self) -> int:
        return len(self.row)

    def members(self) -> tuple[Ints, Array]:
        """Items and the cells that they are members of."""
        item = np.flatnonzero(self.member)
        return item, self.cells[item, 0]

    def visits(self, home: bool) -> tuple[Ints, Array]:
        """Items and cells that they visit; `home`: with those that they are members of."""
        visited = self.cells >= 0
        if not home:
            visited[self.member, 0] = False
        item, column = np.nonzero(visited)
        return item, self.cells[item, column]


def file_bucket(bucket: Any, visitor: Any) -> Any:
    """Which bucket of the files has the members (visitor 0) or visitors (1) of a bucket."""
    return 2 * bucket + visitor


def by_bucket(table: pa.Table, number: Array) -> Iterator[tuple[int, list[tuple[bool, pa.Table]]]]:
    """Each bucket with its members and visitors, of a table as `place` gives it."""
    for bucket in np.unique(number // 2).tolist():
        yield (
            bucket,
            [
                (not visitor, table.filter(pa.array(number == file_bucket(bucket, visitor))))
                for visitor in (0, 1)
            ],
        )


def shuffle_task(
    folder: str,
    distinct: Distinct,
    portion: Portion,
    cells_folder: str,
    probes: int,
    visiting: Visiting | None,
) -> dict[str, Any]:
    """Writes the items of a portion to the buckets of their cells."""
    rows = distinct.read(portion, views=True)
    cells = Cells.load(cells_folder, distinct.vectors.dim)
    table, bucket, items = place(rows, cells, probes, visiting)
    size = write_buckets(folder, portion.name, table, bucket)
    return {"rows": len(rows), "items": items, "bytes": size, "shelves": shelves_of(bucket)}


def place(
    rows: Rows, cells: Cells, probes: int, visiting: Visiting | None
) -> tuple[pa.Table, Array, int]:
    """The items of rows as a table ordered by `file_bucket`, these, and the number of items."""
    every, _ = visiting_of(rows, visiting)
    n, views, dim = every.shape
    flat = every.reshape(-1, dim)
    near = cells.nearest(flat, probes)
    bucket_of = np.append(cells.bucket, -1)  # for cell -1
    bucket = bucket_of[near]
    item, places, number = [], [], []
    for column in range(probes):
        # An item goes to a bucket at the first of its cells there.
        new = bucket[:, column] >= 0
        for earlier in range(column):
            new &= bucket[:, earlier] != bucket[:, column]
        mine = np.flatnonzero(new)
        here = np.where(bucket[mine] == bucket[mine, column, None], near[mine], -1)
        visitor = np.full(len(mine), 1) if column else (mine % views != 0).astype(np.int64)
        item.append(mine)
        places.append(here)
        number.append(file_bucket(bucket[mine, column].astype(np.int64), visitor))
    items, bucket_number = np.concatenate(item), np.concatenate(number)
    order = np.lexsort((items, bucket_number))
    items = items[order]
    row, view = np.divmod(items, views)
    table = pa.table(
        {
            "row": rows.row[row],
            "image_id": id_array(rows.ids[row]),
            "view": view.astype(np.uint8),
            "cells": raw(np.concatenate(places)[order]),
            "vector": raw(flat[items]),
        }
    )
    return table, bucket_number[order], n * views


def read_items(
    folder: str,
    names: Sequence[tuple[str, Sequence[int]]],
    bucket: int,
    dim: int,
    probes: int,
    keep: Callable[[Ints], Array] | None = None,
) -> Items:
    """The items of a bucket.

    Args:
        folder: of the shuffle.
        names: of the tasks that wrote, with their shelves.
        bucket: which.
        dim: of a vector.
        probes: cells of an item.
        keep: which rows are read, as mask; default: all.

    Raises:
        DataError: a file is damaged or missing; names it.
    """
    tables: list[tuple[bool, pa.Table]] = []
    for visitor in (0, 1):
        for table in read_bucket(folder, names, file_bucket(bucket, visitor)):
            if keep is not None:
                table = table.filter(pa.array(keep(table.column("row").to_numpy())))
            tables.append((not visitor, table))
    return items_of(tables, dim, probes)


def items_of(tables: list[tuple[bool, pa.Table]], dim: int, probes: int) -> Items:
    """Items of tables, each of members or of visitors; the list is emptied on the way."""
    total = sum(len(table) for _, table in tables)
    vectors = np.empty((total, dim), np.float32)
    small: list[list[Array]] = [[] for _ in range(5)]
    begin = 0
    tables.reverse()
    while tables:  # freed one by one: vectors become twice as wide
        member, table = tables.pop()
        vectors[begin : begin + len(table)] = unraw(table.column("vector"), np.float16, dim)
        begin += len(table)
        columns = (
            table.column("row").to_numpy(),
            np.array(ids_of(table.column("image_id"))),
            table.column("view").to_numpy(),
            np.array(unraw(table.column("cells"), np.int32, probes)),
            np.full(len(table), member),
        )
        for values, column in zip(small, columns, strict=True):
            values.append(np.array(column))
    empty: list[Array] = [
        np.zeros(0, np.int64),
        np.zeros((0, 16), np.uint8),
        np.zeros(0, np.uint8),
        np.zeros((0, probes), np.int32),
        np.zeros(0, bool),
    ]
    row, ids, view, cells, is_member = (
        np.concatenate(values or [none]) for values, none in zip(small, empty, strict=True)
    )
    return Items(row, ids, view, cells, is_member, vectors)


@dataclass(frozen=True)
class Shuffled:
    """Items in buckets on storage.

    Attributes:
        folder: of the shuffle.
        names: of the tasks that wrote, with their shelves.
        dim: of a vector.
        probes: cells of an item.
        crops: which views are of crops.
    """

    folder: str
    names: tuple[tuple[str, tuple[int, ...]], ...]
    dim: int
    probes: int
    crops: tuple[bool, ...]

    def read(self, bucket: int, keep: Callable[[Ints], Array] | None = None) -> Items:
        """The items of a bucket; `keep` says which rows."""
        return read_items(self.folder, self.names, bucket, self.dim, self.probes, keep)


def by_cell(item: Ints, cell: Array) -> Iterator[tuple[int, Ints]]:
    """Each cell with its items, in the order of the cells."""
    if not len(item):
        return
    order = np.argsort(cell, kind="stable")
    cells, starts = np.unique(cell[order], return_index=True)
    for number, items in zip(cells, np.split(item[order], starts[1:]), strict=True):
        yield int(number), items
