"""Retrieval against brute force: neighbours, collisions, owners, clusters, boundaries, caps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from planted_vectors import ids_of_numbers, separated, written

from pipeline.curate.choose import neighbours, retrieve, seed_clusters
from pipeline.curate.choose.neighbours import Neighbours, are_in
from pipeline.curate.choose.seed_clusters import Retrieval
from pipeline.curate.rows.exact import unit_half
from pipeline.curate.rows.read_rows import Points
from pipeline.curate.rows.tables import ID, RETRIEVED, id_array, read_table
from pipeline.curate.steps.steps import Steps
from tests.standins import run_here


@pytest.fixture(autouse=True)
def here(monkeypatch):
    run_here(monkeypatch)


def random_half(seed, n, d=16):
    return unit_half(np.random.default_rng(seed).standard_normal((n, d)))


def exact(a, b):
    return a.astype(np.float64) @ b.astype(np.float64).T


def nearest_of(products, ids, count, least=-1.0):
    able = [i for i in range(len(ids)) if least <= products[i]]
    return sorted(able, key=lambda i: (-products[i], ids[i].tobytes()))[:count]


def table_of(retrieved, names):
    rows = []
    for name in names:
        table = read_table(retrieved.result.folder, name)
        assert table.schema.equals(RETRIEVED)
        rows += table.to_pylist()
    return {row["row"]: row for row in rows}


@pytest.mark.parametrize(("count", "least"), [(3, 0.0), (1, 0.4), (7, 0.2)])
def test_neighbours_are_those_of_brute_force(count, least, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_POOL", 37)
    monkeypatch.setattr(neighbours, "BLOCK_SEEDS", 8)
    pool, seeds = random_half(0, 300), random_half(1, 25)
    pool[100:140] = pool[7]  # forty equal rows: ties by id
    seeds[0] = pool[7]
    ids = ids_of_numbers(range(300))
    search = Neighbours(Points(np.arange(25), ids_of_numbers(range(25)), seeds), count, least)
    for part in np.array_split(np.random.default_rng(2).permutation(300), 4):
        search.add(Points(part, ids[part], pool[part]))
    nearest = search.nearest()
    products = exact(seeds, pool)
    for seed in range(25):
        mine = nearest.rows[nearest.groups == seed].tolist()
        expected = nearest_of(products[seed], ids, count, least)
        assert mine == expected
        np.testing.assert_array_equal(-nearest.keys[nearest.groups == seed], products[seed][mine])


def test_ids_are_in_a_set():
    ids = ids_of_numbers(range(40))
    ids[3, :8] = ids[2, :8]  # equal first words
    assert not are_in(ids, pa.chunked_array([], ID)).any()
    few = pa.chunked_array([id_array(ids[:1]), id_array(ids[1:3])])
    assert are_in(ids, few).tolist() == [True] * 3 + [False] * 37


@pytest.mark.parametrize("shuffled", [False, True])
def test_sample_mode_counts_collisions_and_owners(tmp_path: Path, shuffled, monkeypatch):
    """Two sets over three files, by brute force: what each asks for and who owns it."""
    monkeypatch.setattr(neighbours, "SEED_ROWS", 5)
    monkeypatch.setattr(neighbours, "POOL_ROWS", 1)
    pool, ids = random_half(0, 120), ids_of_numbers(range(120))
    seeds = {"b": random_half(1, 12), "a": random_half(2, 7)}
    seed_ids = {n: ids_of_numbers(range(len(v)), salt=n.encode()) for n, v in seeds.items()}
    seeds["a"][0], seed_ids["a"][0] = pool[5], ids[5]  # in the pool itself
    seeds["b"][3] = seeds["a"][1]  # equally similar seeds of two sets: a is first by name
    order = np.random.default_rng(3).permutation(120) if shuffled else np.arange(120)
    rows = written(tmp_path, ids, pool, 3, order)
    sets = {n: written(tmp_path, seed_ids[n], v, 2 + shuffled, name=n) for n, v in seeds.items()}
    retrieved = retrieve.retrieve(
        Steps(tmp_path / "r"), rows, sets, Retrieval(mode="sample", neighbours=4), 0
    )
    asked: dict[int, list] = {}
    for name, vectors in seeds.items():
        mine, products = set(), exact(vectors, pool)
        if name == "a":
            products[:, 5] = -2  # its own image is not retrieved for a
        for seed in range(len(vectors)):
            for rank, row in enumerate(nearest_of(products[seed], ids, 4, 0.0)):
                query = seed_ids[name][seed].tobytes()
                asked.setdefault(row, []).append((-products[seed][row], name, query, rank))
                mine.add(row)
        told = retrieved.summary["sets"][name]
        assert told["requested"] == 4 * len(vectors) == told["found"]
        assert told["unique"] == len(mine) and told["collisions"] == told["found"] - len(mine)
        assert told["seeds_short"] == 0
    table = table_of(retrieved, rows.names)
    got = {int(order[row]): one for row, one in table.items()}
    assert set(got) == set(asked)
    for row, wishes in asked.items():
        similarity, name, query, rank = min(wishes)
        one = got[row]
        assert (one["set"], one["query_id"], one["rank"]) == (name, query, rank)
        assert one["similarity"] == -similarity and one["hits"] == len(wishes)
        assert one["part"] == "sample" and one["cluster"] == -1
    for name in seeds:
        owned = sum(min(wishes)[1] == name for wishes in asked.values())
        assert retrieved.summary["sets"][name]["delivered"] == owned
    assert retrieved.summary["rows"] == len(asked)


def test_similarity_floor_and_short_seeds(tmp_path: Path):
    pool, ids = random_half(0, 60), ids_of_numbers(range(60))
    seeds = random_half(1, 9)
    rows = written(tmp_path, ids, pool, 2)
    sets = {"s": written(tmp_path, ids_of_numbers(range(9), b"s"), seeds, name="s")}
    settings = Retrieval(mode="sample", neighbours=5, min_similarity=0.45)
    retrieved = retrieve.retrieve(Steps(tmp_path / "r"), rows, sets, settings, 0)
    enough = (exact(seeds, pool) >= 0.45).sum(1)
    told = retrieved.summary["sets"]["s"]
    assert told["found"] == np.minimum(enough, 5).sum() and told["requested"] == 45
    assert told["seeds_short"] == (enough < 5).sum() > 0


def clusters_case(tmp_path: Path, counts, **settings):
    """Four well separated clusters of about 50 rows; `counts` seeds of a set in each of them."""
    pool, truth = separated(200, 4, spread=0.01)
    ids = ids_of_numbers(range(200))
    rows = written(tmp_path, ids, pool, 3)
    sets, (vectors, all_seeds) = {}, separated(400, 4, spread=0.01)
    for name, of in counts.items():
        chosen = np.concatenate(
            [np.flatnonzero(all_seeds == c)[-n:] for c, n in enumerate(of) if n]
        )
        seed_ids = ids_of_numbers(chosen, name.encode())
        sets[name] = written(tmp_path, seed_ids, vectors[chosen], name=name)
    retrieved = retrieve.retrieve(
        Steps(tmp_path / "r"), rows, sets, Retrieval(mode="cluster", clusters=4, **settings), 6
    )
    return retrieved, table_of(retrieved, rows.names), truth, pool, vectors


@pytest.mark.parametrize(("seeds", "taken"), [(3, False), (4, True)])
def test_more_than_three_seeds(tmp_path: Path, seeds, taken):
    retrieved, table, truth, _, _ = clusters_case(tmp_path, {"s": (0, seeds, 0, 1)})
    assert set(truth[list(table)]) == ({1} if taken else set())
    told = retrieved.summary["sets"]["s"]
    assert told["clusters"] == int(taken) and told["clusters_of"] == 4
    assert told["delivered"] == (truth == 1).sum() * taken == told["rows_in_clusters"]
    assert told["seeds_covered"] == (4 / 5 if taken else 0)


def test_cluster_rows_name_their_nearest_seed(tmp_path: Path):
    retrieved, table, _, pool, vectors = clusters_case(tmp_path, {"s": (6, 0, 5, 0)})
    seed_numbers = {ids_of_numbers([i], b"s")[0].tobytes(): i for i in range(400)}
    for row, one in table.items():
        seed = seed_numbers[one["query_id"]]
        assert exact(vectors[[seed]], pool[[row]])[0, 0] == one["similarity"]
        assert one["part"] == "cluster" and one["rank"] == -1 and one["cluster"] >= 0
    queries = {one["query_id"] for one in table.values()}
    used = vectors[[seed_numbers[q] for q in queries]]
    for row in table:
        assert exact(used, pool[[row]]).max() == table[row]["similarity"]
    assert retrieved.summary["sets"]["s"]["purity"] > 0.5


def test_seeds_are_read_in_blocks(tmp_path: Path, monkeypatch):
    pool, _ = separated(120, 4, spread=0.2)
    vectors, _ = separated(60, 4, spread=0.2, seed=1)
    vectors[40:50] = vectors[7]  # equally similar: the smallest id is named
    rows = written(tmp_path, ids_of_numbers(range(120)), pool, 3)
    order, ids = np.random.default_rng(0).permutation(60), ids_of_numbers(range(60), b"s")
    retrieved = []
    for name, files, block in (("one", 1, 2**16), ("many", 9, 1)):
        monkeypatch.setattr(seed_clusters, "SEED_ROWS", block)
        seeds = {
            "s": written(tmp_path, ids, vectors, files, order if block == 1 else None, name=name)
        }
        settings = Retrieval(mode="cluster", clusters=6)
        one = retrieve.retrieve(Steps(tmp_path / f"r-{name}"), rows, seeds, settings, 6)
        retrieved.append((table_of(one, rows.names), one.summary))
    assert retrieved[0] == retrieved[1] and len(retrieved[0][0]) > 50
    # purity by a plain loop over the clusters of the seeds
    products = exact(vectors, vectors)
    leaf = np.zeros(60, int)
    for file in seeds["s"].names:  # as the run itself has assigned them
        table = read_table(str(tmp_path / "r-many" / "cluster" / "seeds" / "0"), file)
        for image, label in zip(
            table["image_id"].to_pylist(), table["leaf"].to_pylist(), strict=True
        ):
            leaf[[x.tobytes() for x in ids].index(image)] = label
    np.fill_diagonal(products, -2)
    best = [products[i, leaf == leaf[i]].max() for i in range(60) if (leaf == leaf[i]).sum() > 1]
    like = [one["similarity"] >= np.quantile(best, 0.1) for one in retrieved[0][0].values()]
    assert retrieved[0][1]["sets"]["s"]["purity"] == pytest.approx(np.mean(like))


@pytest.mark.parametrize(("cap", "images", "shares"), [(20, 10_000, 20), (1000, 7, 14), (9, 7, 9)])
def test_cap_is_shared_out_among_clusters(tmp_path: Path, cap, images, shares):
    retrieved, table, truth, _, _ = clusters_case(
        tmp_path, {"s": (5, 5, 0, 0)}, cap=cap, cluster_images=images
    )
    counts = np.bincount(truth[list(table)], minlength=4)
    assert counts.sum() == shares == retrieved.summary["sets"]["s"]["requested"]
    assert abs(counts[0] - counts[1]) <= 1 and counts[2:].sum() == 0
    assert retrieved.summary["sets"]["s"]["quota"] == cap


def test_two_sets_in_one_cluster_draw_different_rows(tmp_path: Path):
    retrieved, table, _, _, _ = clusters_case(
        tmp_path, {"a": (5, 0, 0, 0), "b": (5, 0, 0, 0)}, cluster_images=10
    )
    sets = retrieved.summary["sets"]
    assert sets["a"]["unique"] == sets["b"]["unique"] == 10
    assert sets["a"]["delivered"] + sets["b"]["delivered"] == len(table) > 12
    assert sum(one["hits"] for one in table.values()) == 20


@pytest.mark.parametrize("mode", ["sample", "cluster", "auto"])
@pytest.mark.parametrize(("rows", "seeds"), [(0, 3), (1, 1), (2, 0), (5, 5)])
def test_hardly_anything(tmp_path: Path, mode, rows, seeds):
    ids = ids_of_numbers(range(9))
    pool = written(tmp_path, ids[:rows], random_half(0, rows), 2)
    sets = {"s": written(tmp_path, ids[5 : 5 + seeds], random_half(1, seeds), name="s")}
    settings = Retrieval(mode=mode, cluster_seeds=0)
    retrieved = retrieve.retrieve(Steps(tmp_path / "r"), pool, sets, settings, 0)
    assert set(table_of(retrieved, pool.names)) <= set(range(rows))
    assert retrieved.summary["sets"]["s"]["mode"] == ("sample" if mode == "sample" else "cluster")


def test_a_seed_set_that_equals_the_pool(tmp_path: Path):
    pool, ids = random_half(0, 30), ids_of_numbers(range(30))
    rows = written(tmp_path, ids, pool, 2)
    for mode in ("sample", "cluster"):
        settings = Retrieval(mode=mode, cluster_seeds=0)
        retrieved = retrieve.retrieve(Steps(tmp_path / mode), rows, {"s": rows}, settings, 0)
        assert retrieved.summary["rows"] == 0


def test_copies_of_seeds_are_neighbours(tmp_path: Path):
    pool, ids = random_half(0, 40), ids_of_numbers(range(40))
    seeds = pool[:3]
    rows = written(tmp_path, ids, pool, 2)
    sets = {"s": written(tmp_path, ids_of_numbers(range(3), b"s"), seeds, name="s")}
    settings = Retrieval(mode="sample", neighbours=1)
    with_copies = retrieve.retrieve(Steps(tmp_path / "with"), rows, sets, settings, 0)
    assert set(table_of(with_copies, rows.names)) == {0, 1, 2}
