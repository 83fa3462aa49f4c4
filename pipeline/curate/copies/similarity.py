"""Exact similarities of rows to each other."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.items import Visiting, visiting_of
from pipeline.curate.rows.bucketed import unraw
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.read_rows import CROPS, Rows

CHUNK = 4096  # rows compared with their keepers at once


class Likeness:
    """Exact similarities of rows to each other, all views counted.

    Args:
        rows: with their crops where views count; in memory or on disk.
        visiting: as in `items.Visiting`, or None.
        penalty: what the similarity of a crop is reduced by.
    """

    def __init__(self, rows: Rows | OnDisk, visiting: Visiting | None, penalty: float) -> None:
        self.rows, self.visiting, self.penalty = rows, visiting, penalty

    def __call__(self, a: Ints, b: Ints) -> Doubles:
        """Similarity of each pair of places a, b."""
        found = np.empty(len(a))
        for begin in range(0, len(a), CHUNK):
            some = slice(begin, begin + CHUNK)
            one, other = self.rows.only(a[some]), self.rows.only(b[some])
            found[some] = self._seen(one, other)
            if one.crops is not None:
                found[some] = np.maximum(found[some], self._seen(other, one))
        return found

    def _seen(self, visitors: Rows, members: Rows) -> Doubles:
        views, crops = visiting_of(visitors, self.visiting)
        of = members.vectors.astype(np.float64)
        seen = np.full(len(of), -np.inf)
        for view in range(views.shape[1]):
            dot = np.einsum("nd,nd->n", views[:, view].astype(np.float64), of)
            seen = np.maximum(seen, dot - (self.penalty if crops[view] else 0.0))
        return seen


# ---- Vectors of many rows in a temporary file: a component of any size is compared within a
# task.


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
        found = np.empty((len(places), width), np.float16)
        for values, place in zip(found, places.tolist(), strict=True):
            os.preadv(self._file.fileno(), [values.view(np.uint8).data], place * 2 * width)
        found = found[back]
        crops = found[:, self.dim :].reshape(-1, CROPS, self.dim) if self.views else None
        ids = np.zeros((len(found), 16), np.uint8)
        return Rows(self.row[chosen], ids, found[:, : self.dim], crops)

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()
