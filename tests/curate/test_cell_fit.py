"""Cells that are fitted: the same on every machine, all different, as good as another library's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.copies import cell_fit, cells
from pipeline.curate.rows import exact
from pipeline.curate.rows.exact import unit_half
from tests.curate.planted import planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


def test_blocks_change_nothing(sample: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cell_fit.fit_cells(sample, 90, 4, seed=3)
    monkeypatch.setattr(exact, "BLOCK", 777)
    other = cell_fit.fit_cells(sample, 90, 4, seed=3)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert not np.array_equal(one.centres, cell_fit.fit_cells(sample, 90, 4, seed=4).centres)


def test_cells_are_distinct_and_of_unit_length(sample: Array) -> None:
    fitted = cell_fit.fit_cells(sample, 90, 4, seed=0)
    assert len(fitted.centres) == len(fitted.bucket) == len(fitted.group) == 90
    assert len(np.unique(fitted.centres, axis=0)) == 90
    assert np.allclose(np.linalg.norm(fitted.centres.astype(float), axis=1), 1, atol=2e-3)
    which = fitted.nearest(sample, 1)[:, 0]
    sizes = np.bincount(which, minlength=90)
    assert 90 * (sizes**2).sum() / len(sample) ** 2 < 2.5  # imbalance


@pytest.mark.long
def test_cells_are_as_good_as_those_of_another_library(sample: Array) -> None:
    from sklearn.cluster import KMeans

    ours = cell_fit.fit_cells(sample, 60, 1, seed=0).centres.astype(float)
    theirs = KMeans(60, n_init=1, random_state=0).fit(sample.astype(float)).cluster_centers_
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    x = sample.astype(float)
    assert (x @ ours.T).max(1).mean() > (x @ theirs.T).max(1).mean() - 0.01


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_vectors(rows: int) -> None:
    x = unit_half(np.eye(8)[:rows])
    fitted = cell_fit.fit_cells(x, 10, 3, seed=0)
    assert len(fitted.centres) == rows
    near = fitted.nearest(x, 8)
    assert near.shape == (rows, 8)
    assert all((row >= 0).sum() == min(8, rows) for row in near)


def test_equal_vectors_are_one_cell() -> None:
    x = np.repeat(unit_half(np.eye(4)[:2]), 50, 0)
    fitted = cell_fit.fit_cells(x, 10, 2, seed=0)
    assert np.array_equal(np.unique(fitted.centres, axis=0), np.unique(x, axis=0))


@pytest.mark.long
def test_a_direction_with_most_vectors_is_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    crowd = np.eye(32)[0] + 0.1 * rng.standard_normal((3600, 32))
    x = unit_half(np.concatenate([crowd, rng.standard_normal((400, 32))]))
    asked: list[int] = []
    inner = cell_fit.kmeans

    def counted(vectors: Array, count: int, *others: Any) -> Array:
        asked.append(count)
        return inner(vectors, count, *others)

    monkeypatch.setattr(cell_fit, "kmeans", counted)
    cells_before = cell_fit.fit_cells(x, 400, 8, seed=0)
    whole = max(asked)
    monkeypatch.setattr(cell_fit, "LEAST_SPLIT", 30)
    monkeypatch.setattr(cell_fit, "SKEW", 1)
    asked.clear()
    split = cell_fit.fit_cells(x, 400, 8, seed=0)
    assert max(asked) <= 30 < whole
    assert np.bincount(split.group).max() <= 30 < np.bincount(cells_before.group).max()
    assert len(split.groups) == split.group.max() + 1 > len(cells_before.groups)
    assert len(split.centres) > 380 and len(np.unique(split.centres, axis=0)) == len(split.centres)

    def inertia(fitted: cells.Cells) -> float:
        return float((x.astype(float) @ fitted.centres.astype(float).T).max(1).mean())

    assert inertia(split) > inertia(cells_before) - 0.01
    # what has one direction cannot be divided, and gets fewer cells
    near = unit_half(np.eye(32)[0] + 1e-3 * rng.standard_normal((4000, 32)))
    near = np.unique(near, axis=0)
    assert 0 < len(cell_fit.fit_cells(near, 400, 8, seed=0).centres) <= 400


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), share=st.floats(0, 1))
def test_shares_add_up(sizes: list[int], share: float) -> None:
    shared = sum(size > 0 for size in sizes)
    total = max(shared, int(share * sum(sizes)))
    given_out = cell_fit.shares_by_size(np.array(sizes), total)
    assert (given_out <= np.array(sizes)).all()
    assert ((given_out > 0) == (np.array(sizes) > 0)).all()
    assert given_out.sum() == min(total, sum(sizes))
