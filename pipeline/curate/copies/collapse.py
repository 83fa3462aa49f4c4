"""Rows whose vectors are equal, found by hash buckets: one of them stands for all in the join.

Without this, a vector that thousands of images share puts them all into one cell, which then has
the square of their number of pairs, and draws several centres to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.draws_by_id import group_starts, id_words
from pipeline.curate.rows.read_rows import (
    Portion,
    Rows,
    read_range,
    read_rows,
    self_dots,
)
from pipeline.curate.rows.tables import ID, ROW, Vectors, id_array, ids_of, write_table

BUCKET_ROWS = 8_000_000  # of 48 bytes: with what sorting needs, 1.2 GB

# A row with the row that stands for it. `similarity` is their exact dot product.
COPIES = pa.schema(
    [
        ("row", ROW),
        ("image_id", ID),
        ("stands", ROW),
        ("stands_id", ID),
        ("similarity", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Distinct:
    """Rows that stand for themselves; what tasks read, small however many there are.

    Attributes:
        vectors: of all rows.
        exact: folder of `tables.EXACT`: only rows that are their own keeper; empty: all.
        copies: folder and tables of `COPIES`, whose rows another row stands for; empty: none are
            known.
    """

    vectors: Vectors
    exact: str = ""
    copies: tuple[str, Sequence[str]] = ("", ())

    def read(self, portion: Portion, views: bool = False) -> Rows:
        """The rows of a portion; `views`: with the crops, where there are any."""
        rows = read_rows(self.vectors, portion, self.exact, views)
        gone = self.stood_for(portion).column("row").to_numpy()
        return rows.only(~np.isin(rows.row, gone)) if len(gone) else rows

    def stood_for(self, portion: Portion) -> pa.Table:
        """The rows of a portion that another row stands for, as `COPIES`, by row."""
        folder, names = self.copies
        tables = [COPIES.empty_table()]
        for part in portion.parts:
            tables.extend(read_range(folder, names, part.first, part.end))
        return pa.concat_tables(tables).combine_chunks().sort_by("row")


def hash_buckets(rows: int) -> int:
    """Hash buckets for so many rows."""
    return max(1, -(-rows // BUCKET_ROWS))


def hash_task(folder: str, distinct: Distinct, portion: Portion, buckets: int) -> dict[str, Any]:
    """Writes the hash of each vector of a portion to the bucket of the hash."""
    rows = distinct.read(portion)
    content = np.ascontiguousarray(rows.vectors).tobytes()
    width = 2 * distinct.vectors.dim
    hashes = b"".join(
        blake2b(content[at : at + width], digest_size=16).digest()
        for at in range(0, len(rows) * width, width)
    )
    digest = np.frombuffer(hashes, np.uint8).reshape(-1, 16)
    bucket = (id_words(digest)[0] % np.uint64(buckets)).astype(np.int64)
    order = np.argsort(bucket, kind="stable")
    table = pa.table(
        {
            "row": rows.row[order],
            "image_id": id_array(rows.ids[order]),
            "hash": id_array(digest[order]),
            "similarity": self_dots(rows.vectors)[order],
        }
    )
    size = write_buckets(folder, portion.name, table, bucket[order])
    return {"rows": len(rows), "bytes": size, "shelves": shelves_of(bucket)}


def collapse_task(
    folder: str, hashes: str, names: Sequence[tuple[str, Sequence[int]]], bucket: int
) -> dict[str, Any]:
    """Writes the rows of a hash bucket that another row stands for: the smallest image id."""
    tables = list(read_bucket(hashes, names, bucket))
    copies = COPIES.empty_table()
    rows = 0
    if tables:
        table = pa.concat_tables(tables)
        rows = len(table)
        ids, row = ids_of(table.column("image_id")), table.column("row").to_numpy()
        high, low = id_words(ids_of(table.column("hash")))
        first, second = id_words(ids)
        order = np.lexsort((row, second, first, low, high))
        high, low = high[order], low[order]
        new = group_starts(high, low)
        stands = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
        mine, other = order[~new], stands[~new]
        by_row = np.argsort(row[mine])
        mine, other = mine[by_row], other[by_row]
        copies = pa.table(
            {
                "row": row[mine],
                "image_id": id_array(ids[mine]),
                "stands": row[other],
                "stands_id": id_array(ids[other]),
                "similarity": table.column("similarity").to_numpy()[mine],
            }
        )
    size = write_table(copies.cast(COPIES), folder, f"{bucket:05d}")
    return {"rows": rows, "bytes": size, "copies": len(copies)}
