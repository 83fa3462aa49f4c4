"""Numbers of cells and buckets against trying, and what they take of a task's memory."""

from __future__ import annotations

import numpy as np

from pipeline.curate.copies import cell_fit
from pipeline.curate.copies import cells as cell_counts


def test_numbers_of_cells_and_buckets() -> None:
    # the least of 2 N K d + 2 d E (p - 1/2) N^2 / K, by trying
    n, p = 1_000_000, 8
    tried = np.arange(100, 20_000)
    cost = tried * 1.0 + 1.6 * (p - 0.5) * n / tried
    assert abs(cell_counts.cells_for(n, p, 384) - tried[cost.argmin()]) <= 1
    assert cell_counts.cells_for(n, p, 384, cell_images=500) == 2000
    assert cell_counts.cells_for(0, p, 384) == cell_counts.cells_for(1, p, 384) == 1
    billion = cell_counts.cells_for(10**9, p, 384)
    assert 100_000 < billion < 200_000
    assert (
        cell_counts.sample_share(10**9, billion, 384) * 10**9 * 384 * 2 <= cell_counts.SAMPLE_BYTES
    )
    # a task holds at most six bytes for each number of its items
    for rows, views in ((10**6, 1), (10**8, 1), (10**9, 1), (10**7, 20)):
        buckets = cell_counts.buckets_for(rows, 384, views)
        items = rows * views * cell_counts.REPLICAS / buckets * cell_fit.ROOM
        assert items * 384 * 6 < 1.2 * 2**30
