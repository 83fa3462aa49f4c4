"""Cells: two levels find what one finds, and they come back from storage as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.curate.copies import cells, fit_cells
from pipeline.curate.copies.fit_cells import CellPlan
from pipeline.curate.rows.draws_by_id import hash64
from pipeline.curate.rows.tables import write_table
from pipeline.curate.steps.steps import Step
from tests.curate.planted import ids_for, planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


@pytest.mark.long
def test_two_levels_find_nearly_what_one_finds(
    sample: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fit_cells.fit_cells(sample, CellPlan(400, 4), 0)
    flat = fitted.nearest(sample, 8)
    for module in (cells, fit_cells):
        monkeypatch.setattr(module, "TWO_LEVELS", 100)
    near = fitted.nearest(sample, 8)
    assert (flat[:, 0] == near[:, 0]).mean() > 0.95
    assert np.mean([len(set(a) & set(b)) for a, b in zip(flat, near, strict=True)]) > 7
    # every group looked at: the same
    monkeypatch.setattr(cells, "BRANCHES", len(fitted.groups))
    assert np.array_equal(fitted.nearest(sample, 8), flat)
    # cells of a large number are not moved over the borders of groups
    assert len(np.unique(fit_cells.fit_cells(sample, CellPlan(400, 4), 0).centres, axis=0)) == 400


def test_saved_and_loaded(sample: Array, tmp_path: Path) -> None:
    fitted = fit_cells.fit_cells(sample, CellPlan(50, 3), 0)
    for table, name in fitted.tables():
        write_table(table, str(tmp_path), name)
    other = cells.Cells.load(Step("cells", "", str(tmp_path)), 32)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(fitted, name), getattr(other, name))


def test_numbers_of_cells_and_buckets() -> None:
    # the least of 2 N K d + 2 d E (p - 1/2) N^2 / K, by trying
    n, p = 1_000_000, 8
    tried = np.arange(100, 20_000)
    cost = tried * 1.0 + 1.6 * (p - 0.5) * n / tried
    assert abs(cells.cells_for(n, p, 384) - tried[cost.argmin()]) <= 1
    assert cells.cells_for(n, p, 384, cell_images=500) == 2000
    assert cells.cells_for(0, p, 384) == cells.cells_for(1, p, 384) == 1
    billion = cells.cells_for(10**9, p, 384)
    assert 100_000 < billion < 200_000
    assert cells.sample_share(10**9, billion, 384) * 10**9 * 384 * 2 <= cells.SAMPLE_BYTES
    # a task holds at most six bytes for each number of its items
    for rows, views in ((10**6, 1), (10**8, 1), (10**9, 1), (10**7, 20)):
        buckets = cells.buckets_for(rows, 384, views)
        items = rows * views * cells.REPLICAS / buckets * fit_cells.ROOM
        assert items * 384 * 6 < 1.2 * 2**30


def test_hashes_are_uniform_and_differ_by_seed() -> None:
    ids = ids_for(20_000)
    one, other = hash64(0, ids), hash64(1, ids)
    for hashes in (one, other):
        counts = np.bincount((hashes >> np.uint64(60)).astype(int), minlength=16)
        assert abs(counts - 1250).max() < 200
    assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 0.05
    assert len(np.unique(one)) == len(ids)
    consecutive = np.zeros((1000, 16), np.uint8)
    consecutive[:, 15] = np.arange(1000) % 256
    consecutive[:, 14] = np.arange(1000) // 256
    top = (hash64(0, consecutive) >> np.uint64(60)).astype(int)
    assert np.bincount(top, minlength=16).min() > 30
