"""Rows whose vectors are equal, found by hash buckets: one of them stands for all in the join.

Without this, a vector that thousands of images share puts them all into one cell, which then has
the square of their number of pairs, and draws several centres to itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.first_of_each import first_of_each, id_words
from pipeline.curate.rows.read_rows import Portion, Rows, read_rows, self_dots
from pipeline.curate.rows.tables import ID, ROW, Vectors, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps, numbered

BUCKET_ROWS = 8_000_000  # of 48 bytes: with what sorting needs, 1.2 GB

HASHES = pa.schema([("row", ROW), ("image_id", ID), ("hash", ID), ("similarity", pa.float64())])
# A row with the row that stands for it. `similarity` is their exact dot product.
EQUAL = pa.schema(
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
    """Rows that stand for themselves, as tasks read them.

    Attributes:
        vectors: of all rows.
        exact: with `tables.EXACT`: only rows that are their own keeper; None: all.
        equal: with `EQUAL`, whose rows another row stands for; None: none are known.
    """

    vectors: Vectors
    exact: Step | None = None
    equal: Step | None = None

    def read(self, portion: Portion, views: bool = False) -> Rows:
        """The rows of a portion; `views`: with the crops, where there are any."""
        rows = read_rows(self.vectors, portion, self.exact.folder if self.exact else "", views)
        gone = self.stood_for(portion)["row"].to_numpy()
        return rows.only(~np.isin(rows.row, gone)) if len(gone) else rows

    def stood_for(self, portion: Portion) -> pa.Table:
        """The rows of a portion that another row stands for, as `EQUAL`, by row."""
        return self.equal.rows(*portion.span, EQUAL) if self.equal else EQUAL.empty_table()


def find_equal(steps: Steps, distinct: Distinct, portions: dict[str, Portion], rows: int) -> Step:
    """Writes `EQUAL`: which rows another one stands for, the one with the smallest image id."""
    buckets = max(1, -(-rows // BUCKET_ROWS))
    hashes = steps.run("copies/hashes", hash_vectors, portions, distinct=distinct, buckets=buckets)
    return steps.run("copies/collapse", group_vectors, numbered(buckets), hashes=hashes)


def hash_vectors(out: Output, portion: Portion, distinct: Distinct, buckets: int) -> None:
    """Task: the hash of each vector of a portion, to the bucket of the hash."""
    rows = distinct.read(portion)
    content = np.ascontiguousarray(rows.vectors).tobytes()
    width = 2 * distinct.vectors.dim
    hashes = b"".join(
        blake2b(content[at : at + width], digest_size=16).digest()
        for at in range(0, len(rows) * width, width)
    )
    digest = np.frombuffer(hashes, np.uint8).reshape(-1, 16)
    columns = [rows.row, id_array(rows.ids), id_array(digest), self_dots(rows.vectors)]
    bucket = (id_words(digest)[0] % np.uint64(buckets)).astype(np.int64)
    out.buckets(pa.table(columns, schema=HASHES), bucket)


def group_vectors(out: Output, bucket: int, hashes: Step) -> Account:
    """Task: the rows of a hash bucket that another row stands for."""
    table = hashes.bucket(bucket, HASHES)
    ids, row = ids_of(table["image_id"]), table["row"].to_numpy()
    mine, other = first_of_each(ids_of(table["hash"]), ids, row)
    columns = [row[mine], id_array(ids[mine]), row[other], id_array(ids[other])]
    equal = pa.table([*columns, table["similarity"].to_numpy()[mine]], schema=EQUAL)
    out.table(equal.sort_by("row"))
    return {"rows": len(table), "copies": len(equal)}
