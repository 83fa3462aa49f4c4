"""Hierarchy and balanced sample: exact size, order of rows, planted concepts, edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planted_vectors import ids_of_numbers, written

from pipeline.curate.choose import hierarchy, lloyd
from pipeline.curate.choose.balance import Sample, balanced_sample, effective, leaf_shares
from pipeline.curate.choose.hierarchy import Levels
from pipeline.curate.choose.kmeans import KMeans
from pipeline.curate.rows.draws_by_id import BALANCE, draw
from pipeline.curate.rows.exact import Centres, unit_half
from pipeline.curate.rows.tables import BALANCED, read_table
from pipeline.curate.steps.steps import Steps
from pipeline.errors import PipelineError
from tests.standins import run_here


@pytest.fixture(autouse=True)
def here(monkeypatch):
    run_here(monkeypatch)


def long_tail(count=500, concepts=30, dim=24, seed=0):
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, concepts + 1) ** 1.3
    concept = rng.choice(concepts, count, p=chance / chance.sum())
    centres = rng.standard_normal((concepts, dim))
    vectors = unit_half(centres[concept] + 0.5 * rng.standard_normal((count, dim)))
    return ids_of_numbers(range(count)), vectors, concept


def sampled(folder: Path, rows, levels, images, floor=1, members=2, order=None):
    """The images chosen, as places in the original order, and the summary."""
    built = hierarchy.build(Steps(folder / "levels"), rows, Levels(levels, 7, 2, 1))
    asked = Sample(images, 7, floor, members)
    sample = balanced_sample(Steps(folder / "balanced"), rows, built, asked)
    chosen = []
    for name in rows.names:
        table = read_table(sample.result.folder, name)
        assert table.schema.equals(BALANCED)
        chosen += table["row"].to_numpy()[table["chosen"].to_numpy()].tolist()
    order = np.arange(rows.rows) if order is None else order
    return order[chosen], sample, built


@pytest.mark.long
def test_more_concepts_than_at_random_and_the_same_in_any_order(tmp_path: Path, monkeypatch):
    ids, vectors, concept = long_tail()
    rows = written(tmp_path / "one", ids, vectors)
    chosen, sample, built = sampled(tmp_path / "one", rows, (16, 8), 60)
    assert len(chosen) == len(set(chosen)) == 60
    random = np.random.default_rng(0).permutation(500)[:60]
    got, before = effective(np.bincount(concept[chosen])), effective(np.bincount(concept[random]))
    assert got > 1.4 * before
    order = np.random.default_rng(2).permutation(500)
    monkeypatch.setattr(lloyd, "LOCAL_BYTES", 0)
    monkeypatch.setattr(lloyd, "GROUP_ROWS", 1)
    monkeypatch.setattr("pipeline.curate.choose.first_few.GROUP_ROWS", 100)
    rows = written(tmp_path / "many", ids, vectors, 2, order)
    again, other, _ = sampled(tmp_path / "many", rows, (16, 8), 60, order=order)
    assert set(again) == set(chosen)
    assert other.summary == sample.summary
    # what the summary says, counted anew
    leaves, _ = Centres(built.leaves.centroids(), "").nearest_one(vectors)
    np.testing.assert_array_equal(built.sizes, np.bincount(leaves, minlength=16))
    after = np.bincount(leaves[chosen], minlength=16)
    assert sample.summary["sizes_after"] == after.tolist()
    first, top = sample.summary["levels"]
    assert first["effective_after"] == pytest.approx(effective(after))
    assert first["unsampled"] == ((built.sizes > 0) & (after == 0)).sum()
    tops = np.bincount(built.tops()[leaves[chosen]])
    assert top["largest_after"] == tops.max() / 60 and top["clusters"] == len(tops)


def test_a_leaf_gives_the_first_by_hash(tmp_path: Path):
    ids, vectors, _ = long_tail(300)
    rows = written(tmp_path, ids, vectors, 2)
    chosen, _, built = sampled(tmp_path, rows, (12, 4), 60)
    leaves, _ = Centres(built.leaves.centroids(), "").nearest_one(vectors)
    quota = leaf_shares(built.sizes, built.parents, 60, 1, 2).leaves
    keys = draw(7, 0, ids, BALANCE)
    expected = [
        i
        for leaf in range(12)
        for i in sorted(np.flatnonzero(leaves == leaf), key=lambda i: keys[i])[: quota[leaf]]
    ]
    assert sorted(chosen) == sorted(expected)


@pytest.mark.parametrize(
    ("count", "images", "size"),
    [(0, 5, 0), (1, 5, 1), (2, 1, 1), (40, 0, 0), (40, 1, 1), (40, 39, 39), (40, 1000, 40)],
)
def test_size_is_exact_at_the_edges(tmp_path: Path, count, images, size):
    ids, vectors, _ = long_tail(max(count, 1))
    rows = written(tmp_path, ids[:count], vectors[:count], 2)
    chosen, sample, _ = sampled(tmp_path, rows, (10, 3), images)
    assert len(chosen) == size == sample.summary["chosen"]


def test_equal_rows(tmp_path: Path):
    vectors = np.repeat(unit_half(np.ones((1, 8))), 30, 0)
    rows = written(tmp_path, ids_of_numbers(range(30)), vectors, 2)
    chosen, sample, _ = sampled(tmp_path, rows, (10, 3), 7)
    assert len(chosen) == 7 and sample.summary["levels"][0]["clusters"] == 1


def test_floor_is_honoured_or_its_failure_stated(tmp_path: Path):
    ids, vectors, _ = long_tail(400)
    rows = written(tmp_path, ids, vectors)
    for images, honoured in ((80, True), (12, False)):
        _, sample, built = sampled(tmp_path, rows, (30, 6), images, floor=1, members=3)
        summary = sample.summary
        large = built.sizes >= 3
        after = np.array(summary["sizes_after"])
        assert summary["leaves_with_floor"] == large.sum()
        assert summary["floor_honoured"] is honoured
        assert summary["leaves_floor_met"] == (after[large] >= 1).sum()
    _, without, _ = sampled(tmp_path, rows, (30, 6), 31, floor=0)
    assert without.summary["levels"][0]["unsampled"] > 0


def test_resampling_takes_the_nearest_of_each_leaf(tmp_path: Path):
    ids, vectors, _ = long_tail(400)
    rows = written(tmp_path, ids, vectors, 3)
    hierarchy.build(Steps(tmp_path / "levels"), rows, Levels((10, 3), 7, 4, 1))
    leaves = read_table(str(tmp_path / "levels" / "assigned-0"), "00000")
    got = {n: set(read_table(str(tmp_path / "levels/near-1/rows"), n)["row"].to_pylist())
           for n in rows.names}  # fmt: skip
    got = set().union(*got.values())
    tables = [read_table(str(tmp_path / "levels" / "assigned-0"), n) for n in rows.names]
    leaf = np.concatenate([t["leaf"].to_numpy() for t in tables])
    near = np.concatenate([t["similarity"].to_numpy() for t in tables])
    expected = set()
    for cluster in range(10):  # half the mean size is 20
        members = np.flatnonzero(leaf == cluster)
        expected |= set(sorted(members, key=lambda i: (-near[i], ids[i].tobytes()))[:20])
    assert got == expected and leaves.num_rows


def test_default_levels():
    assert hierarchy.default_levels(0, 384) == (1,)
    assert hierarchy.default_levels(890, 384) == (29,)
    assert hierarchy.default_levels(900, 384) == (30, 10)
    assert hierarchy.default_levels(6_000, 384) == (200, 66)
    assert hierarchy.default_levels(20_000, 384) == (666, 222)
    assert hierarchy.default_levels(60_000, 384) == (2000, 300)
    assert hierarchy.default_levels(10**6, 384) == (33_333, 3_333, 333)
    assert hierarchy.default_levels(10**9, 384) == (100_000, 10_000, 1_000, 300)
    assert hierarchy.default_levels(10**9, 4096)[0] == 2**27 // 4096
    for rows in (10**4, 10**5, 10**7):
        hierarchy.check_levels(hierarchy.default_levels(rows, 64))


def test_levels_in_the_wrong_order_are_refused(tmp_path: Path):
    ids, vectors, _ = long_tail(50)
    rows = written(tmp_path, ids, vectors)
    with pytest.raises(PipelineError, match="finest level first"):
        hierarchy.build(Steps(tmp_path / "levels"), rows, Levels((3, 10), 0, 2, 1))


def test_levels_have_no_empty_cluster():
    rng = np.random.default_rng(0)
    points = unit_half(np.repeat(rng.standard_normal((5, 8)), 4, 0))  # five distinct
    centroids, parents = hierarchy.level_of(points, KMeans(12, 0, 3), 2)
    assert len(centroids) == 5 and sorted(set(parents)) == list(range(5))
    np.testing.assert_array_equal(np.bincount(parents), [4] * 5)
