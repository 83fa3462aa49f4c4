"""Planted truth at the sizes that the engine is promised for, through Ray."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.curate.planted import ids_for, planted, write_pool
from tests.curate.test_copies import by_id, edges_of, giant, labels, run
from tests.standins import without_ray

pytestmark = pytest.mark.slow


def test_planted_pairs_of_20000(tmp_path: Path, ray_cluster: None) -> None:
    x, source, _ = planted(20_000)
    ids = ids_for(len(x))
    pool = write_pool(tmp_path / "one", x, ids, [5000] * 4)
    copies, table = run(pool, cell_images=None, chains="keep", buckets=1)
    label, has = labels(len(x), table), np.flatnonzero(source >= 0)
    assert (label[has] == label[source[has]]).mean() >= 0.99
    edges = edges_of(copies)
    a, b = (edges.column(name).to_numpy() for name in ("a", "b"))
    exact = np.einsum("nd,nd->n", x[a].astype(float), x[b].astype(float))
    assert np.array_equal(exact, edges.column("similarity").to_numpy()) and (exact > 0.6).all()
    expected = by_id(pool, table)
    for buckets in (2, 7):
        order = np.random.default_rng(buckets).permutation(len(x))
        other = write_pool(tmp_path / str(buckets), x[order], ids[order], [1, 7999, 12_000])
        with without_ray():  # one worker
            one = run(other, cell_images=None, chains="keep", buckets=buckets)[1]
        assert by_id(other, one) == expected


def test_20000_equal_images_and_300_near_copies(tmp_path: Path, ray_cluster: None) -> None:
    pool, group = giant(tmp_path, 20_000, 300, 20_000, 384)
    copies, table = run(pool, threshold=0.8, cell_images=None)
    assert table.column("row").to_pylist() == group.tolist()
    assert len(set(table.column("keeper").to_pylist())) == 1
    assert max(step.peak_bytes for step in copies.steps.done) < 2**30


def test_5000_near_copies_stay_bounded(tmp_path: Path, ray_cluster: None) -> None:
    pool, group = giant(tmp_path, 0, 5000, 20_000, 384)
    copies, table = run(pool, threshold=0.8, cell_images=None)
    assert table.column("row").to_pylist() == group.tolist()
    assert len(set(table.column("keeper").to_pylist())) == 1
    assert max(step.peak_bytes for step in copies.steps.done) < 2**30
