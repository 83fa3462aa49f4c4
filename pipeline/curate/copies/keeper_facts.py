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

from pipeline.curate.copies.collapse import Distinct
from pipeline.curate.copies.edges import LABELS, part_of
from pipeline.curate.rows.bucketed import raw, read_bucket, shelves_of, unraw, write_buckets
from pipeline.curate.rows.exact import Ints
from pipeline.curate.rows.read_rows import CROPS, Part, Portion, Rows, read_range, read_rows
from pipeline.curate.rows.tables import AS_IS, InputFile, Vectors, id_array, ids_of
from pipeline.uri import join

Array = np.ndarray[Any, Any]
Names = Sequence[tuple[str, Sequence[int]]]  # of tasks, each with the shelves that it wrote
PART_BYTES = 2**27  # of the vectors that a task takes
IN_MEMORY = 2**29  # bytes of the vectors that a task holds; twice while they are read


def parts_for(rows: int, vectors: Vectors) -> int:
    """Tasks that choose keepers, for so many rows with copies."""
    each = vectors.dim * 2 * (1 + CROPS * vectors.views) + 100
    return max(1, -(-rows * each // PART_BYTES))


@dataclass(frozen=True)
class FactSources:
    """Where the facts about rows are read from.

    Attributes:
        distinct: the rows and their vectors.
        labels: folder and tables of `edges.LABELS`.
        fingerprints: folder of `tables.FINGERPRINT`.
        aside: folders of tables with the `row` of images that go in any case.
    """

    distinct: Distinct
    labels: tuple[str, Sequence[str]]
    fingerprints: str
    aside: Sequence[str]


def facts_task(
    folder: str, sources: FactSources, portion: Portion, files: Sequence[InputFile], parts: int
) -> dict[str, Any]:
    """Writes the facts about a portion's rows below `rows`, and the vectors of those that stand for
    themselves below `vectors`, both by the part that their component goes to.

    Args:
        folder: of the step.
        sources: of the facts.
        portion: which rows.
        files: that the portion is of.
        parts: how many.
    """
    kinds = {file.name: file.kind for file in files}
    copies = sources.distinct.stood_for(portion)
    facts = [_facts(sources, part, kinds[part.name], copies) for part in portion.parts]
    facts = [one for one in facts if one]
    if not facts:
        return {"rows": 0, "bytes": 0, "shelves": [], "vector_shelves": []}
    whole = {name: np.concatenate([one[name] for one in facts]) for name in facts[0]}
    bucket = part_of(whole["label"], parts)
    order = np.argsort(bucket, kind="stable")
    table = pa.table(
        {
            name: id_array(values[order]) if name == "image_id" else values[order]
            for name, values in whole.items()
        }
    )
    size = write_buckets(str(join(folder, "rows")), portion.name, table, bucket[order])
    own = whole["stands"] == whole["row"]
    table, bucket_of_vectors = _vectors_of(
        sources.distinct.vectors, portion, whole["row"][own], whole["label"][own], parts
    )
    size += write_buckets(str(join(folder, "vectors")), portion.name, table, bucket_of_vectors)
    return {
        "rows": len(whole["row"]),
        "bytes": size,
        "shelves": shelves_of(bucket),
        "vector_shelves": shelves_of(bucket_of_vectors),
    }


def _facts(sources: FactSources, part: Part, kind: str, copies: pa.Table) -> dict[str, Array]:
    """Of the rows of a part of a file that are in a component; empty where there are none."""
    labels = list(read_range(*sources.labels, part.first, part.end))
    if not labels:
        return {}
    own = pa.concat_tables(labels).sort_by("row")
    row, label = (own.column(name).to_numpy() for name in LABELS.names)
    columns = ["row", "image_id", "bytes", "width", "height"]
    prints = next(read_range(sources.fingerprints, [part.name], part.first, part.end, columns))
    at = np.searchsorted(prints.column("row").to_numpy(), row)
    area = prints.column("width").to_numpy().astype(np.int64) * prints.column("height").to_numpy()
    density = prints.column("bytes").to_numpy() / np.maximum(area, 1)
    goes = np.zeros(len(row), bool)
    for folder in sources.aside:
        for table in read_range(folder, [part.name], part.first, part.end, ["row"]):
            goes |= np.isin(row, table.column("row").to_numpy())
    return {
        "row": row,
        "label": label,
        "image_id": ids_of(prints.column("image_id"))[at],
        "as_is": np.full(len(row), kind == AS_IS),
        "area": area[at],
        "density": density[at],
        "goes": goes,
        "stands": _stands(row, copies),
    }


def _stands(row: Array, copies: pa.Table) -> Array:
    """The row that stands for each of these: itself, or another one with the same vector."""
    copy, stand = copies.column("row").to_numpy(), copies.column("stands").to_numpy()
    if not len(copy):
        return row
    at = np.minimum(np.searchsorted(copy, row), len(copy) - 1)
    return np.where(copy[at] == row, stand[at], row)


def _vectors_of(
    vectors: Vectors, portion: Portion, row: Array, label: Array, parts: int
) -> tuple[pa.Table, Array]:
    """The vectors of some rows of a portion, ordered by the part of their component."""
    rows = read_rows(vectors, portion, views=True)
    rows = rows.only(np.isin(rows.row, row))
    by_row = np.argsort(row)
    bucket = part_of(label[by_row][np.searchsorted(row[by_row], rows.row)], parts)
    order = np.argsort(bucket, kind="stable")
    columns = {"row": rows.row[order], "vector": raw(rows.vectors[order])}
    if rows.crops is not None:
        columns["crops"] = raw(rows.crops[order].reshape(len(order), CROPS * vectors.dim))
    return pa.table(columns), bucket[order]


@dataclass(frozen=True)
class KeeperFacts:
    """What `facts_task` wrote.

    Attributes:
        folder: of its step.
        rows: its tasks, with their shelves of rows.
        vectors: its tasks, with their shelves of vectors.
        dim: of a vector.
    """

    folder: str
    rows: Names
    vectors: Names
    dim: int

    def read(self, part: int) -> dict[str, Array] | None:
        """The facts about the rows of a part, by name; None where it has no rows."""
        tables = list(read_bucket(str(join(self.folder, "rows")), self.rows, part))
        if not tables:
            return None
        table = pa.concat_tables(tables)
        return {
            name: ids_of(column) if name == "image_id" else column.to_numpy()
            for name, column in zip(table.column_names, table.columns, strict=True)
        }

    def read_vectors(self, part: int) -> Rows | OnDisk:
        """Its vectors, on disk where one component makes a part larger than parts should be."""
        folder = str(join(self.folder, "vectors"))
        count = sum(len(table) for table in read_bucket(folder, self.vectors, part, ["row"]))
        tables = read_bucket(folder, self.vectors, part)
        first = next(tables)
        width = 1 + CROPS * ("crops" in first.column_names)
        if count * width * self.dim * 2 > IN_MEMORY:
            return OnDisk(chain([first], tables), self.dim)
        return _in_memory([first, *tables], self.dim)


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
            parts = [unraw(table.column("vector"), np.float16, dim)]
            self.views = "crops" in table.column_names
            if self.views:
                parts.append(unraw(table.column("crops"), np.float16, CROPS * dim))
            self._file.write(np.concatenate(parts, 1).tobytes())
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
