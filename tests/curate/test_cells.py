"""Cells: the same on every machine, all different, in buckets of bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import cells, exact
from pipeline.curate.exact import unit_half
from tests.curate.planted import ids_for, planted

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def sample() -> Array:
    return planted(4000, dim=32)[0]


def test_blocks_change_nothing(sample: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    one = cells.fit(sample, 90, 4, seed=3)
    monkeypatch.setattr(exact, "BLOCK", 777)
    other = cells.fit(sample, 90, 4, seed=3)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert not np.array_equal(one.centres, cells.fit(sample, 90, 4, seed=4).centres)


def test_cells_are_distinct_and_of_unit_length(sample: Array) -> None:
    found = cells.fit(sample, 90, 4, seed=0)
    assert len(found.centres) == len(found.bucket) == len(found.group) == 90
    assert len(np.unique(found.centres, axis=0)) == 90
    assert np.allclose(np.linalg.norm(found.centres.astype(float), axis=1), 1, atol=2e-3)
    which = found.nearest(sample, 1)[:, 0]
    sizes = np.bincount(which, minlength=90)
    assert 90 * (sizes**2).sum() / len(sample) ** 2 < 2.5  # imbalance


def test_cells_are_as_good_as_those_of_another_library(sample: Array) -> None:
    from sklearn.cluster import KMeans

    ours = cells.fit(sample, 60, 1, seed=0).centres.astype(float)
    theirs = KMeans(60, n_init=1, random_state=0).fit(sample.astype(float)).cluster_centers_
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    x = sample.astype(float)
    assert (x @ ours.T).max(1).mean() > (x @ theirs.T).max(1).mean() - 0.01


def test_a_round_of_lloyd_is_the_plain_loop(sample: Array) -> None:
    x, centres = sample[:300], sample[1000:1010]
    which = (x.astype(float) @ centres.astype(float).T).argmax(1)
    wanted = centres.copy()
    for cell in set(which):
        wanted[cell] = unit_half(x[which == cell].astype(float).sum(0))
    assert np.array_equal(cells.lloyd(x, centres, 1), wanted)


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_vectors(rows: int) -> None:
    x = unit_half(np.eye(8)[:rows])
    found = cells.fit(x, 10, 3, seed=0)
    assert len(found.centres) == rows
    near = found.nearest(x, 8)
    assert near.shape == (rows, 8)
    assert all((row >= 0).sum() == min(8, rows) for row in near)


def test_equal_vectors_are_one_cell() -> None:
    x = np.repeat(unit_half(np.eye(4)[:2]), 50, 0)
    found = cells.fit(x, 10, 2, seed=0)
    assert np.array_equal(np.unique(found.centres, axis=0), np.unique(x, axis=0))


def test_two_levels_find_nearly_what_one_finds(
    sample: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cells.fit(sample, 400, 4, seed=0)
    flat = found.nearest(sample, 8)
    monkeypatch.setattr(cells, "TWO_LEVELS", 100)
    near = found.nearest(sample, 8)
    assert (flat[:, 0] == near[:, 0]).mean() > 0.95
    assert np.mean([len(set(a) & set(b)) for a, b in zip(flat, near, strict=True)]) > 7
    # every group looked at: the same
    monkeypatch.setattr(cells, "BRANCHES", len(found.groups))
    assert np.array_equal(found.nearest(sample, 8), flat)
    # cells of a large number are not moved over the borders of groups
    assert len(np.unique(cells.fit(sample, 400, 4, seed=0).centres, axis=0)) == 400


def test_saved_and_loaded(sample: Array, tmp_path: Path) -> None:
    found = cells.fit(sample, 50, 3, seed=0)
    assert found.save(str(tmp_path)) > 0
    other = cells.Cells.load(str(tmp_path), 32)
    for name in ("centres", "bucket", "group", "groups"):
        assert np.array_equal(getattr(found, name), getattr(other, name))


@pytest.mark.parametrize("buckets", [1, 2, 7, 30])
def test_buckets_have_room_for_all_and_not_much_more(sample: Array, buckets: int) -> None:
    centres = cells.fit(sample, 120, 1, seed=0).centres
    found = cells.bucket_cells(centres, buckets, 0)
    sizes = np.bincount(found, minlength=buckets)
    assert sizes.sum() == 120 and sizes.max() <= np.ceil(cells.ROOM * 120 / buckets)
    assert found.max() < buckets


def test_buckets_are_levelled_by_members(sample: Array) -> None:
    centres = cells.fit(sample, 120, 1, seed=0).centres
    sizes = np.random.default_rng(0).integers(1, 20, 120)
    sizes[:2] = 400  # more than a mean bucket
    found = cells.bucket_cells(centres, 6, 0, sizes=sizes)
    filled = np.bincount(found, sizes, minlength=6)
    assert found[0] != found[1] and filled.max() <= cells.ROOM * sizes.sum() / 6 + 20
    by_number = np.bincount(cells.bucket_cells(centres, 6, 0), sizes, minlength=6)
    assert filled.max() < by_number.max()


def test_a_direction_with_most_vectors_is_divided_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    crowd = np.eye(32)[0] + 0.1 * rng.standard_normal((3600, 32))
    x = unit_half(np.concatenate([crowd, rng.standard_normal((400, 32))]))
    asked: list[int] = []
    inner = cells.kmeans

    def counted(vectors: Array, count: int, *rest: Any) -> Array:
        asked.append(count)
        return inner(vectors, count, *rest)

    monkeypatch.setattr(cells, "kmeans", counted)
    found = cells.fit(x, 400, 8, seed=0)
    whole = max(asked)
    monkeypatch.setattr(cells, "LEAST_SPLIT", 30)
    monkeypatch.setattr(cells, "SKEW", 1)
    asked.clear()
    split = cells.fit(x, 400, 8, seed=0)
    assert max(asked) <= 30 < whole
    assert np.bincount(split.group).max() <= 30 < np.bincount(found.group).max()
    assert len(split.groups) == split.group.max() + 1 > len(found.groups)
    assert len(split.centres) > 380 and len(np.unique(split.centres, axis=0)) == len(split.centres)

    def inertia(fitted: cells.Cells) -> float:
        return float((x.astype(float) @ fitted.centres.astype(float).T).max(1).mean())

    assert inertia(split) > inertia(found) - 0.01
    # what has one direction cannot be divided, and gets fewer cells
    near = unit_half(np.eye(32)[0] + 1e-3 * rng.standard_normal((4000, 32)))
    near = np.unique(near, axis=0)
    assert 0 < len(cells.fit(near, 400, 8, seed=0).centres) <= 400


def test_near_cells_share_a_bucket(sample: Array) -> None:
    found = cells.fit(sample, 120, 1, seed=0)
    near = found.nearest(sample, 8)

    def replicas(bucket: Array) -> float:
        return float(np.mean([len(set(row)) for row in bucket[near]]))

    clustered = replicas(cells.bucket_cells(found.centres, 12, 0))
    assert replicas(cells.bucket_cells(found.centres, 12, 0, "modulo")) > 1.5 * clustered


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=20), share=st.floats(0, 1))
def test_shares_add_up(sizes: list[int], share: float) -> None:
    held = sum(size > 0 for size in sizes)
    total = max(held, int(share * sum(sizes)))
    given_out = cells.shares(np.array(sizes), total)
    assert (given_out <= np.array(sizes)).all()
    assert ((given_out > 0) == (np.array(sizes) > 0)).all()
    assert given_out.sum() == min(total, sum(sizes))


def test_hashes_are_uniform_and_differ_by_seed() -> None:
    ids = ids_for(20_000)
    one, other = cells.hash64(0, ids), cells.hash64(1, ids)
    for found in (one, other):
        counts = np.bincount((found >> np.uint64(60)).astype(int), minlength=16)
        assert abs(counts - 1250).max() < 200
    assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 0.05
    assert len(np.unique(one)) == len(ids)
    consecutive = np.zeros((1000, 16), np.uint8)
    consecutive[:, 15] = np.arange(1000) % 256
    consecutive[:, 14] = np.arange(1000) // 256
    top = (cells.hash64(0, consecutive) >> np.uint64(60)).astype(int)
    assert np.bincount(top, minlength=16).min() > 30


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
        items = rows * views * cells.REPLICAS / buckets * cells.ROOM
        assert items * 384 * 6 < 1.2 * 2**30
