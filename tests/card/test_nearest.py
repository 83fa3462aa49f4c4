"""Neighbours among tables of vectors: any blocks, in any order, give what a plain loop gives."""

import random

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from pipeline.card import nearest
from pipeline.errors import DataError
from tests.search.tables import write_table

DIM = 12


def table_of(folder, vectors, labels, ids=None, parts=1, **facts):
    """A table of vectors without images."""
    rows = len(vectors)
    if ids is None:
        ids = np.random.default_rng(rows).integers(0, 256, (rows, 16)).astype(np.uint8)
    about = {
        "version": 1, "key": f"k{rows}", "model": "m", "digest": "d", "dim": vectors.shape[1],
        "image_size": 32, "channels": 3, "grid": [1, 1], "outputs": ["cls"],
        "blocks": 4, "dtype": "float32", "shards": {},
    }  # fmt: skip
    images = pa.table(
        {
            "image_id": [bytes(x).hex() for x in ids],
            "source": [str(n) for n in range(rows)],
            "label": pa.array([None if x < 0 else int(x) for x in labels], pa.int64()),
        }
    )
    return write_table(folder, about | facts, images, vectors, parts)


@pytest.fixture
def here(monkeypatch):
    """Blocks run in this process, in another order each time."""

    def each(function, asked, blocks):
        for block in random.sample(blocks, len(blocks)):
            yield block, function(asked, block)

    monkeypatch.setattr(nearest, "_each", each)
    monkeypatch.setattr(nearest, "_devices", lambda gpu: 1)
    return monkeypatch


def case(kind="plain", rows=120, seed=0):
    """Vectors, labels and ids in which there is something to trip over."""
    rng = np.random.default_rng(seed)
    vectors = (1 + rng.standard_normal((rows, DIM))).astype(np.float32)
    labels = rng.integers(0, 5, rows)
    ids = rng.integers(0, 256, (rows, 16)).astype(np.uint8)
    labels[rng.integers(0, rows, rows // 8)] = -1
    ids[3], ids[rows // 4] = ids[4], ids[rows // 2]
    if kind == "equal":
        vectors = vectors[rng.integers(0, 7, rows)]
    if kind == "untrained":
        vectors = (1 + 4e-5 * vectors).astype(np.float32)
    return vectors, labels, ids


def by_loop(reference, queries, k, mean=0.0):
    """Rows by cosine in long doubles, equal ids and unlabelled rows left out."""
    (vectors, labels, ids), (asked, _, asked_ids) = reference, queries
    known, wanted = (x.astype(np.longdouble) - mean for x in (vectors, asked))
    result = []
    for query, name in zip(wanted, asked_ids, strict=True):
        rows = [n for n in range(len(known)) if labels[n] >= 0 and (ids[n] != name).any()]
        cosine = (known * query).sum(1) / np.sqrt((known**2).sum(1) * (query**2).sum())
        order = sorted(rows, key=lambda n: (-cosine[n], n))[:k]
        result.append([(n, float(cosine[n])) for n in order])
    return result


def assert_is(neighbours, expected, k):
    assert neighbours.rows.shape == neighbours.similarities.shape == (len(expected), k)
    for rows, similarities, wanted in zip(
        neighbours.rows.tolist(), neighbours.similarities.tolist(), expected, strict=True
    ):
        missing = k - len(wanted)
        assert rows == [n for n, _ in wanted] + [-1] * missing
        assert similarities[: len(wanted)] == pytest.approx([c for _, c in wanted], abs=3e-7)
        assert similarities[len(wanted) :] == [-np.inf] * missing


@pytest.mark.parametrize("kind", ["plain", "equal", "untrained"])
@pytest.mark.parametrize("two_sets", [True, False])
def test_any_blocks_give_the_bits_of_one(kind, two_sets, tmp_path, here):
    given, asked = case(kind), case(kind, 50, seed=1)
    asked[0][:30], asked[2][:9] = given[0][:30], given[2][:9]
    reference = table_of(tmp_path / "r", *given, parts=3)
    queries = table_of(tmp_path / "q", *asked, parts=2) if two_sets else None
    expected = by_loop(given, asked if two_sets else given, 20)
    results = []
    for largest, similarities in ((10**6, 1 << 20), (40, 500), (7, 30)):  # 1, 3, 18 blocks of rows
        here.setattr(nearest, "BLOCK_VALUES", largest * DIM)
        here.setattr(nearest, "SIMILARITIES", {"cpu": similarities})
        results.append(nearest.neighbours(reference, queries, 20))
    assert_is(results[0], expected, 20)
    for other in results[1:]:
        assert torch.equal(other.rows, results[0].rows)
        assert torch.equal(other.similarities, results[0].similarities)


def test_more_neighbours_than_rows(tmp_path, here):
    given = case(rows=9)
    reference = table_of(tmp_path / "r", *given)
    here.setattr(nearest, "BLOCK_VALUES", 2 * DIM)
    voters = int((given[1] >= 0).sum())
    assert_is(nearest.neighbours(reference, None, 500), by_loop(given, given, 500), voters)


def test_the_mean_of_the_reference_is_taken_off_where_asked_for(tmp_path, here):
    given, asked = case(), case(rows=20, seed=1)
    reference = table_of(tmp_path / "r", *given, parts=2)
    queries = table_of(tmp_path / "q", *asked)
    mean = given[0].astype(np.longdouble).mean(0)
    centred = nearest.neighbours(reference, queries, 10, centre=True)
    assert_is(centred, by_loop(given, asked, 10, mean), 10)
    assert not torch.equal(centred.rows, nearest.neighbours(reference, queries, 10).rows)


def test_blocks_cover_all_pairs_and_use_all_devices():
    for rows, queries, dim, devices in (
        (50_000, 10_000, 384, 2), (1_280_000, 50_000, 1024, 8), (5, 3, 10, 64), (1, 1, 1, 1),
        (200_000, 10_000, 384, 1),
    ):  # fmt: skip
        blocks = nearest._blocks(rows, queries, dim, devices)
        pairs = sum(
            (b.rows.stop - b.rows.start) * (b.queries.stop - b.queries.start) for b in blocks
        )
        assert pairs == rows * queries
        assert len({(b.rows.start, b.queries.start) for b in blocks}) == len(blocks)
        for b in blocks:
            assert (b.rows.stop - b.rows.start) * dim <= nearest.BLOCK_VALUES
        if rows * queries * dim >= devices * nearest.FEWEST_PRODUCTS:
            assert len(blocks) >= devices
    assert len(nearest._blocks(2000, 500, 384, 64)) == 1


def test_mistakes_are_sentences(tmp_path, here):
    vectors, labels, _ = case(rows=30)
    reference = table_of(tmp_path / "r", vectors, labels)
    other = table_of(tmp_path / "o", vectors[:20], labels[:20], digest="e", model="n")
    unlabelled = table_of(tmp_path / "u", vectors, labels * 0 - 1)
    with pytest.raises(DataError, match=r"is of m at 32 pixels, .*/o is of n at 32 pixels"):
        nearest.neighbours(reference, other, 3)
    with pytest.raises(DataError, match=r"none of the 30 images of .*/u has a label"):
        nearest.neighbours(unlabelled, reference, 3)
    with pytest.raises(DataError, match="the 0 nearest"):
        nearest.neighbours(reference, None, 0)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_of_ray_give_the_same_and_say_what_is_wrong(tmp_path, monkeypatch):
    given = case()
    reference = table_of(tmp_path / "r", *given, parts=3)
    monkeypatch.setattr(nearest, "BLOCK_VALUES", 60 * DIM)
    assert_is(nearest.neighbours(reference, None, 20), by_loop(given, given, 20), 20)
    broken = given[0].copy()
    broken[100, 2] = np.nan
    table = table_of(tmp_path / "b", broken, *given[1:])
    with pytest.raises(DataError, match="no finite numbers, 1 rows"):
        nearest.neighbours(table, None, 20)
    assert ray.is_initialized()
