"""Cells fitted on a sample by k-means on the sphere.

First come some sqrt(K) groups, then cells within each group, then a few passes over all cells at
once. The same sample gives the same cells on every machine: sums are made in doubles, which are
exact for vectors of half precision (`exact`).

Cells only find pairs, from a sample; the clusters that images are chosen by are in
`choose.kmeans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cells import SAMPLE_EACH, TWO_LEVELS, Cells
from pipeline.curate.copies.equal_vectors import Distinct
from pipeline.curate.rows.bucketed import raw, unraw
from pipeline.curate.rows.draws_by_id import hash64
from pipeline.curate.rows.exact import Halves, nearest_numbers, unit_half
from pipeline.curate.rows.first_of_each import in_order
from pipeline.curate.rows.read_rows import Portion
from pipeline.curate.rows.tables import ID, ROW, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step

ITERATIONS = 6  # of Lloyd
SEEDED_FROM = 200  # vectors for each group that groups are fitted on
LEAST_SPLIT = 256  # cells of a group that are not divided into groups again
SKEW = 4  # times the mean number of cells of a group, above which it is
DIVIDED = 0.9  # share of a group's vectors in its largest part, above which dividing helps nothing
REFINEMENTS = 2
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CellPlan:
    """How many cells and buckets.

    Attributes:
        cells: wanted; fewer come where there are fewer vectors.
        buckets: wanted.
        bucketing: `near`: cells that are near each other share a bucket; `modulo`: by number.
    """

    cells: int
    buckets: int
    bucketing: str = "near"


def fit_cells(vectors: Halves, plan: CellPlan, seed: int) -> Cells:
    """Fits cells on a sample.

    Args:
        vectors: [n, d] of unit length, all different; their order counts.
        plan: how many.
        seed: of the draws.
    """
    dim = vectors.shape[1]
    if not len(vectors):
        none = np.zeros((0, dim), np.float16)
        zero = np.zeros(0, np.int32)
        return Cells(none, zero, zero, none)
    cells = min(plan.cells, len(vectors))
    first_groups, places = _groups(vectors, cells, (seed, 0))
    most = max(LEAST_SPLIT, SKEW * -(-cells // len(places)))
    split = _shared_out(vectors, first_groups, places, cells, (seed,), most)
    groups, centres = (np.concatenate([one[column] for one in split]) for column in (0, 1))
    group = np.repeat(np.arange(len(split), dtype=np.int32), [len(one[1]) for one in split])
    moved, which = centres, None
    if len(moved) <= TWO_LEVELS:
        # Cells at the border of groups were fitted to half of what is around them.
        moved, which = lloyd_and_nearest(vectors, moved, REFINEMENTS)
    _, first = np.unique(np.ascontiguousarray(moved).view(np.uint8), axis=0, return_index=True)
    first = np.sort(first)
    fitted = Cells(moved[first], np.zeros(0, np.int32), group[first], groups)
    # Members of the sample, before the last move of the centres where they were counted then.
    if which is None:
        sizes = np.bincount(fitted.nearest(vectors, 1)[:, 0], minlength=len(first))
    else:
        sizes = np.bincount(which, minlength=len(moved))[first]
    bucket = bucket_cells(fitted.centres, plan, seed, sizes + 1)
    return replace(fitted, bucket=bucket)


def _groups(vectors: Halves, cells: int, seed: Sequence[int]) -> tuple[Halves, list[Array]]:
    """About sqrt(cells) groups, and the places of the vectors of each."""
    count = int(np.ceil(np.sqrt(cells)))
    every = max(1, len(vectors) // (SEEDED_FROM * count))
    groups = kmeans(vectors[::every], count, seed, ITERATIONS)
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
    if max(map(len, places)) > DIVIDED * len(vectors):  # nearly all are one direction
        every = max(1, len(vectors) // (SAMPLE_EACH * most))
        return [(own, kmeans(vectors[::every], most, seed, ITERATIONS))]
    return _shared_out(vectors, groups, places, cells, seed, most)


def _shared_out(
    vectors: Halves, groups: Halves, places: list[Array], cells: int, seed: Sequence[int], most: int
) -> list[tuple[Halves, Halves]]:
    """Groups with their cells, of which each has as many as its size says."""
    split: list[tuple[Halves, Halves]] = []
    for number, share in enumerate(shares_by_size(np.array([len(one) for one in places]), cells)):
        if share:
            own = groups[number : number + 1]
            seed_of = (*seed, 1, number)
            split += _split(own, vectors[places[number]], int(share), seed_of, most)
    return split


def shares_by_size(sizes: Array, total: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`total` shared out by size: at least one and at most its size for each that has any.

    The largest remainders get what is left, the earlier of equal ones first.
    """
    sizes = np.asarray(sizes, np.int64)
    exact = sizes * total / max(1, int(sizes.sum()))
    shared: np.ndarray[Any, np.dtype[np.int64]] = np.minimum(
        np.maximum(np.floor(exact).astype(np.int64), sizes > 0), sizes
    )
    order = np.argsort(shared - exact, kind="stable")
    for place in order:
        if shared.sum() >= total:
            break
        shared[place] += shared[place] < sizes[place]
    while shared.sum() > max(total, np.count_nonzero(sizes)):  # small ones were given one
        shared[int(np.argmax(np.where(shared > 1, shared - exact, -np.inf)))] -= 1
    return shared


# ---- k-means, in one process.


def kmeans(vectors: Halves, cells: int, seed: Sequence[int], iterations: int) -> Halves:
    """Centres of k-means on the sphere, seeded by D² (k-means++, Arthur and Vassilvitskii 2007).

    Args:
        vectors: [n, d] of unit length.
        cells: at most n; fewer are returned where fewer vectors differ.
        seed: of the draws.
        iterations: of Lloyd.

    Returns:
        Half precision [k, d]; no two are equal.
    """
    centres = lloyd(vectors, _seeds(vectors, cells, seed), iterations)
    _, first = np.unique(np.ascontiguousarray(centres).view(np.uint8), axis=0, return_index=True)
    return centres[np.sort(first)]


def _seeds(vectors: Halves, cells: int, seed: Sequence[int]) -> Halves:
    """Distinct vectors, each drawn by its squared distance to those drawn before."""
    rng = np.random.default_rng(list(seed))
    wide = vectors.astype(np.float64)
    norms = np.einsum("nd,nd->n", wide, wide)
    left = np.ones(len(wide))
    chosen: list[int] = []
    for _ in range(min(cells, len(wide))):
        # In the order of the rows: a sum in another order could be rounded otherwise.
        total = np.cumsum(left)
        if total[-1] <= 0:
            break
        place = int(np.searchsorted(total, rng.random() * total[-1], side="right"))
        place = min(place, len(wide) - 1)
        while left[place] <= 0:
            place -= 1
        distance = norms + norms[place] - 2 * (wide @ wide[place])
        left = np.minimum(left, distance) if chosen else distance
        left[place] = 0.0
        chosen.append(place)
    return vectors[chosen]


def lloyd(vectors: Halves, centres: Halves, iterations: int) -> Halves:
    """Rounds of: each vector to its nearest centre, each centre to the mean direction of its own.

    Centres that no vector is nearest to stay where they are.
    """
    return lloyd_and_nearest(vectors, centres, iterations)[0]


def lloyd_and_nearest(
    vectors: Halves, centres: Halves, iterations: int
) -> tuple[Halves, Array | None]:
    """As `lloyd`, and the centre that each vector was nearest to in the last round."""
    before = None
    for _ in range(iterations):
        which = nearest_numbers(vectors, centres, 1)[:, 0]
        if before is not None and np.array_equal(which, before):
            break
        centres, before = _means(vectors, which, centres), which
    return centres, before


def _means(vectors: Halves, which: Array, centres: Halves) -> Halves:
    from scipy.sparse import csr_array

    sums = np.zeros(centres.shape)
    for begin in range(0, len(vectors), 32_768):
        wide = vectors[begin : begin + 32_768].astype(np.float64)
        mine = which[begin : begin + len(wide)]
        order = np.argsort(mine, kind="stable")
        cells, starts = np.unique(mine[order], return_index=True)
        shape = (len(cells), len(wide))
        ones = csr_array((np.ones(len(wide)), order, np.append(starts, len(wide))), shape=shape)
        sums[cells] += ones @ wide
    # The length is summed in the order of the columns, so that no machine rounds it otherwise.
    length = np.sqrt(np.add.accumulate(sums * sums, axis=1)[:, -1:])
    moved = length[:, 0] > 0
    new = centres.copy()
    new[moved] = unit_half(sums[moved] / length[moved])
    return new


# ---- Buckets of cells that are near each other.
#
# So the cells of a vector are mostly in one bucket, and the vector is written little more than
# once.


ROOM = 1.3  # largest bucket over the mean one
BUCKET_CHOICES = 16


def bucket_cells(
    centres: Halves, plan: CellPlan, seed: int, sizes: Array | None = None
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The bucket of each cell: by clusters of cells, none with over 1.3 times the mean size.

    Args:
        centres: of the cells.
        plan: how many buckets.
        seed: of the draws.
        sizes: of the cells; default: all are alike. One that is larger than a bucket should be
            has a bucket of its own, as far as they suffice.
    """
    cells = len(centres)
    buckets = max(1, min(plan.buckets, cells))
    if plan.bucketing == "modulo" or buckets == 1:
        return (np.arange(cells) % buckets).astype(np.int32)
    middle = kmeans(centres, buckets, (seed, 2), ITERATIONS)
    choices = nearest_numbers(centres, middle, BUCKET_CHOICES)
    similar = np.einsum("nd,nd->n", centres.astype(np.float64), middle[choices[:, 0]].astype(float))
    sizes = np.ones(cells, np.int64) if sizes is None else sizes
    mean = sizes.sum() / len(middle)
    room = np.full(len(middle), int(np.ceil(ROOM * mean)))
    bucket = np.zeros(cells, np.int32)
    # What fills a bucket alone goes first, while there are empty ones.
    for cell in np.lexsort((np.arange(cells), -similar, sizes < mean)):
        free = [choice for choice in choices[cell] if room[choice] >= min(sizes[cell], mean)]
        bucket[cell] = free[0] if free else int(np.argmax(room))
        room[bucket[cell]] -= sizes[cell]
    return bucket


# ---- The tasks that fit cells: draw a sample, fit on the whole of it.

SAMPLE = pa.schema([("image_id", ID), ("row", ROW)])  # with the column `vector`, as bytes


def draw_sample(out: Output, portion: Portion, distinct: Distinct, seed: int, share: float) -> None:
    """Task: the vectors of a portion whose hash is in the lowest `share`."""
    rows = distinct.read(portion)
    if share < 1:
        rows = rows.only(hash64(seed, rows.ids) < np.uint64(int(share * 2**64)))
    columns = {"image_id": id_array(rows.ids), "row": rows.row, "vector": raw(rows.vectors)}
    out.table(pa.table(columns))


def fit_sample(out: Output, dim: int, sample: Step, plan: CellPlan, seed: int) -> Account:
    """Task: fits the cells on the whole sample of vectors of width `dim`, and writes them."""
    about = sample.every(SAMPLE)
    ids, row = ids_of(about["image_id"]), about["row"].to_numpy()
    place = np.empty(len(ids), np.int64)
    place[in_order(ids, row)] = np.arange(len(ids))
    del about, ids, row
    vectors = np.zeros((len(place), dim), np.float16)
    begin = 0
    for name in sample.tables:  # one at a time, to where they belong: the sample is there once
        values = unraw(sample.read(name, ["vector"])["vector"], np.float16, dim)
        vectors[place[begin : begin + len(values)]] = values
        begin += len(values)
    fitted = fit_cells(vectors, plan, seed)
    for table, name in fitted.tables():
        out.table(table, name)
    return {"rows": len(vectors), "cells": len(fitted.centres)}
