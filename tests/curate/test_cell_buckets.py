"""Buckets of cells: of bounded size, and of cells that are near each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.curate.copies import cell_fit
from tests.curate.planted import planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


@pytest.mark.parametrize("buckets", [1, 2, 7, 30])
def test_buckets_have_room_for_all_and_not_much_more(sample: Array, buckets: int) -> None:
    centres = cell_fit.fit_cells(sample, 120, 1, seed=0).centres
    bucket = cell_fit.bucket_cells(centres, buckets, 0)
    sizes = np.bincount(bucket, minlength=buckets)
    assert sizes.sum() == 120 and sizes.max() <= np.ceil(cell_fit.ROOM * 120 / buckets)
    assert bucket.max() < buckets


def test_buckets_are_levelled_by_members(sample: Array) -> None:
    centres = cell_fit.fit_cells(sample, 120, 1, seed=0).centres
    sizes = np.random.default_rng(0).integers(1, 20, 120)
    sizes[:2] = 400  # more than a mean bucket
    bucket = cell_fit.bucket_cells(centres, 6, 0, sizes=sizes)
    filled = np.bincount(bucket, sizes, minlength=6)
    assert bucket[0] != bucket[1] and filled.max() <= cell_fit.ROOM * sizes.sum() / 6 + 20
    by_number = np.bincount(cell_fit.bucket_cells(centres, 6, 0), sizes, minlength=6)
    assert filled.max() < by_number.max()


def test_near_cells_share_a_bucket(sample: Array) -> None:
    fitted = cell_fit.fit_cells(sample, 120, 1, seed=0)
    near = fitted.nearest(sample, 8)

    def replicas(bucket: Array) -> float:
        return float(np.mean([len(set(row)) for row in bucket[near]]))

    clustered = replicas(cell_fit.bucket_cells(fitted.centres, 12, 0))
    assert replicas(cell_fit.bucket_cells(fitted.centres, 12, 0, "modulo")) > 1.5 * clustered
