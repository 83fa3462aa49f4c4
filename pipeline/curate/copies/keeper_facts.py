"""What the choice of keepers needs of each row, from all tables to the tasks of its component."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.copies.equal_vectors import Distinct
from pipeline.curate.copies.forest import LABELS, shard_of
from pipeline.curate.rows.bucketed import raw, unraw
from pipeline.curate.rows.exact import Ints
from pipeline.curate.rows.read_rows import CROPS, FileSlice, Portion, Rows, read_rows
from pipeline.curate.rows.tables import ID, ROW, Vectors, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step

Array = np.ndarray[Any, Any]
FACTS = pa.schema(
    [
        ("row", ROW),
        ("label", ROW),  # of its component
        ("image_id", ID),
        ("as_is", pa.bool_()),
        ("area", pa.int64()),  # pixels
        ("density", pa.float64()),  # bytes for each pixel
        ("goes", pa.bool_()),  # in any case
        ("stands", ROW),  # the row whose vector counts: itself, or one with the same
    ]
)
SHARD_BYTES = 2**27  # of the vectors that a task takes
IN_MEMORY = 2**29  # bytes of the vectors that a task holds; twice while they are read


def shards_for(rows: int, vectors: Vectors) -> int:
    """Tasks that choose keepers, for so many rows with copies."""
    each = vectors.dim * 2 * (1 + CROPS * vectors.views) + 100
    return max(1, -(-rows * each // SHARD_BYTES))


@dataclass(frozen=True)
class FactSources:
    """Where the facts about rows are read from.

    Attributes:
        distinct: the rows and their vectors.
        labels: with `forest.LABELS`.
        prints: fingerprints.
        going: with the `row` of images that go in any case.
    """

    distinct: Distinct
    labels: Step
    prints: Step
    going: tuple[Step, ...] = ()


def gather_facts(
    out: Output, portion: Portion, sources: FactSources, as_is: Sequence[str], shards: int
) -> Account:
    """Task: the facts about a portion's rows (`rows`), and the vectors of those that stand for
    themselves (`vectors`), both by the shard of their component.

    `as_is` has the names of the files of sets that are kept as they are; few, while a table of all
    files would be read from its pickle by each task.
    """
    equal = sources.distinct.stood_for(portion)
    facts = [_facts(sources, cut, cut.name in as_is, equal) for cut in portion.slices]
    facts = [table for table in facts if len(table)]
    if not facts:
        return {"rows": 0}
    whole = pa.concat_tables(facts).combine_chunks()
    row, label = whole["row"].to_numpy(), whole["label"].to_numpy()
    out.buckets(whole, shard_of(label, shards), sub="rows")
    own = whole["stands"].to_numpy() == row
    rows = read_rows(sources.distinct.vectors, portion, views=True)
    rows = rows.only(np.isin(rows.row, row[own]))
    vectors = {"row": rows.row, "vector": raw(rows.vectors)}
    if rows.crops is not None:
        vectors["crops"] = raw(rows.crops.reshape(len(rows), -1))
    labels = label[own][np.searchsorted(row[own], rows.row)]  # rows ascend
    out.buckets(pa.table(vectors), shard_of(labels, shards), sub="vectors")
    return {"rows": len(whole)}


def _facts(sources: FactSources, cut: FileSlice, as_is: bool, equal: pa.Table) -> pa.Table:
    """Of the rows of a slice of a file that are in a component, as `FACTS`."""
    own = sources.labels.rows(cut.first, cut.end, LABELS)
    if not len(own):
        return FACTS.empty_table()
    row, label = (own[name].to_numpy() for name in LABELS.names)
    columns = ["row", "image_id", "bytes", "width", "height"]
    inside = [("row", ">=", cut.first), ("row", "<", cut.end)]
    prints = sources.prints.read(cut.name, columns, inside)
    at = np.searchsorted(prints["row"].to_numpy(), row)
    area = prints["width"].to_numpy().astype(np.int64) * prints["height"].to_numpy()
    density = prints["bytes"].to_numpy() / np.maximum(area, 1)
    goes = np.zeros(len(row), bool)
    for step in sources.going:
        goes |= np.isin(row, step.read(cut.name, ["row"], inside)["row"].to_numpy())
    facts = [
        row,
        label,
        id_array(ids_of(prints["image_id"])[at]),
        np.full(len(row), as_is),
        area[at],
        density[at],
        goes,
        _stands(row, equal),
    ]
    return pa.table(facts, schema=FACTS)


def _stands(row: Array, equal: pa.Table) -> Array:
    """The row that stands for each of these: itself, or another one with the same vector."""
    at = pc.index_in(pa.array(row), equal["row"].combine_chunks())
    return np.asarray(pc.coalesce(equal["stands"].take(at), pa.array(row)).to_numpy())


def read_facts(facts: Step, shard: int) -> dict[str, Array]:
    """The facts about the rows of a shard, by name."""
    table = facts.bucket(shard, FACTS, sub="rows").combine_chunks()
    return {
        name: ids_of(column) if name == "image_id" else column.to_numpy()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def read_vectors(facts: Step, shard: int, dim: int) -> Rows | OnDisk:
    """The vectors of a shard, on disk where one component makes it larger than it should be."""
    count = sum(len(table) for table in facts.buckets(shard, ["row"], sub="vectors"))
    tables = facts.buckets(shard, sub="vectors")
    first = next(tables)
    width = 1 + CROPS * ("crops" in first.column_names)
    if count * width * dim * 2 > IN_MEMORY:
        return OnDisk(chain([first], tables), dim)
    return _in_memory([first, *tables], dim)


def _in_memory(tables: list[pa.Table], dim: int) -> Rows:
    row = np.concatenate([table.column("row").to_numpy() for table in tables])
    vectors = np.concatenate([unraw(t.column("vector"), np.float16, dim) for t in tables])
    crops = None
    if "crops" in tables[0].column_names:
        width = CROPS * dim
        crops = np.concatenate([unraw(t.column("crops"), np.float16, width) for t in tables])
        crops = crops.reshape(-1, CROPS, dim)
    return Rows(row, np.zeros((len(row), 16), np.uint8), vectors, crops)


class OnDisk:
    """Rows whose vectors are read when they are asked for.

    Args:
        tables: with `row` and `vector`, and `crops` where the rows have views, as `bucketed.raw`
            makes them; taken one by one.
        dim: of a vector.

    Attributes:
        row: int64 [n].
    """

    def __init__(self, tables: Iterable[pa.Table], dim: int) -> None:
        self.dim, self.views = dim, False
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - held until close
        rows = [np.zeros(0, np.int64)]
        for table in tables:
            rows.append(np.array(table.column("row").to_numpy()))
            columns = [unraw(table.column("vector"), np.float16, dim)]
            self.views = "crops" in table.column_names
            if self.views:
                columns.append(unraw(table.column("crops"), np.float16, CROPS * dim))
            self._file.write(np.concatenate(columns, 1).tobytes())
        self._file.flush()
        self.row = np.concatenate(rows)

    def only(self, chosen: Ints) -> Rows:
        """Some of the rows, by place; their ids are not stored."""
        width = self.dim * (1 + CROPS * self.views)
        places, back = np.unique(chosen, return_inverse=True)
        read = np.empty((len(places), width), np.float16)
        for values, place in zip(read, places.tolist(), strict=True):
            os.preadv(self._file.fileno(), [values.view(np.uint8).data], place * 2 * width)
        read = read[back]
        crops = read[:, self.dim :].reshape(-1, CROPS, self.dim) if self.views else None
        ids = np.zeros((len(read), 16), np.uint8)
        return Rows(self.row[chosen], ids, read[:, : self.dim], crops)

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()
