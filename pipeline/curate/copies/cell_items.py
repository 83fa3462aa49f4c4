"""What a join reads: vectors in the buckets of their cells.

An item is a vector that is compared: the vector of a row (view 0), or for images with views its
mirrored vector, a crop or a mirrored crop. A row is a member of the cell that is nearest to its
vector, and all items visit the nearest cells. An item is written once for each bucket that has one
of its cells, to the members or the visitors of that bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cells import Cells
from pipeline.curate.copies.equal_vectors import Distinct
from pipeline.curate.rows.bucketed import raw, unraw
from pipeline.curate.rows.exact import Floats, Halves, Ints
from pipeline.curate.rows.read_rows import CROPS, Ids, Portion, Rows, portions
from pipeline.curate.rows.tables import Inputs, Vectors, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step

MEMBERS, VISITORS = "members", "visitors"
Array = np.ndarray[Any, Any]
# visiting(full [n, d], crops [n, 9, d]) -> (further items [n, v, d], which are of crops bool [v])
Visiting = Callable[[Halves, Halves], tuple[Halves, Array]]


@dataclass(frozen=True)
class ImageSet:
    """Images that are compared, with each other or with those of another set.

    Attributes:
        inputs: their files.
        vectors: of them.
        exact: with `tables.EXACT`: rows with another keeper are left out; None: all rows count.
        visiting: further items of an image with views (`descriptor.visiting`); needed where
            `vectors.views`.
    """

    inputs: Inputs
    vectors: Vectors
    exact: Step | None = None
    visiting: Visiting | None = None

    def portions(self, rows: int | None) -> dict[str, Portion]:
        """What its tasks read, at most so many rows each."""
        return portions(self.inputs.files, self.vectors, rows)

    def distinct(self, equal: Step | None = None) -> Distinct:
        """The rows that count, without those that another one stands for."""
        return Distinct(self.vectors, self.exact, equal)

    @property
    def crops(self) -> tuple[bool, ...]:
        """Which items of an image are of crops."""
        vectors = self.vectors
        assert self.visiting is not None or not vectors.views, (
            "views need a function that makes them"
        )
        none = np.zeros((0, CROPS, vectors.dim), np.float16) if vectors.views else None
        ids, wholes = np.zeros((0, 16), np.uint8), np.zeros((0, vectors.dim), np.float16)
        _, crops = visiting_of(Rows(np.zeros(0, np.int64), ids, wholes, none), self.visiting)
        return tuple(bool(crop) for crop in crops)


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


def write_items(
    out: Output,
    portion: Portion,
    distinct: Distinct,
    cells: Step,
    probes: int,
    visiting: Visiting | None,
) -> Account:
    """Task: the items of a portion, in the buckets of their cells."""
    rows = distinct.read(portion, views=True)
    placed = place(rows, Cells.load(cells, distinct.vectors.dim), probes, visiting)
    out.buckets(placed.table, placed.bucket, sub=MEMBERS, only=~placed.visitor)
    out.buckets(placed.table, placed.bucket, sub=VISITORS, only=placed.visitor)
    return {"rows": len(rows), "items": placed.items}


class Placed(NamedTuple):
    """Items as they are written: once for each bucket that has one of their cells.

    Attributes:
        table: `row`, `image_id`, `view`, `cells`, `vector`, in the order of the items.
        bucket: int64 [n].
        visitor: bool [n]; else it is a member of its first cell.
        items: how many different ones there are.
    """

    table: pa.Table
    bucket: Array
    visitor: Array
    items: int


def place(rows: Rows, cells: Cells, probes: int, visiting: Visiting | None) -> Placed:
    """The items of rows with their buckets."""
    every, _ = visiting_of(rows, visiting)
    n, views, dim = every.shape
    flat = every.reshape(-1, dim)
    near = cells.nearest(flat, probes)
    bucket_of = np.append(cells.bucket, -1)  # for cell -1
    bucket = bucket_of[near]
    item, places, numbers, visits = [], [], [], []
    for column in range(probes):
        # An item goes to a bucket at the first of its cells there.
        new = bucket[:, column] >= 0
        for earlier in range(column):
            new &= bucket[:, earlier] != bucket[:, column]
        mine = np.flatnonzero(new)
        item.append(mine)
        places.append(np.where(bucket[mine] == bucket[mine, column, None], near[mine], -1))
        numbers.append(bucket[mine, column].astype(np.int64))
        visits.append(np.full(len(mine), True) if column else mine % views != 0)
    items = np.concatenate(item)
    order = np.argsort(items, kind="stable")
    row, view = np.divmod(items[order], views)
    table = pa.table(
        {
            "row": rows.row[row],
            "image_id": id_array(rows.ids[row]),
            "view": view.astype(np.uint8),
            "cells": raw(np.concatenate(places)[order]),
            "vector": raw(flat[items[order]]),
        }
    )
    return Placed(table, np.concatenate(numbers)[order], np.concatenate(visits)[order], n * views)


def items_of(tables: list[tuple[bool, pa.Table]], dim: int, probes: int) -> Items:
    """Items of tables, each of members or of visitors; the list is emptied on the way."""
    total = sum(len(table) for _, table in tables)
    vectors = np.empty((total, dim), np.float32)
    columns: list[list[Array]] = [
        [np.zeros(0, np.int64)],
        [np.zeros((0, 16), np.uint8)],
        [np.zeros(0, np.uint8)],
        [np.zeros((0, probes), np.int32)],
        [np.zeros(0, bool)],
    ]
    begin = 0
    tables.reverse()
    while tables:  # freed one by one: vectors become twice as wide
        member, table = tables.pop()
        vectors[begin : begin + len(table)] = unraw(table["vector"], np.float16, dim)
        begin += len(table)
        values = (
            table["row"].to_numpy(),
            ids_of(table["image_id"]),
            table["view"].to_numpy(),
            unraw(table["cells"], np.int32, probes),
            np.full(len(table), member),
        )
        for column, value in zip(columns, values, strict=True):
            column.append(np.array(value))
    row, ids, view, cells, is_member = (np.concatenate(column) for column in columns)
    return Items(row, ids, view, cells, is_member, vectors)


@dataclass(frozen=True)
class StoredItems:
    """Items in buckets on storage.

    Attributes:
        step: of `write_items`.
        dim: of a vector.
        probes: cells of an item.
        crops: which views are of crops.
    """

    step: Step
    dim: int
    probes: int
    crops: tuple[bool, ...]

    def read(self, bucket: int, keep: Callable[[Ints], Array] | None = None) -> Items:
        """The items of a bucket; `keep` says which rows.

        Raises:
            DataError: a file is damaged or missing; names it.
        """
        tables: list[tuple[bool, pa.Table]] = []
        for sub in (MEMBERS, VISITORS):
            for table in self.step.buckets(bucket, sub=sub):
                if keep is not None:
                    table = table.filter(pa.array(keep(table["row"].to_numpy())))
                tables.append((sub == MEMBERS, table))
        return items_of(tables, self.dim, self.probes)


def by_cell(item: Ints, cell: Array) -> Iterator[tuple[int, Ints]]:
    """Each cell with its items, in the order of the cells."""
    if not len(item):
        return
    order = np.argsort(cell, kind="stable")
    cells, starts = np.unique(cell[order], return_index=True)
    for number, items in zip(cells, np.split(item[order], starts[1:]), strict=True):
        yield int(number), items
