"""Cells: two levels find what one finds, and they come back from storage as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.curate.copies import cell_fit, cells
from tests.curate.planted import planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


@pytest.mark.long
def test_two_levels_find_nearly_what_one_finds(
    sample: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = cell_fit.fit_cells(sample, 400, 4, seed=0)
    flat = fitted.nearest(sample, 8)
    for module in (cells, cell_fit):
        monkeypatch.setattr(module, "TWO_LEVELS", 100)
    near = fitted.nearest(sample, 8)
    assert (flat[:, 0] == near[:, 0]).mean() > 0.95
    assert np.mean([len(set(a) & set(b)) for a, b in zip(flat, near, strict=True)]) > 7
    # every group looked at: the same
    monkeypatch.setattr(cells, "BRANCHES", len(fitted.groups))
    assert np.array_equal(fitted.nearest(sample, 8), flat)
    # cells of a large number are not moved over the borders of groups
    assert len(np.unique(cell_fit.fit_cells(sample, 400, 4, seed=0).centres, axis=0)) == 400


def test_saved_and_loaded(sample: Array, tmp_path: Path) -> None:
    fitted = cell_fit.fit_cells(sample, 50, 3, seed=0)
    assert fitted.save(str(tmp_path)) > 0
    other = cells.Cells.load(str(tmp_path), 32)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(fitted, name), getattr(other, name))
