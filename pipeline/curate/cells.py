"""Cells: the coarse clusters in which vectors are compared, and the buckets that tasks take.

Cells are fitted on a sample by k-means on the sphere: first some sqrt(K) groups, then cells within
each group, then a few passes over all cells at once. Sums are made in doubles, which are exact for
vectors of half precision (`exact`), so the same sample gives the same cells on every machine.

Above 20,000 cells, vectors are assigned in two levels: among the cells of the eight nearest
groups. Buckets are made of cells that are near each other, so that the cells of a vector are mostly
in one bucket and the vector is written little more than once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import raw, unraw
from pipeline.curate.exact import Halves, nearest_numbers, unit_half
from pipeline.curate.portions import Ids, Portion, order_by_id, read_rows
from pipeline.curate.tables import ID, Vectors, id_array, ids_of, read_table, write_table

SAMPLE_EACH = 40  # vectors of the sample for each cell, as in faiss
SAMPLE_BYTES = 2**30  # of the sample, which one task holds
SAMPLE_LEAST = 8  # vectors for each cell where that is too little
TWO_LEVELS = 20_000  # cells above which vectors are assigned by groups
GROUP_IMAGES = 1_000  # mean images in a cell above that
BRANCHES = 8  # groups whose cells are looked at
SEEDED_FROM = 200  # vectors for each group that groups are fitted on
LEAST_SPLIT = 256  # cells of a group that are not divided into groups again
SKEW = 4  # times the mean number of cells of a group, above which it is
DIVIDED = 0.9  # share of a group's vectors in its largest part, above which dividing helps nothing
IMBALANCE = 1.6  # mean square of the size of a cell over the square of its mean; measured 1.4-1.6
ITERATIONS = 6
REFINEMENTS = 2
ROOM = 1.3  # largest bucket over the mean one
BUCKET_CHOICES = 16
BUCKET_IMAGES = 25_000  # images in a bucket while there are few buckets
BUCKET_BYTES = 2**28  # of half precision in a bucket, which become 2.5 times as many in the task
FEW_BUCKETS = 32
REPLICAS = 2.2  # times that a vector is written at eight probes; measured

Array = np.ndarray[Any, Any]


def hash64(seed: int, ids: Ids) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A number for each id, uniform in 64 bits and another one for each seed (splitmix64)."""

    def mix(x: Array) -> Array:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))

    start = mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2).astype(np.uint64)
    found: np.ndarray[Any, np.dtype[np.uint64]] = mix(words[:, 0] ^ mix(words[:, 1] ^ start))
    return found


def cells_for(rows: int, probes: int, dim: int, cell_images: int | None = None) -> int:
    """How many cells: what costs least, or so many that a cell has `cell_images` on average.

    Assigning costs 2 N K d and joining 2 d E (p - 1/2) N^2 / K operations, least where
    K = sqrt(E (p - 1/2) N). Where that is over 20,000, two levels make assigning cheap, and cells
    have 1000 images. The sample has to fit a task, which limits K (to 160,000 at d = 384).
    """
    if cell_images:
        wanted = rows / cell_images
    else:
        wanted = (IMBALANCE * max(0.5, probes - 0.5) * rows) ** 0.5
        if wanted > TWO_LEVELS:
            wanted = max(TWO_LEVELS, rows / GROUP_IMAGES)
    limit = SAMPLE_BYTES // (2 * dim * SAMPLE_LEAST)
    return int(max(1, min(round(wanted), limit, rows)))


def sample_share(rows: int, cells: int, dim: int) -> float:
    """Share of the rows that are in the sample."""
    wanted = min(SAMPLE_EACH * cells, SAMPLE_BYTES // (2 * dim))
    return min(1.0, wanted / max(1, rows))


def buckets_for(rows: int, dim: int, views: int = 1) -> int:
    """How many buckets: few for images up to a million, then by the memory of a join task."""
    by_memory = -(-int(rows * views * REPLICAS * 2 * dim) // BUCKET_BYTES)
    return max(1, by_memory, min(FEW_BUCKETS, rows // BUCKET_IMAGES))


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
    return _lloyd(vectors, centres, iterations)[0]


def _lloyd(vectors: Halves, centres: Halves, iterations: int) -> tuple[Halves, Array | None]:
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
    found = centres.copy()
    found[moved] = unit_half(sums[moved] / length[moved])
    return found


@dataclass(frozen=True)
class Cells:
    """Fitted cells.

    Attributes:
        centres: half precision [K, d], all different.
        bucket: int32 [K].
        group: int32 [K], the group of each cell.
        groups: half precision [G, d], centres of the groups.
    """

    centres: Halves
    bucket: np.ndarray[Any, np.dtype[np.int32]]
    group: np.ndarray[Any, np.dtype[np.int32]]
    groups: Halves

    def nearest(self, vectors: Halves, probes: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The nearest cells of each vector, the nearest first: int32 [n, probes].

        Where there are fewer cells than probes, -1 stands in the last columns.
        """
        found = np.full((len(vectors), probes), -1, np.int32)
        count = min(probes, len(self.centres))
        if len(self.centres) <= TWO_LEVELS:
            found[:, :count] = nearest_numbers(vectors, self.centres, count)
        else:
            found[:, :count] = self._by_groups(vectors, count)
        return found

    def _by_groups(self, vectors: Halves, count: int) -> Array:
        from pipeline.curate.exact import nearest

        n, none = len(vectors), len(self.centres)
        branch = nearest_numbers(vectors, self.groups, BRANCHES)
        order = np.argsort(branch.reshape(-1), kind="stable")
        ends = np.searchsorted(branch.reshape(-1)[order], np.arange(len(self.groups) + 1))
        width = branch.shape[1]
        number = np.full((n, width, count), none, np.int32)
        similarity = np.full((n, width, count), -np.inf)
        for group in range(len(self.groups)):
            places = order[ends[group] : ends[group + 1]]
            cells = np.flatnonzero(self.group == group)
            if not len(places) or not len(cells):
                continue
            row, column = np.divmod(places, width)
            which, values = nearest(vectors[row], self.centres[cells], count)
            number[row, column, : which.shape[1]] = cells[which]
            similarity[row, column, : which.shape[1]] = values
        number, similarity = number.reshape(n, -1), similarity.reshape(n, -1)
        first = np.lexsort((number, -similarity), axis=1)[:, :count]
        found = np.take_along_axis(number, first, 1)
        return np.where(found == none, -1, found)

    def save(self, folder: str) -> int:
        """Writes the tables of the cells; returns their bytes."""
        cells = pa.table({"bucket": self.bucket, "group": self.group, "vector": raw(self.centres)})
        size = write_table(cells, folder, "cells")
        return size + write_table(pa.table({"vector": raw(self.groups)}), folder, "groups")

    @classmethod
    def load(cls, folder: str, dim: int) -> Cells:
        """Reads them.

        Raises:
            DataError: a table is damaged or missing.
        """
        cells, groups = read_table(folder, "cells"), read_table(folder, "groups")
        return cls(
            unraw(cells.column("vector"), np.float16, dim),
            cells.column("bucket").to_numpy(),
            cells.column("group").to_numpy(),
            unraw(groups.column("vector"), np.float16, dim),
        )


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
        found, which = _lloyd(vectors, found, REFINEMENTS)
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


def bucket_cells(
    centres: Halves, buckets: int, seed: int, bucketing: str = "near", sizes: Array | None = None
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The bucket of each cell: by clusters of cells, none with over 1.3 times the mean size.

    Args:
        centres: of the cells.
        buckets: wanted.
        seed: of the draws.
        bucketing: `near` or `modulo`, see `fit`.
        sizes: of the cells; default: all are alike. One that is larger than a bucket should be
            has a bucket of its own, as far as they suffice.
    """
    cells = len(centres)
    buckets = max(1, min(buckets, cells))
    if bucketing == "modulo" or buckets == 1:
        return (np.arange(cells) % buckets).astype(np.int32)
    middle = kmeans(centres, buckets, (seed, 2), ITERATIONS)
    choices = nearest_numbers(centres, middle, BUCKET_CHOICES)
    similar = np.einsum("nd,nd->n", centres.astype(np.float64), middle[choices[:, 0]].astype(float))
    sizes = np.ones(cells, np.int64) if sizes is None else sizes
    mean = sizes.sum() / len(middle)
    room = np.full(len(middle), int(np.ceil(ROOM * mean)))
    found = np.zeros(cells, np.int32)
    # What fills a bucket alone goes first, while there are empty ones.
    for cell in np.lexsort((np.arange(cells), -similar, sizes < mean)):
        free = [choice for choice in choices[cell] if room[choice] >= min(sizes[cell], mean)]
        found[cell] = free[0] if free else int(np.argmax(room))
        room[found[cell]] -= sizes[cell]
    return found


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
    from pipeline.curate.collapse import without_copies

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
