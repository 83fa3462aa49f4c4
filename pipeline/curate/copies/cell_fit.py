"""Cells fitted on a sample by k-means on the sphere.

First come some sqrt(K) groups, then cells within each group, then a few passes over all cells at
once. The same sample gives the same cells on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_kmeans import ITERATIONS, bucket_cells, kmeans, lloyd_and_nearest
from pipeline.curate.copies.cells import SAMPLE_EACH, TWO_LEVELS, Cells
from pipeline.curate.copies.collapse import without_copies
from pipeline.curate.rows.bucketed import raw, unraw
from pipeline.curate.rows.draws_by_id import GOLDEN, finalized
from pipeline.curate.rows.exact import Halves, nearest_numbers
from pipeline.curate.rows.read_rows import Ids, Portion, order_by_id, read_rows
from pipeline.curate.rows.tables import ID, Vectors, id_array, ids_of, read_table, write_table

SEEDED_FROM = 200  # vectors for each group that groups are fitted on
LEAST_SPLIT = 256  # cells of a group that are not divided into groups again
SKEW = 4  # times the mean number of cells of a group, above which it is
DIVIDED = 0.9  # share of a group's vectors in its largest part, above which dividing helps nothing
REFINEMENTS = 2
Array = np.ndarray[Any, Any]


def fit(vectors: Halves, cells: int, buckets: int, seed: int, bucketing: str = "near") -> Cells:
    """Fits cells on a sample.

    Args:
        vectors: [n, d] of unit length, all different; their order counts.
        cells: wanted; fewer come where there are fewer vectors.
        buckets: wanted.
        seed: of the draws.
        bucketing: `near`: cells that are near each other share a bucket; `modulo`: by number.
    """
    dim = vectors.shape[1]
    if not len(vectors):
        none = np.zeros((0, dim), np.float16)
        zero = np.zeros(0, np.int32)
        return Cells(none, zero, zero, none)
    cells = min(cells, len(vectors))
    first_groups, places = _groups(vectors, cells, (seed, 0))
    most = max(LEAST_SPLIT, SKEW * -(-cells // len(places)))
    parts: list[tuple[Halves, Halves]] = []
    for number, share in enumerate(shares(np.array([len(one) for one in places]), cells)):
        if share:
            own = first_groups[number : number + 1]
            parts += _split(own, vectors[places[number]], int(share), (seed, 1, number), most)
    groups, centres = (np.concatenate([part[column] for part in parts]) for column in (0, 1))
    group = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part[1]) for part in parts])
    found, which = centres, None
    if len(found) <= TWO_LEVELS:
        # Cells at the border of groups were fitted to half of what is around them.
        found, which = lloyd_and_nearest(vectors, found, REFINEMENTS)
    _, first = np.unique(np.ascontiguousarray(found).view(np.uint8), axis=0, return_index=True)
    first = np.sort(first)
    fitted = Cells(found[first], np.zeros(0, np.int32), group[first], groups)
    # Members of the sample, before the last move of the centres where they were counted then.
    if which is None:
        sizes = np.bincount(fitted.nearest(vectors, 1)[:, 0], minlength=len(first))
    else:
        sizes = np.bincount(which, minlength=len(found))[first]
    bucket = bucket_cells(fitted.centres, buckets, seed, bucketing, sizes + 1)
    return replace(fitted, bucket=bucket)


def _groups(vectors: Halves, cells: int, seed: Sequence[int]) -> tuple[Halves, list[Array]]:
    """About sqrt(cells) groups, and the places of the vectors of each."""
    wanted = int(np.ceil(np.sqrt(cells)))
    every = max(1, len(vectors) // (SEEDED_FROM * wanted))
    groups = kmeans(vectors[::every], wanted, seed, ITERATIONS)
    of = nearest_numbers(vectors, groups, 1)[:, 0]
    order = np.argsort(of, kind="stable")
    ends = np.searchsorted(of[order], np.arange(len(groups) + 1))
    return groups, [order[a:b] for a, b in pairwise(ends.tolist())]


def _split(
    own: Halves, vectors: Halves, cells: int, seed: Sequence[int], most: int
) -> list[tuple[Halves, Halves]]:
    """A group as groups with cells: itself, or several where it would have more than `most` cells,
    since most vectors are where few groups are. k-means costs the product of vectors and cells, and
    a vector that is assigned is compared with all cells of its groups.
    """
    if cells <= most:
        return [(own, kmeans(vectors, cells, seed, ITERATIONS))]
    groups, places = _groups(vectors, cells, (*seed, 0))
    sizes = np.array([len(one) for one in places])
    if sizes.max() > DIVIDED * len(vectors):  # it cannot be divided: nearly all are one direction
        every = max(1, len(vectors) // (SAMPLE_EACH * most))
        return [(own, kmeans(vectors[::every], most, seed, ITERATIONS))]
    found: list[tuple[Halves, Halves]] = []
    for number, share in enumerate(shares(sizes, cells)):
        if share:
            mine = groups[number : number + 1], vectors[places[number]]
            found += _split(*mine, int(share), (*seed, 1, number), most)
    return found


def shares(sizes: Array, total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`total` shared out by size: at least one and at most its size for each that has any.

    The largest remainders get what is left, the earlier of equal ones first.
    """
    sizes = np.asarray(sizes, np.int64)
    exact = sizes * total / max(1, int(sizes.sum()))
    given: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(
        np.maximum(np.floor(exact).astype(np.int64), sizes > 0), sizes
    )
    order = np.argsort(given - exact, kind="stable")
    for place in order:
        if given.sum() >= total:
            break
        given[place] += given[place] < sizes[place]
    while given.sum() > max(total, np.count_nonzero(sizes)):  # small ones were given one
        given[int(np.argmax(np.where(given > 1, given - exact, -np.inf)))] -= 1
    return given


# ---- The tasks that fit cells: draw a sample, fit on the whole of it.


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
