"""The rows that a step works on: vectors, without the rows that earlier steps left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.portions import read_range
from pipeline.curate.rows.tables import (
    HALF,
    InputFile,
    Vectors,
    ids_of,
    matrix,
    read_table,
    write_table,
)
from pipeline.errors import DataError
from pipeline.storage.run_folder import fingerprint

Array = np.ndarray[Any, Any]


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

    def read_all(self, names: Sequence[str]) -> Points:
        """The rows of several files."""
        found = [self.read(name) for name in names]
        if not found:
            empty = np.zeros(0, np.int64)
            return Points(empty, np.zeros((0, 16), np.uint8), np.zeros((0, self.dim), HALF))
        return Points(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class Considered:
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
    ) -> Considered:
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
        key = fingerprint([vectors.key, vectors.column, kept_key])
        return cls(source, vectors.names, tuple(int(n) for n in counts), key)

    @property
    def rows(self) -> int:
        """How many in all."""
        return sum(self.counts)

    def within(self, kept: str, kept_key: str, counts: Sequence[int]) -> Considered:
        """Fewer of the same rows: those in the files of `kept`, which must be among these."""
        source = Source(self.source.folder, kept, self.source.dim, self.source.column)
        key = fingerprint([self.key, kept_key])
        return Considered(source, self.names, tuple(int(n) for n in counts), key)

    def groups(self, at_least: int) -> list[tuple[str, ...]]:
        """Neighbouring files together, each group but the last with so many rows."""
        found: list[tuple[str, ...]] = []
        group: list[str] = []
        held = 0
        for name, count in zip(self.names, self.counts, strict=True):
            group.append(name)
            held += count
            if held >= at_least:
                found.append(tuple(group))
                group, held = [], 0
        return [*found, tuple(group)] if group else found


def kept_rows(folder: str, name: str) -> Array:
    """The rows of an input file that a step kept, int64."""
    return np.asarray(read_table(folder, name, ["row"])["row"].to_numpy(), np.int64)


# ---- From tables by row, one for each task, to one table for each input file.


FILE_GROUPS = 256  # tasks that write the tables of input files, at least where there are as many
GROUP_ROWS = 4_000_000  # of the files of such a task


def spread(
    folder: str, source: str, names: Sequence[str], files: Sequence[InputFile], schema: pa.Schema
) -> dict[str, Any]:
    """From tables by row, one for each task, to one table for each input file."""
    end = files[-1].first + files[-1].rows
    tables = list(read_range(source, names, files[0].first, end))
    tables = [table.select(schema.names) for table in tables]
    table = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks().sort_by("row")
    return {"rows": len(table), "bytes": write_by_file(folder, table.cast(schema), files)}


def write_by_file(folder: str, table: pa.Table, files: Sequence[InputFile]) -> int:
    """Writes each file its part of a table that is ordered by `row`; gives the bytes."""
    row, size = table.column("row").to_numpy(), 0
    for file in files:
        begin, stop = np.searchsorted(row, [file.first, file.first + file.rows])
        size += write_table(table.slice(begin, stop - begin), folder, file.name)
    return size


def file_groups(files: Sequence[InputFile]) -> list[tuple[str, tuple[InputFile, ...]]]:
    """Neighbouring input files in groups for a task each, called after their first file."""
    rows = end_of(files) - files[0].first if files else 0
    count = min(len(files), max(FILE_GROUPS, -(-rows // GROUP_ROWS)))
    bounds = [len(files) * i // count for i in range(count + 1)] if count else []
    return [(files[a].name, tuple(files[a:b])) for a, b in pairwise(bounds) if b > a]


def end_of(files: Sequence[InputFile]) -> int:
    """The first row after these consecutive files."""
    return files[-1].first + files[-1].rows
