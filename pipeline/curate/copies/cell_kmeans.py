"""k-means for cells: on the sphere, in one process, with the same centres on every machine.

Cells only find pairs, from a sample; the clusters that images are chosen by are in `kmeans`.

Sums are made in doubles, which are exact for vectors of half precision (`exact`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.curate.rows.exact import Halves, nearest_numbers, unit_half

ITERATIONS = 6
Array = np.ndarray[Any, Any]


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
    found = centres.copy()
    found[moved] = unit_half(sums[moved] / length[moved])
    return found


# ---- Buckets of cells that are near each other.
#
# So the cells of a vector are mostly in one bucket, and the vector is written little more than
# once.


ROOM = 1.3  # largest bucket over the mean one
BUCKET_CHOICES = 16


def bucket_cells(
    centres: Halves, buckets: int, seed: int, bucketing: str = "near", sizes: Array | None = None
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The bucket of each cell: by clusters of cells, none with over 1.3 times the mean size.

    Args:
        centres: of the cells.
        buckets: wanted.
        seed: of the draws.
        bucketing: `near` or `modulo`, see `cell_fit.fit`.
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
