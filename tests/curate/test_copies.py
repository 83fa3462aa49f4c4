"""Copies from vectors to components, against planted truth and plain loops over all pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pipeline.curate.copies import forest, join, keeper_facts
from pipeline.curate.copies.keepers import CopyRule
from pipeline.curate.copies.leaks import count_leaked, find_leaks, leaks_that_hold
from pipeline.curate.copies.matches import MATCHES, find_matches
from pipeline.curate.copies.other_sets import look_up
from pipeline.curate.copies.pairs import (
    STORED,
    Index,
    Pairs,
    Search,
    find_pairs,
    put_in_cells,
)
from pipeline.curate.copies.which_are_copies import group_copies
from pipeline.curate.look.look_at_pairs import VERDICTS
from pipeline.curate.rows import tables
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.steps.steps import Output, Step, Steps
from pipeline.errors import DataError
from pipeline.shards.shards import ShardColumns, ShardFile
from tests.curate.planted import (
    Pool,
    all_views,
    ids_for,
    planted,
    read_all,
    visiting,
    write_pool,
)
from tests.standins import without_ray

Array = np.ndarray[Any, Any]
T = 0.6
COLUMNS = ShardColumns("", "image", "label")


@dataclass
class Run:
    """Pairs and groups of a pool, and the steps that it took."""

    steps: Steps
    pairs: Pairs
    components: Step

    @property
    def index(self) -> Index:
        """The pool in its buckets."""
        return self.pairs.index


def run(
    pool: Pool,
    *,
    threshold: float = T,
    guard: float = 0.1,
    chains: str = "split",
    going: Sequence[Step] = (),
    exact: Step | None = None,
    root: Path | str = "",
    **search: Any,
) -> tuple[Run, pa.Table]:
    """Pairs and components of a pool."""
    images, how = pool.images(exact), Search(**({"probes": 8, "cell_images": 60} | search))
    steps = Steps(root or pool.root / "run")
    pairs = find_pairs(steps, put_in_cells(steps, images, how), how, threshold)
    rule = CopyRule(threshold, guard, chains)
    groups = group_copies(steps, pairs, images, pool.prints, rule, going)
    return Run(steps, pairs, groups), read_all(groups.folder, pool.inputs)


def step_of(done: Run, name: str) -> Step:
    return next(step for step in done.steps.done if step.name == name)


def by_id(pool: Pool, table: pa.Table) -> set[tuple[Any, ...]]:
    """Components without rows: what must not depend on their order."""
    row = table.column("row").to_numpy()
    own = [bytes(pool.ids[r]) for r in row]
    columns = ("component", "size", "keeper_id", "similarity", "chained")
    return set(zip(own, *(table.column(name).to_pylist() for name in columns), strict=True))


def edges_of(done: Run) -> pa.Table:
    return done.pairs.edges.every(tables.EDGES)


def brute(x: Array, threshold: float) -> Array:
    """Component of each row by all pairs."""
    i, j = np.nonzero(x.astype(float) @ x.astype(float).T > threshold)
    graph = coo_array((np.ones(len(i)), (i, j)), shape=(len(x), len(x)))
    label: Array = connected_components(graph, directed=False)[1]
    return label


def labels(n: int, table: pa.Table) -> Array:
    """Component of each row, its own where it is in none."""
    label = np.arange(n)
    names = table.column("component").to_pylist()
    numbers = {name: n + place for place, name in enumerate(sorted(set(names)))}
    label[table.column("row").to_numpy()] = [numbers[name] for name in names]
    return label


@pytest.fixture(scope="module")
def small() -> tuple[Array, Array, Array]:
    return planted(3000, dim=64, lowest=0.75)


def test_planted_pairs_join_and_edges_are_exact(
    small: tuple[Array, Array, Array], tmp_path: Path
) -> None:
    x, source, _ = small
    pool = write_pool(tmp_path, x, ids_for(len(x)), [1000, 500, 1500])
    with without_ray():
        copies, table = run(pool, threshold=0.7, chains="keep")
    label, has = labels(len(x), table), np.flatnonzero(source >= 0)
    assert (label[has] == label[source[has]]).mean() >= 0.99
    edges = edges_of(copies)
    a, b = edges.column("a").to_numpy(), edges.column("b").to_numpy()
    exact = (x[a].astype(float) * x[b].astype(float)).sum(1)
    assert np.array_equal(exact, edges.column("similarity").to_numpy())
    assert (exact > 0.7).all() and (a != b).all()
    # a forest: one edge less than rows in each component
    rows, components = np.unique(np.append(a, b)), set(table.column("component").to_pylist())
    assert len(edges) == len(rows) - len(components) and len(table) == len(rows)
    # nothing joined that all pairs do not join
    truth = brute(x, 0.7)
    for component in np.unique(label):
        assert len(set(truth[label == component])) == 1


def test_the_forest_is_of_maximum_weight(tmp_path: Path) -> None:
    from scipy.sparse.csgraph import minimum_spanning_tree

    x, _, _ = planted(300, dim=32, lowest=0.7, copies=0.5)
    pool = write_pool(tmp_path, x, ids_for(300), [300])
    with without_ray():
        copies, _ = run(pool, threshold=0.5, probes=300)
    all_of = np.triu(x.astype(float) @ x.astype(float).T, 1)
    weight = np.where(all_of > 0.5, 2.0 - all_of, 0)
    tree = minimum_spanning_tree(coo_array(weight).tocsr())
    mine = np.sort(edges_of(copies).column("similarity").to_numpy())
    assert np.allclose(mine, np.sort(2.0 - tree.data), atol=1e-12)


@pytest.mark.parametrize("buckets, portion, files", [(2, 700, [3000]), (7, 3000, [1] * 5 + [2995])])
def test_buckets_files_and_portions_change_nothing(
    small: tuple[Array, Array, Array], tmp_path: Path, buckets: int, portion: int, files: list[int]
) -> None:
    x, _, _ = small
    ids = ids_for(len(x))
    order = np.random.default_rng(buckets).permutation(len(x))
    one = write_pool(tmp_path / "one", x, ids, [3000])
    other = write_pool(tmp_path / "other", x[order], ids[order], files)
    with without_ray():
        a = run(one, threshold=0.7, buckets=1)
        b = run(other, threshold=0.7, buckets=buckets, portion_rows=portion)
    assert by_id(one, a[1]) == by_id(other, b[1]) and len(a[1]) > 400

    def named(pool: Pool, copies: Run) -> list[tuple[bytes, bytes, float]]:
        edges = edges_of(copies)
        rows = [pool.ids[edges.column(name).to_numpy()] for name in ("a", "b")]
        similarity = edges.column("similarity").to_pylist()
        return [(bytes(p), bytes(q), s) for p, q, s in zip(*rows, similarity, strict=True)]

    assert named(one, a[0]) == named(other, b[0])
    assert b[0].index.buckets == buckets


@pytest.mark.parametrize("shards", [2, 7])
def test_shards_of_the_forest_change_nothing(
    small: tuple[Array, Array, Array], tmp_path: Path, shards: int
) -> None:
    x = small[0].copy()
    x[100:130] = x[99]  # equal vectors, which one stands for
    around = np.linspace(0, 1.9 * np.pi, 200)[:, None]  # and a long chain of neighbours
    x[200:400] = unit_half(np.cos(around) * x[200] + np.sin(around) * x[201])
    order = np.random.default_rng(shards).permutation(len(x))
    pool = write_pool(tmp_path / "one", x[order], ids_for(len(x)), [1000, 2000])
    other = write_pool(tmp_path / "other", x[order], ids_for(len(x)), [1000, 2000])
    with without_ray():
        a = run(pool, threshold=0.7, buckets=4, shards=1)
        b = run(other, threshold=0.7, buckets=4, shards=shards)
    one, many = edges_of(a[0]), edges_of(b[0])
    assert len(b[0].pairs.edges.tables) == shards
    by = [("a", "ascending"), ("b", "ascending")]
    assert one.sort_by(by).equals(many.sort_by(by)) and len(one) > 600
    assert a[1].equals(b[1])


def test_vectors_on_disk_change_nothing(
    small: tuple[Array, Array, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, crops, _ = with_views(240)
    for name, limit in (("memory", keeper_facts.IN_MEMORY), ("disk", 0)):
        monkeypatch.setattr(keeper_facts, "IN_MEMORY", limit)
        plain = write_pool(tmp_path / f"{name}-a", small[0][:500], ids_for(500), [200, 300])
        views = write_pool(tmp_path / f"{name}-b", full, ids_for(240), [100, 140], crops=crops)
        with without_ray():
            found_groups = run(plain, guard=0.0)[1], run(views, threshold=0.7, penalty=0.05)[1]
        if name == "memory":
            expected = found_groups
    assert found_groups[0].equals(expected[0]) and found_groups[1].equals(expected[1])
    assert len(found_groups[0]) > 50 and len(found_groups[1]) > 50


def test_workers_of_ray_change_nothing_and_a_rerun_reuses(
    small: tuple[Array, Array, Array], tmp_path: Path, ray_cluster: None
) -> None:
    x, _, _ = small
    pool = write_pool(tmp_path / "ray", x, ids_for(len(x)), [1500, 1500])
    plain = write_pool(tmp_path / "plain", x, ids_for(len(x)), [1500, 1500])
    a, table = run(pool, threshold=0.7, buckets=3)
    with without_ray():
        b = run(plain, threshold=0.7, buckets=3)[1]
    assert by_id(pool, table) == by_id(plain, b)
    again, same = run(pool, threshold=0.7, buckets=3)
    assert all(step.reused == len(step.accounts) for step in again.steps.done)
    assert same.equals(table) and not any(step.reused for step in a.steps.done)
    # another threshold joins nothing anew
    rule = CopyRule(0.9)
    higher = group_copies(again.steps, again.pairs, pool.images(), pool.prints, rule)
    assert 0 < higher.total("rows") < len(table)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("equal", [True, False])
def test_few_rows(tmp_path: Path, rows: int, equal: bool) -> None:
    x = unit_half(np.eye(3)[[0] * rows] if equal else np.eye(3)[:rows].reshape(rows, 3))
    pool = write_pool(tmp_path, x, ids_for(rows), [rows] if rows else [])
    with without_ray():
        copies, table = run(pool) if rows else (None, None)
        if not rows:
            empty = write_pool(tmp_path / "empty", x, ids_for(0), [0])
            assert len(run(empty)[1]) == 0
            steps, images, search = Steps(tmp_path / "none"), pool.images(), Search(8)
            nothing = find_pairs(steps, put_in_cells(steps, images, search), search, T)
            assert len(nothing.edges.every(tables.EDGES)) == 0
            return
    assert copies is not None and table is not None
    assert len(table) == (2 if rows == 2 and equal else 0)


def test_all_equal_leaves_one(tmp_path: Path) -> None:
    x = np.repeat(unit_half(np.random.default_rng(0).standard_normal((1, 16))), 500, 0)
    pool = write_pool(tmp_path, x, ids_for(500), [200, 300])
    with without_ray():
        copies, table = run(pool)
    smallest = min(bytes(i) for i in pool.ids)
    assert set(table.column("keeper_id").to_pylist()) == {smallest}
    assert len(table) == 500 and len(edges_of(copies)) == 499
    assert copies.index.equal.total("copies") == 499


@pytest.mark.parametrize("views", [False, True])
def test_a_file_whose_only_copies_are_of_rows_elsewhere(tmp_path: Path, views: bool) -> None:
    rng = np.random.default_rng(0)
    dim = 143 if views else 16
    x = unit_half(rng.standard_normal((80, dim)))
    ids = ids_for(80)
    low, high = sorted((3, 60), key=lambda row: bytes(ids[row]))
    x[high] = x[low]  # equal vectors: the smaller id stands for the other one, in another file
    crops = unit_half(rng.standard_normal((80, 9, dim))) if views else None
    if crops is not None:
        crops[high] = crops[low]
    pool = write_pool(tmp_path, x, ids, [40, 40], crops=crops)
    with without_ray():
        _, table = run(pool, threshold=0.9)
    assert sorted(table.column("row").to_pylist()) == [3, 60]
    assert len(set(table.column("keeper").to_pylist())) == 1


def test_vectors_of_zeros_are_like_nothing(tmp_path: Path) -> None:
    x = np.zeros((4, 8), np.float16)
    x[3, 0] = 1
    with without_ray():
        copies, table = run(write_pool(tmp_path, x, ids_for(4), [4]))
    assert len(table) == 0 and len(edges_of(copies)) == 0


def giant(tmp_path: Path, equal: int, near: int, other: int, dim: int) -> tuple[Pool, Array]:
    rng = np.random.default_rng(0)
    one = rng.standard_normal(dim)
    one /= np.linalg.norm(one)
    x = np.concatenate(
        [
            np.repeat(one[None], equal, 0),
            one + 0.02 * rng.standard_normal((near, dim)),
            rng.standard_normal((other, dim)),
        ]
    )
    order = rng.permutation(len(x))
    files = [len(x) // 2, len(x) - len(x) // 2]
    pool = write_pool(tmp_path, unit_half(x)[order], ids_for(len(x)), files)
    return pool, np.flatnonzero(order < equal + near)


def test_giant_group_has_one_survivor(tmp_path: Path) -> None:
    pool, group = giant(tmp_path, 2000, 100, 900, 64)
    with without_ray():
        copies, table = run(pool, threshold=0.8)
    assert table.column("row").to_pylist() == group.tolist()
    assert len(set(table.column("keeper").to_pylist())) == 1
    assert set(table.column("size").to_pylist()) == {2100}
    assert step_of(copies, "copies/pairs").total("compared") < 20 * 1001**2


def test_many_near_copies_in_one_cell_stay_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forest, "PENDING", 5000)
    monkeypatch.setattr(join, "TILE", 64)
    pool, group = giant(tmp_path, 0, 700, 100, 32)
    with without_ray():
        copies, table = run(pool, threshold=0.8, cell_images=800)
    assert table.column("row").to_pylist() == group.tolist()
    assert len(set(table.column("keeper").to_pylist())) == 1
    assert len(edges_of(copies)) == 699


def chain(step: float, count: int) -> Array:
    """Vectors in a plane, neighbours at the given cosine."""
    angle = np.arange(count) * np.arccos(step)
    return unit_half(np.stack([np.cos(angle), np.sin(angle)] + [0 * angle] * 6, 1))


@pytest.mark.parametrize("chains, keepers", [("keep", 1), ("split", 2)])
def test_a_chain_is_split_where_wanted(tmp_path: Path, chains: str, keepers: int) -> None:
    # A-B-C-D with cosines .8 to the next, .28 and -.35 further on; A is the largest image.
    pool = write_pool(tmp_path, chain(0.8, 4), ids_for(4), [4], areas=np.array([40, 30, 20, 10]))
    with without_ray():
        _, table = run(pool, threshold=0.7, chains=chains)
    assert table.column("size").to_pylist() == [4] * 4
    assert table.column("chained").to_pylist() == [False, False, True, True]
    assert len(set(table.column("component").to_pylist())) == 1
    keeper = table.column("keeper").to_pylist()
    assert keeper == ([0, 0, 0, 0] if chains == "keep" else [0, 0, 2, 2])
    assert len(set(keeper)) == keepers


def test_a_hub_that_comes_last_leaves_one(tmp_path: Path) -> None:
    # Spokes are not alike (.49), each is like the hub (.7): a rule of earlier neighbours keeps all.
    x = np.concatenate([0.7 * np.eye(9)[:8], np.zeros((1, 9))])
    x[:8, 8] = np.sqrt(1 - 0.49)
    x[8, 8] = 1
    pool = write_pool(tmp_path, unit_half(x), ids_for(9), [9], areas=np.array([1] * 8 + [9]))
    with without_ray():
        _, table = run(pool, threshold=0.6)
    assert table.column("keeper").to_pylist() == [8] * 9
    similarity = table.column("similarity").to_numpy()
    assert similarity[8] == 1 and np.allclose(similarity[:8], np.sqrt(0.51), atol=1e-3)


@pytest.mark.parametrize("wins", ["as_is", "area", "density", "id"])
def test_who_is_kept(tmp_path: Path, wins: str) -> None:
    x = np.repeat(unit_half(np.eye(4)[:1]), 4, 0)
    ids = np.arange(4, dtype=np.uint8)[::-1].repeat(16).reshape(4, 16)  # row 3 has the smallest
    areas, densities = np.array([100, 100, 100, 100]), np.array([2, 2, 2, 2])
    kinds = [tables.POOL, tables.POOL]
    if wins in ("as_is", "area", "density"):
        densities[2] = 9
    if wins in ("as_is", "area"):
        areas[1] = 400
    if wins == "as_is":
        kinds[0] = tables.AS_IS
    pool = write_pool(tmp_path, x, ids, [1, 3], kinds=kinds, areas=areas, densities=densities)
    with without_ray():
        _, table = run(pool)
    expected = {"as_is": 0, "area": 1, "density": 2, "id": 3}[wins]
    assert table.column("keeper").to_pylist() == [expected] * 4
    assert set(table.column("component").to_pylist()) == {bytes(16)}


def with_views(n: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Descriptors with crops: of every third image the next is a mirror, the one after a crop."""
    rng = np.random.default_rng(seed)
    full = unit_half(rng.standard_normal((n, 143)))
    crops = unit_half(rng.standard_normal((n, 9, 143)))
    first = np.arange(0, n - 2, 6)
    sign = np.tile((-1.0) ** np.arange(12), 12)[1:]
    full[first + 1] = unit_half(full[first] * sign + 0.03 * rng.standard_normal((len(first), 143)))
    noise = 0.03 * rng.standard_normal((len(first), 143))
    full[first + 2] = unit_half(crops[first, 4] * sign + noise)
    return full, crops, first


def test_mirrors_and_crops_are_found_from_both_sides(tmp_path: Path) -> None:
    full, crops, first = with_views(240)
    areas = np.ones(240, int)
    areas[first] = 9  # a mirror and a crop are like the image, not like each other
    pool = write_pool(tmp_path, full, ids_for(240), [100, 140], crops=crops, areas=areas)
    with without_ray():
        copies, table = run(pool, threshold=0.7, penalty=0.05, buckets=3)
    rows = np.sort(np.concatenate([first, first + 1, first + 2]))
    assert table.column("row").to_pylist() == rows.tolist()
    assert set(table.column("size").to_pylist()) == {3}
    assert not any(table.column("chained").to_pylist())
    # every similarity is the best of all views, by a plain loop
    items, crop = all_views(full, crops)
    edges = edges_of(copies).to_pylist()
    assert len(edges) == 2 * len(first)
    for edge in edges:
        a, b = edge["a"], edge["b"]
        seen = [
            float(items[p, v].astype(float) @ full[q].astype(float)) - 0.05 * crop[v]
            for p, q in ((a, b), (b, a))
            for v in range(20)
        ]
        assert edge["similarity"] == max(seen)
    for one in table.to_pylist():
        if one["row"] == one["keeper"]:
            assert one["similarity"] == 1


def test_the_penalty_counts_for_crops_only(tmp_path: Path) -> None:
    full, crops, first = with_views(60)
    pool = write_pool(tmp_path, full, ids_for(60), [60], crops=crops)
    with without_ray():
        _, table = run(pool, threshold=0.7, penalty=0.29)
    assert table.column("row").to_pylist() == np.sort(np.append(first, first + 1)).tolist()


def leak_pool(tmp_path: Path) -> tuple[Pool, dict[str, Any], Array]:
    """Rows 0 to 39 are copies of queries at .9 to .5, rows 40 to 79 are like none."""
    rng = np.random.default_rng(3)
    queries = unit_half(rng.standard_normal((40, 64)))
    s = np.linspace(0.95, 0.5, 40)[:, None]
    other = rng.standard_normal((80, 64))
    q = queries.astype(float)
    other[:40] -= (other[:40] * q).sum(1, keepdims=True) * q
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    x = other.copy()
    x[:40] = s * q + np.sqrt(1 - s * s) * other[:40]
    x = np.concatenate([unit_half(x), unit_half(x[:1]), unit_half(x[:1])])  # 80, 81: equal to 0
    pool = write_pool(tmp_path, x, ids_for(82), [30, 30, 22])
    sets = {}
    for name, part in (("b", queries[:25]), ("a", queries[20:])):
        other_pool = write_pool(tmp_path / name, part, ids_for(len(part), 7), [len(part)])
        sets[name] = other_pool.images()
    return pool, sets, queries


@pytest.mark.parametrize("buckets", [1, 3])
def test_leaks_are_the_best_match_of_each_row(
    tmp_path: Path, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "PENDING", 5)
    pool, sets, queries = leak_pool(tmp_path)
    x = tables.matrix(
        pa.concat_tables(
            [tables.read_table(pool.vectors.folder, name) for name in pool.vectors.names]
        ).column("vector"),
        64,
    )
    with without_ray():
        copies, _ = run(pool, cell_images=10, buckets=buckets)
        result, counted = find_leaks(copies.steps, copies.index, pool.inputs, sets, 0.55)
    table = read_all(result.folder, pool.inputs).to_pylist()
    products = x.astype(float) @ queries.astype(float).T
    expected = {}
    for row in np.flatnonzero(products.max(1) > 0.55):
        best = int(products[row].argmax())
        # queries 20 to 24 are in both sets: then the first name
        name, at = ("a", best - 20) if best >= 20 else ("b", best)
        size = {"a": 20, "b": 25}[name]
        expected[int(row)] = (name, bytes(ids_for(size, 7)[at]), float(products[row, best]))
    assert {
        one["row"]: (one["set"], one["query_id"], one["similarity"]) for one in table
    } == expected
    assert {80, 81, 0} <= set(expected) and not set(range(40, 80)) & set(expected)
    hits = products[:, :25].max(0) > 0.55, products[:, 20:].max(0) > 0.55
    assert counted == {"b": int(hits[0].sum()), "a": int(hits[1].sum())}


def test_a_folder_may_be_a_uri_that_says_more_behind_a_question_mark(tmp_path: Path) -> None:
    """As `s3://bucket/runs?region=...`: what follows the mark is no part of a path."""
    pool, sets, _ = leak_pool(tmp_path)
    there = f"file://{tmp_path}/there?a=b"
    expected = {}
    for root in (pool.root / "run", there):
        with without_ray():
            done, groups = run(pool, root=root)
            hits, _ = find_leaks(done.steps, done.index, pool.inputs, sets, 0.55)
        expected[root] = [read_all(hits.folder, pool.inputs), groups]
    here, beyond = expected.values()
    assert len(here[0]) > 30 and here[0].equals(beyond[0])
    assert len(here[1]) == 3 and here[1].equals(beyond[1])  # the equal ones
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.parquet")}
    assert written == {"there", "run", "embedded", "fingerprint", "a", "b"}
    names = [
        {p.relative_to(f) for p in f.rglob("*")} for f in (tmp_path / "there", pool.root / "run")
    ]
    assert names[0] == names[1]


def test_leaks_never_are_keepers(tmp_path: Path) -> None:
    x = chain(0.95, 3)
    pool = write_pool(tmp_path, x, ids_for(3), [3], areas=np.array([9, 2, 1]))
    own = write_pool(tmp_path / "set", x[:1], ids_for(1, 5), [1])
    with without_ray():
        copies, table = run(pool, threshold=0.7)
        assert table.column("keeper").to_pylist() == [0, 0, 0]
        others = {"set": own.images()}
        result, _ = find_leaks(copies.steps, copies.index, pool.inputs, others, 0.99)
        _, table = run(pool, threshold=0.7, going=[result])
    assert read_all(result.folder, pool.inputs).column("row").to_pylist() == [0]
    assert table.column("keeper").to_pylist() == [1, 1, 1]
    assert table.column("size").to_pylist() == [3, 3, 3]


def test_a_set_that_equals_the_pool_leaks_whole(
    small: tuple[Array, Array, Array], tmp_path: Path
) -> None:
    x = small[0][:500]
    pool = write_pool(tmp_path, x, ids_for(500), [250, 250])
    with without_ray():
        copies, _ = run(pool, threshold=0.9, buckets=3)
        sets = {"same": pool.images()}
        result, _ = find_leaks(copies.steps, copies.index, pool.inputs, sets, 0.9)
    table = read_all(result.folder, pool.inputs)
    assert table.column("row").to_pylist() == list(range(500))


def test_new_images_match_kept_ones_only(tmp_path: Path) -> None:
    full, crops, _ = with_views(120)
    old = write_pool(tmp_path / "old", full, ids_for(120), [120], crops=crops)
    # new: a copy of each image, by a crop of the stored one or as it is
    rng = np.random.default_rng(1)
    fresh = unit_half(crops[:, 2].astype(float) + 0.03 * rng.standard_normal((120, 143)))
    fresh[::2] = full[::2]
    new = write_pool(
        tmp_path / "new", fresh, ids_for(120, 1), [60, 60], crops=unit_half(0 * crops + 1e-3)
    )
    kept = np.ones(120, bool)
    kept[:20] = False
    decisions = decided(tmp_path, kept)
    with without_ray():
        search = Search(probes=8, cell_images=10, penalty=0.05, buckets=2)
        put_in_cells(Steps(tmp_path / "one"), old.images(), search)
        (tmp_path / "one").rename(tmp_path / "moved")
        earlier = Index.open(tmp_path / "moved")
        result = find_matches(Steps(tmp_path / "two"), earlier, new.images(), decisions, 0.7)
    table = read_all(result.folder, new.inputs)
    assert table.schema.equals(MATCHES)
    assert table.column("row").to_pylist()[-80:] == list(range(40, 120))
    items, crop = all_views(full, crops)
    for one in table.to_pylist():
        wide = fresh[one["row"]].astype(float)
        by_views = [items.astype(float) @ wide - 0.05 * crop]
        best = np.where(kept, by_views[0].max(1), -1)
        assert one["image_id"] == bytes(old.ids[best.argmax()])
        assert one["similarity"] == best.max()


def decided(folder: Path, kept: Any) -> Step:
    """Decisions of an earlier curation."""
    decisions = pa.table({"row": np.arange(len(kept)), "kept": np.array(kept)})
    tables.write_table(decisions, str(folder / "decisions"), "00000")
    return Step("decisions", repr(list(kept)), str(folder / "decisions"), tables=("00000",))


def curated(pool: Pool, kept: Sequence[bool]) -> tuple[Index, Step]:
    """A pool as an earlier curation left it."""
    return run(pool)[0].index, decided(pool.root, kept)


@pytest.mark.parametrize("chains", ["split", "keep"])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_what_is_no_copy_of_the_earlier_set_survives(
    tmp_path: Path, chains: str, best: int
) -> None:
    # A chain at cosines of .8, the next but one at .28: the first image was curated before, the
    # next three are new. The first of these is a copy of it, the others are none.
    line = chain(0.8, 4)
    old = write_pool(tmp_path / "old", line[:1], ids_for(1), [1])
    areas = np.array([1, 2, 1])
    areas[best] = 9
    new = write_pool(tmp_path / "new", line[1:], ids_for(3, 1), [2, 1], areas=areas)
    with without_ray():
        earlier, decisions = curated(old, [True])
        against = Steps(tmp_path / "against")
        matches = find_matches(against, earlier, new.images(), decisions, T)
        table = run(new, chains=chains, going=[matches])[1]
    matched = read_all(matches.folder, new.inputs)
    assert matched.column("row").to_pylist() == [0]
    assert matched.column("image_id").to_pylist() == [bytes(old.ids[0])]
    # the three are one component; its keeper is one that stays, the larger of the two
    keeper = 2 if best == 2 else 1
    assert table.column("size").to_pylist() == [3, 3, 3]
    away = {row for row in range(3) if table.column("keeper").to_pylist()[row] != row} - {0}
    stays = set(range(1, 3)) - away
    assert stays == {keeper}
    for row in away:
        assert table.column("keeper").to_pylist()[row] in stays


def test_a_component_of_copies_of_the_earlier_set_goes_whole(tmp_path: Path) -> None:
    x = chain(0.95, 3)
    old = write_pool(tmp_path / "old", x[1:2], ids_for(1), [1])
    new = write_pool(tmp_path / "new", x, ids_for(3, 1), [3])
    with without_ray():
        earlier, decisions = curated(old, [True])
        against = Steps(tmp_path / "against")
        matches = find_matches(against, earlier, new.images(), decisions, T)
    matched = read_all(matches.folder, new.inputs)
    assert matched.column("row").to_pylist() == [0, 1, 2]
    assert set(matched.column("image_id").to_pylist()) == {bytes(old.ids[0])}


def test_a_kept_image_is_met_by_the_one_that_stands_for_it(tmp_path: Path) -> None:
    # Three equal vectors: the one with the smallest id stands for them, another one was kept.
    x = np.repeat(unit_half(np.eye(4)[:1]), 3, 0)
    old = write_pool(tmp_path / "old", x, ids_for(3), [3])
    order = sorted(range(3), key=lambda row: bytes(old.ids[row]))
    new = write_pool(tmp_path / "new", x[:1], ids_for(1, 1), [1])
    with without_ray():
        for kept in ({order[2]}, {order[1], order[2]}, {order[0]}, set()):
            earlier, decisions = curated(old, [row in kept for row in range(3)])
            against = Steps(tmp_path / f"against-{len(kept)}-{sum(kept)}")
            matches = find_matches(against, earlier, new.images(), decisions, T)
            matched = read_all(matches.folder, new.inputs).column("image_id").to_pylist()
            assert matched == [min(bytes(old.ids[row]) for row in kept)] if kept else not matched


def test_look_up_finds_one_image(tmp_path: Path) -> None:
    full, crops, _ = with_views(120)
    pool = write_pool(tmp_path, full, ids_for(120), [120], crops=crops)
    with without_ray():
        copies, _ = run(pool, threshold=0.7, cell_images=10, buckets=3, penalty=0.05)
        stored = Index.open(copies.steps.root)
        decisions, against = decided(tmp_path, [True] * 119), Steps(tmp_path / "against")
        with pytest.raises(
            DataError, match="decisions of 119 images, and its curation compared 120"
        ):
            find_matches(against, stored, pool.images(), decisions, 0.7)
    for row in (3, 4, 119):
        photo = unit_half(crops[row, 3] * 1.0)
        one = look_up(stored, photo, crops[row] * 0, visiting, threshold=0.7)
        assert [match.row for match in one] == [row]
        assert one[0].image_id == bytes(pool.ids[row]).hex()
    nothing = unit_half(np.random.default_rng(9).standard_normal(143))
    assert not look_up(stored, nothing, crops[0] * 0, visiting, threshold=0.7)
    with pytest.raises(DataError, match="have 3 numbers"):
        look_up(stored, nothing[:3], threshold=0.7)
    with pytest.raises(DataError, match="holds no curation"):
        Index.open(tmp_path / "nowhere")
    shuffled = tmp_path / "run" / "copies" / "shuffle"
    shuffled.rename(tmp_path / "aside")
    with pytest.raises(DataError, match="lacks tables of its copies"):
        Index.open(tmp_path / "run")
    (tmp_path / "aside").rename(shuffled)
    place = tmp_path / "run" / STORED
    place.write_text(place.read_text().replace('"probes"', '"looks"'))
    with pytest.raises(DataError, match="by another version"):
        Index.open(tmp_path / "run")


def test_rows_left_out_before_do_not_join(tmp_path: Path) -> None:
    x = np.repeat(unit_half(np.eye(4)[:1]), 5, 0)
    pool = write_pool(tmp_path, x, ids_for(5), [5])
    # row 2 failed before, row 3 is a copy of row 0 by bytes
    table = pa.table({"row": [0, 1, 3, 4], "keeper": [0, 1, 0, 4], "method": ["", "", "bytes", ""]})
    tables.write_table(table.cast(tables.EXACT), str(tmp_path / "exact"), "00000")
    with without_ray():
        _, components = run(pool, exact=Step("exact", "e", str(tmp_path / "exact")))
    assert components.column("row").to_pylist() == [0, 1, 4]


@pytest.mark.parametrize("bad", [np.nan, 3.0])
def test_vectors_that_are_none_are_refused(tmp_path: Path, bad: float) -> None:
    x = unit_half(np.eye(4))
    x[2] = bad
    pool = write_pool(tmp_path, x, ids_for(4), [4])
    with without_ray(), pytest.raises(DataError, match=r"00000\.parquet: the vector of row 2 has"):
        run(pool)


@pytest.mark.parametrize(
    "where", ["embedded", "run/copies/shuffle/members/b0000", "run/copies/pairs"]
)
def test_a_damaged_file_is_named(
    small: tuple[Array, Array, Array], tmp_path: Path, where: str
) -> None:
    x = small[0][:400]
    pool = write_pool(tmp_path, x, ids_for(400), [400])
    with without_ray():
        copies, _ = run(pool, threshold=0.7)
        file = tmp_path / where / "00000.parquet"
        content = bytearray(file.read_bytes())
        for at in range(len(content) // 4, len(content) // 2):
            content[at] ^= 0xFF
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"00000\.parquet cannot be read") as error:
            if where == "embedded":
                run(pool, root=tmp_path / "again")
            _rerun(copies, where)
    assert str(file) in error.value.what


def _rerun(done: Run, where: str) -> None:
    if where.endswith("pairs"):
        out = Output(f"{done.steps.root}/x")
        alike = forest.Alike(step_of(done, "copies/pairs"), done.index.equal, T)
        forest.forest_of_all(out, 0, alike)
    else:
        done.index.items.read(0)


def test_leaks_that_show_the_same_are_kept_by_rows_and_counted_by_images(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    names, every = ["a", "b", "c"], []
    for name in names:  # 40 rows, 2 sets of 9 images; a query may be held for rows of both ranges
        ids = draw.integers(0, 9, 60).astype(np.uint8)
        columns = {
            "row": np.sort(draw.integers(0, 40, 60)),
            "other": np.full(60, -1),
            "set": [f"s{k}" for k in draw.integers(0, 2, 60)],
            "other_id": tables.id_array(np.repeat(ids[:, None], 16, 1)),
            "similarity": draw.integers(0, 5, 60) / 5,
            "same": draw.random(60) < 0.4,
        }
        columns |= {"reason": [""] * 60, "score": [0.0] * 60, "x": [0.0] * 60, "y": [0.0] * 60}
        table = pa.table(columns).cast(VERDICTS)
        tables.write_table(table, str(tmp_path / "looked"), name)
        every += [one for one in table.to_pylist() if one["same"]]
    best: dict[int, Any] = {}
    for one in every:
        key = (-one["similarity"], one["set"], one["other_id"])
        best[one["row"]] = min(best.get(one["row"], key), key)
    looked = Step("looked", "", str(tmp_path / "looked"), tables=tuple(names))
    leaking: list[Any] = []
    for name, first, end in (("x", 0, 17), ("y", 17, 40)):
        file = tables.InputFile(0, "", "", first, ShardFile("", end - first, (), 0), COLUMNS)
        leaks_that_hold(Output(str(tmp_path / "held"), name), ((file,), names), looked)
        leaking += tables.read_table(str(tmp_path / "held"), name).to_pylist()
    assert [one["row"] for one in leaking] == sorted(best)
    assert [(-one["similarity"], one["set"], one["query_id"]) for one in leaking] == [
        best[row] for row in sorted(best)
    ]
    counts: Counter[str] = Counter()
    for shard in range(3):
        counts.update(count_leaked(Output(""), shard, looked, 3)["leaked"])
    pairs = {(one["set"], one["other_id"]) for one in every}
    assert counts == Counter(one for one, _ in pairs)
