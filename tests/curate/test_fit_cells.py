"""Cells that are fitted: the same on every machine, all different, as good as another library's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.copies import cells, fit_cells
from pipeline.curate.copies.fit_cells import CellPlan
from pipeline.curate.rows import exact
from pipeline.curate.rows.exact import unit_half
from tests.curate.planted import planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


def test_blocks_change_nothing(sample: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fit_cells.fit_cells(sample, CellPlan(90, 4), 3)
    monkeypatch.setattr(exact, "BLOCK", 777)
    other = fit_cells.fit_cells(sample, CellPlan(90, 4), 3)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert not np.array_equal(one.centres, fit_cells.fit_cells(sample, CellPlan(90, 4), 4).centres)


def test_cells_are_distinct_and_of_unit_length(sample: Array) -> None:
    fitted = fit_cells.fit_cells(sample, CellPlan(90, 4), 0)
    assert len(fitted.centres) == len(fitted.bucket) == len(fitted.group) == 90
    assert len(np.unique(fitted.centres, axis=0)) == 90
    assert np.allclose(np.linalg.norm(fitted.centres.astype(float), axis=1), 1, atol=2e-3)
    which = fitted.nearest(sample, 1)[:, 0]
    sizes = np.bincount(which, minlength=90)
    assert 90 * (sizes**2).sum() / len(sample) ** 2 < 2.5  # imbalance


@pytest.mark.long
def test_cells_are_as_good_as_those_of_another_library(sample: Array) -> None:
    from sklearn.cluster import KMeans

    ours = fit_cells.fit_cells(sample, CellPlan(60, 1), 0).centres.astype(float)
    theirs = KMeans(60, n_init=1, random_state=0).fit(sample.astype(float)).cluster_centers_
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    x = sample.astype(float)
    assert (x @ ours.T).max(1).mean() > (x @ theirs.T).max(1).mean() - 0.01


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_vectors(rows: int) -> None:
    x = unit_half(np.eye(8)[:rows])
    fitted = fit_cells.fit_cells(x, CellPlan(10, 3), 0)
    assert len(fitted.centres) == rows
    near = fitted.nearest(x, 8)
    assert near.shape == (rows, 8)
    assert all((row >= 0).sum() == min(8, rows) for row in near)


def test_equal_vectors_are_one_cell() -> None:
    x = np.repeat(unit_half(np.eye(4)[:2]), 50, 0)
    fitted = fit_cells.fit_cells(x, CellPlan(10, 2), 0)
    assert np.array_equal(np.unique(fitted.centres, axis=0), np.unique(x, axis=0))


@pytest.mark.long
def test_a_direction_with_most_vectors_is_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    crowd = np.eye(32)[0] + 0.1 * rng.standard_normal((3600, 32))
    x = unit_half(np.concatenate([crowd, rng.standard_normal((400, 32))]))
    asked: list[int] = []
    inner = fit_cells.kmeans

    def counted(vectors: Array, count: int, *others: Any) -> Array:
        asked.append(count)
        return inner(vectors, count, *others)

    monkeypatch.setattr(fit_cells, "kmeans", counted)
    cells_before = fit_cells.fit_cells(x, CellPlan(400, 8), 0)
    whole = max(asked)
    monkeypatch.setattr(fit_cells, "LEAST_SPLIT", 30)
    monkeypatch.setattr(fit_cells, "SKEW", 1)
    asked.clear()
    split = fit_cells.fit_cells(x, CellPlan(400, 8), 0)
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
    assert 0 < len(fit_cells.fit_cells(near, CellPlan(400, 8), 0).centres) <= 400


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), share=st.floats(0, 1))
def test_shares_add_up(sizes: list[int], share: float) -> None:
    shared = sum(size > 0 for size in sizes)
    total = max(shared, int(share * sum(sizes)))
    given_out = fit_cells.shares_by_size(np.array(sizes), total)
    assert (given_out <= np.array(sizes)).all()
    assert ((given_out > 0) == (np.array(sizes) > 0)).all()
    assert given_out.sum() == min(total, sum(sizes))


@pytest.mark.parametrize("buckets", [1, 2, 7, 30])
def test_buckets_have_room_for_all_and_not_much_more(sample: Array, buckets: int) -> None:
    centres = fit_cells.fit_cells(sample, CellPlan(120, 1), 0).centres
    bucket = fit_cells.bucket_cells(centres, CellPlan(0, buckets), 0)
    sizes = np.bincount(bucket, minlength=buckets)
    assert sizes.sum() == 120 and sizes.max() <= np.ceil(fit_cells.ROOM * 120 / buckets)
    assert bucket.max() < buckets


def test_buckets_are_levelled_by_members(sample: Array) -> None:
    centres = fit_cells.fit_cells(sample, CellPlan(120, 1), 0).centres
    sizes = np.random.default_rng(0).integers(1, 20, 120)
    sizes[:2] = 400  # more than a mean bucket
    bucket = fit_cells.bucket_cells(centres, CellPlan(0, 6), 0, sizes=sizes)
    filled = np.bincount(bucket, sizes, minlength=6)
    assert bucket[0] != bucket[1] and filled.max() <= fit_cells.ROOM * sizes.sum() / 6 + 20
    by_number = np.bincount(fit_cells.bucket_cells(centres, CellPlan(0, 6), 0), sizes, minlength=6)
    assert filled.max() < by_number.max()


def test_near_cells_share_a_bucket(sample: Array) -> None:
    fitted = fit_cells.fit_cells(sample, CellPlan(120, 1), 0)
    near = fitted.nearest(sample, 8)

    def replicas(bucket: Array) -> float:
        return float(np.mean([len(set(row)) for row in bucket[near]]))

    near_ones, by_number = (
        replicas(fit_cells.bucket_cells(fitted.centres, CellPlan(0, 12, bucketing), 0))
        for bucketing in ("near", "modulo")
    )
    assert by_number > 1.5 * near_ones


def test_a_round_of_lloyd_is_the_plain_loop(sample: Array) -> None:
    x, centres = sample[:300], sample[1000:1010]
    which = (x.astype(float) @ centres.astype(float).T).argmax(1)
    expected = centres.copy()
    for cell in set(which):
        expected[cell] = unit_half(x[which == cell].astype(float).sum(0))
    assert np.array_equal(fit_cells.lloyd(x, centres, 1), expected)
