"""The tasks that fit cells: draw a sample, fit on the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import raw, unraw
from pipeline.curate.cell_fit import fit
from pipeline.curate.collapse import without_copies
from pipeline.curate.portions import Ids, Portion, order_by_id, read_rows
from pipeline.curate.splitmix import GOLDEN, finalized
from pipeline.curate.tables import ID, Vectors, id_array, ids_of, read_table, write_table


def hash64(seed: int, ids: Ids) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number for each id, uniform in 64 bits and another one for each seed (splitmix64)."""
    start = finalized(np.array([seed], np.uint64) + GOLDEN)
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2).astype(np.uint64)
    return finalized(words[:, 0] ^ finalized(words[:, 1] ^ start))


def sample_task(
    folder: str,
    vectors: Vectors,
    portion: Portion,
    exact: str,
    copies: tuple[str, Sequence[str]],
    seed: int,
    share: float,
) -> dict[str, Any]:
    """Writes the vectors of a portion whose hash is in the lowest `share`: the sample.

    Rows whose vector equals another's (`collapse`) are not in it.
    """
    rows = without_copies(read_rows(vectors, portion, exact), portion, copies)
    if share < 1:
        rows = rows.only(hash64(seed, rows.ids) < np.uint64(int(share * 2**64)))
    table = pa.table({"image_id": id_array(rows.ids), "row": rows.row, "vector": raw(rows.vectors)})
    size = write_table(table, folder, portion.name)
    return {"rows": len(rows), "bytes": size}


def fit_task(
    folder: str,
    sample: str,
    names: Sequence[str],
    dim: int,
    cells: int,
    buckets: int,
    seed: int,
    bucketing: str,
) -> dict[str, Any]:
    """Fits the cells on the whole sample and writes them."""
    parts = [read_table(sample, name, ["image_id", "row"]) for name in names]
    empty = pa.table({"image_id": pa.array([], ID), "row": pa.array([], pa.int64())})
    ids = np.concatenate([ids_of(part.column("image_id")) for part in parts or [empty]])
    row = np.concatenate([part.column("row").to_numpy() for part in parts or [empty]])
    del parts
    place = np.empty(len(ids), np.int64)
    place[order_by_id(ids, row)] = np.arange(len(ids))
    del ids, row
    vectors = np.zeros((len(place), dim), np.float16)
    begin = 0
    for name in names:  # one at a time, each vector to where it belongs: the sample is there once
        part = unraw(read_table(sample, name, ["vector"]).column("vector"), np.float16, dim)
        vectors[place[begin : begin + len(part)]] = part
        begin += len(part)
    found = fit(vectors, cells, buckets, seed, bucketing)
    size = found.save(folder)
    return {"rows": len(vectors), "bytes": size, "cells": len(found.centres)}
