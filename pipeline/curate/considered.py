"""The rows that a step works on: vectors, without the rows that earlier steps left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.curate.exact import Halves
from pipeline.curate.tables import HALF, Vectors, ids_of, matrix, read_table
from pipeline.errors import DataError
from pipeline.files import fingerprint

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
