"""How many cells, vectors of the sample and buckets: what costs least and fits a task."""

from __future__ import annotations

from pipeline.curate.cells import TWO_LEVELS

SAMPLE_EACH = 40  # vectors of the sample for each cell, as in faiss
SAMPLE_BYTES = 2**30  # of the sample, which one task holds
SAMPLE_LEAST = 8  # vectors for each cell where that is too little
GROUP_IMAGES = 1_000  # mean images in a cell where there are more cells than TWO_LEVELS
IMBALANCE = 1.6  # mean square of the size of a cell over the square of its mean; measured 1.4-1.6
BUCKET_IMAGES = 25_000  # images in a bucket while there are few buckets
BUCKET_BYTES = 2**28  # of half precision in a bucket, which become 2.5 times as many in the task
FEW_BUCKETS = 32
REPLICAS = 2.2  # times that a vector is written at eight probes; measured


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
