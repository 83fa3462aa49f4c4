"""Vectors for tests: planted concepts, written as the files that curation reads."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.exact import unit_half
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import Vectors, id_array, list_array, vector_schema, write_table


def ids_of_numbers(numbers, salt=b""):
    """Ids as hashes of numbers, like those of images."""
    digests = [blake2b(salt + int(n).to_bytes(8, "big"), digest_size=16).digest() for n in numbers]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()


def separated(count, clusters, dim=16, spread=0.05, seed=0):
    """Vectors [count, dim] around well separated directions, and which one each is of."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:clusters]
    labels = rng.integers(0, clusters, count)
    return unit_half(centres[labels] + spread * rng.standard_normal((count, dim))), labels


def written(folder: Path, ids, vectors, files=1, order=None, first_row=0, name="vectors"):
    """The rows as files, in an order; rows are numbered as they are written."""
    order = np.arange(len(ids)) if order is None else order
    place = folder / name
    parts = np.array_split(order, files)
    names, row = [], first_row
    for i, part in enumerate(parts):
        columns = [
            np.arange(row, row + len(part)),
            id_array(ids[part]),
            list_array(vectors[part]),
        ]
        table = pa.table(columns, schema=vector_schema(vectors.shape[1]))
        write_table(table, str(place), f"{i:05d}")
        names.append(f"{i:05d}")
        row += len(part)
    embedded = Vectors(str(place), tuple(names), vectors.shape[1], key=str(place))
    return RowSet.of(embedded, [len(part) for part in parts])
