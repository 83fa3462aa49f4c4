"""Water-filling against a ten-line loop and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.choose.balance import effective, largest, leaf_shares, waterfill

sizes_and_floors = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=8)


def poured(sizes, target, floors):
    """One image at a time to whoever has least, then to the largest, then to the first."""
    given_ = list(floors)
    for _ in range(min(target, sum(sizes)) - sum(floors)):
        able = [i for i in range(len(sizes)) if given_[i] < sizes[i]]
        given_[min(able, key=lambda i: (given_[i], -sizes[i], i))] += 1
    return given_


@settings(deadline=None)
@given(sizes_and_floors, st.integers(0, 100))
def test_is_the_loop(members, target):
    sizes = [size for size, _ in members]
    floors = [min(size, floor) for size, floor in members]
    if sum(floors) > target:
        floors = [0] * len(sizes)
    got = waterfill(np.array(sizes, np.int64), target, np.array(floors, np.int64))
    assert got.tolist() == poured(sizes, target, floors)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=20), st.integers(0, 600))
def test_exact_capped_monotone_and_as_equal_as_can_be(sizes, target):
    sizes = np.array(sizes, np.int64)
    got, more = waterfill(sizes, target), waterfill(sizes, target + 1)
    assert got.sum() == min(target, sizes.sum())
    assert (got <= sizes).all() and (got >= 0).all()
    assert (more >= got).all()  # one more image takes none away
    order = np.lexsort((-np.arange(len(sizes)), sizes))
    assert (np.diff(got[order]) >= 0).all()  # who has more gives no less
    open_ = got < sizes
    assert not open_.any() or got.max() - got[open_].min() <= 1


def by_hand(sizes, parents, target, floors):
    """From the top: the images of a cluster shared out among its children, leaf lists in dicts."""
    tops = list(range(len(sizes)))
    for above in parents:
        tops = [int(above[t]) for t in tops]
    if not parents:
        return poured(sizes, target, floors)
    count = max(tops) + 1
    pool = [sum(s for s, t in zip(sizes, tops, strict=True) if t == c) for c in range(count)]
    least = [sum(f for f, t in zip(floors, tops, strict=True) if t == c) for c in range(count)]
    out = [0] * len(sizes)
    for cluster, part in enumerate(poured(pool, target, least)):
        leaves = [i for i, t in enumerate(tops) if t == cluster]
        below = parents[:-1]
        if below:  # only the levels under this cluster
            middle = sorted({mid(i, below) for i in leaves})
            rename = {m: k for k, m in enumerate(middle)}
            lowest = [np.array([rename[mid(i, below)] for i in leaves])]
            got = by_hand([sizes[i] for i in leaves], lowest, part, [floors[i] for i in leaves])
        else:
            got = poured([sizes[i] for i in leaves], part, [floors[i] for i in leaves])
        for i, n in zip(leaves, got, strict=True):
            out[i] = n
    return out


def mid(leaf, parents):
    for above in parents:
        leaf = int(above[leaf])
    return leaf


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 250))
def test_three_levels_by_hand(seed, target):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 20, 15)
    parents = [
        np.concatenate([np.arange(6), rng.integers(0, 6, 9)]),
        np.concatenate([np.arange(2), rng.integers(0, 2, 4)]),
    ]
    got = leaf_shares(sizes, parents, target, floor=1, floor_members=5)
    floors = np.where(sizes >= 5, 1, 0)
    if floors.sum() <= target:
        assert got.leaves.tolist() == by_hand(sizes.tolist(), parents, target, floors.tolist())
        assert got.floor_met == got.floored == floors.sum()
        assert (got.leaves >= floors).all()
    else:  # every image goes to another leaf with a floor
        assert got.floor_met == target == got.leaves.sum() and got.leaves.max(initial=0) <= 1
        assert got.floored == floors.sum()
    assert got.leaves.sum() == min(target, sizes.sum())
    assert (got.leaves <= sizes).all()


@pytest.mark.parametrize(("floor", "expected"), [(0, [9, 0, 0]), (2, [5, 2, 2]), (99, [3, 3, 3])])
def test_floor_takes_from_the_large(floor, expected):
    """Leaf 0 is a top cluster of its own; without a floor nothing else is in the other one."""
    got = leaf_shares(np.array([100, 3, 3]), [np.array([0, 0, 0])], 9, floor, floor_members=3)
    assert got.leaves.sum() == 9
    if floor:
        assert got.leaves[1:].min() >= min(floor, 3)
    assert got.floor_met == (2 if floor == 99 else got.floored)  # leaf 0 cannot give 99 of 9


def test_no_leaves_and_empty_cells():
    assert leaf_shares(np.zeros(0, int), [], 5, 1, 2).leaves.tolist() == []
    got = leaf_shares(np.array([0, 4, 0, 1]), [np.array([0, 1, 0, 1])], 3, 1, 1)
    assert got.leaves.tolist() == [0, 2, 0, 1]
    assert waterfill(np.zeros(3, int), 2).tolist() == [0, 0, 0]


def test_effective_number_of_clusters():
    assert effective(np.array([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert effective(np.array([3, 1])) == pytest.approx(math.exp(0.5623351446))
    assert effective(np.zeros(3)) == 0 and largest(np.zeros(0)) == 0
    assert largest(np.array([1, 3])) == 0.75
