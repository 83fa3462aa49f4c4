"""The hashes by which a sample is drawn."""

from __future__ import annotations

import numpy as np

from pipeline.curate.copies import cell_fit
from tests.curate.planted import ids_for


def test_hashes_are_uniform_and_differ_by_seed() -> None:
    ids = ids_for(20_000)
    one, other = cell_fit.hash64(0, ids), cell_fit.hash64(1, ids)
    for hashes in (one, other):
        counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
        assert abs(counts - 1250).max() < 200
    assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 0.05
    assert len(np.unique(one)) == len(ids)
    consecutive = np.zeros((1000, 16), np.uint8)
    consecutive[:, 15] = np.arange(1000) % 256
    consecutive[:, 14] = np.arange(1000) // 256
    top = (cell_fit.hash64(0, consecutive) >> np.uint64(60)).astype(int)
    assert np.bincount(top, minlength=16).min() > 30
