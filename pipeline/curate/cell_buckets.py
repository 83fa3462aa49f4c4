"""Buckets of cells that are near each other.

So the cells of a vector are mostly in one bucket, and the vector is written little more than once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.curate.cell_kmeans import ITERATIONS, kmeans
from pipeline.curate.exact import Halves, nearest_numbers

ROOM = 1.3  # largest bucket over the mean one
BUCKET_CHOICES = 16
Array = np.ndarray[Any, Any]


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
