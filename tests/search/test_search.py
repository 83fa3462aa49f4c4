"""`open_search`: what it refuses, what it reads, and that threads may share it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.search import open_search, search


def vectors(rows: int = 500, dim: int = 24) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)


def test_from_disk_and_from_memory_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK_ROWS", 64)
    held, read = open_search(vectors()), open_search(vectors(), memory_gib=1e-9)
    for one, other in zip(held.find(vectors(9), 7), read.find(vectors(9), 7), strict=True):
        assert (one == other).all()
    similarity, rows = held.find(vectors(9), 7)
    assert similarity.dtype == np.float32 and rows.dtype == np.int64
    assert rows[:, 0].tolist() == list(range(9)) and (similarity[:, 0] == 1).all()


def test_k_is_cut_to_the_set() -> None:
    similarity, rows = open_search(vectors(3)).find(vectors(2), 20)
    assert similarity.shape == rows.shape == (2, 3)
    assert sorted(rows[0].tolist()) == [0, 1, 2]


def test_many_threads_get_what_one_gets() -> None:
    index, queries = open_search(vectors()), vectors(40)
    expected = index.find(queries, 5)[1]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: index.find(queries[n : n + 1], 5)[1][0], range(40)))
    assert (np.stack(answers) == expected).all()


def test_refused() -> None:
    with pytest.raises(DataError, match="holds no vectors"):
        open_search(vectors(0))
    broken = vectors()
    broken[7, 3] = np.inf
    with pytest.raises(DataError, match="1 rows of 500; the first is row 7"):
        open_search(broken)
    with pytest.raises(DataError, match=r"queries have shape \(1, 3\), expected \[n, 24\]"):
        open_search(vectors()).find(np.ones((1, 3)), 5)
    with pytest.raises(DataError, match="the queries hold values that are no finite numbers"):
        open_search(vectors()).find(np.full((1, 24), np.nan), 5)
    with pytest.raises(DataError, match="k=0"):
        open_search(vectors()).find(vectors(1), 0)


def test_zero_vectors_are_counted() -> None:
    some = vectors()
    some[3] = 0
    index = open_search(some)
    assert index.zeros == 1
    similarity, rows = index.find(some[3:4], 3)
    assert similarity.tolist() == [[0, 0, 0]] and rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("rows", [[4], [9, 2, 2], list(range(20, 0, -1))])
def test_vectors_at_rows(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK_ROWS", 7)
    table = vectors(50)
    for index in (open_search(table), open_search(table, memory_gib=1e-9)):
        assert (index.vectors_at(np.array(rows)) == table[rows]).all()
