"""Exact search against a loop over all pairs; blocks, ties and what cannot be compared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from pipeline.search import exact
from pipeline.search.exact import Nearest, usable
from pipeline.search.search import open_search


def brute_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> list[list[int]]:
    """Every cosine in doubles, one by one; Python sorts them, so equal ones stay in order."""
    answers = []
    for query in queries.astype(float):
        cosines = []
        for vector in vectors.astype(float):
            lengths = float(np.linalg.norm(query) * np.linalg.norm(vector))
            cosines.append(float(query @ vector) / lengths if lengths else 0.0)
        answers.append(sorted(range(len(vectors)), key=lambda row: -cosines[row])[:k])
    return answers


def nearest(vectors: np.ndarray, queries: np.ndarray, k: int, block: int) -> Nearest:
    best = Nearest(usable(queries), k)
    for first in range(0, len(vectors), block):
        best.see(usable(vectors[first : first + block]), first)
    return best


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_neighbours_equal_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "PRODUCTS", 500)  # so that rows and queries are cut as well
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(150, 12)).astype(np.float32) * draw.uniform(0.1, 9, (150, 1))
    queries = draw.normal(size=(20, 12)).astype(np.float32)
    best = nearest(vectors, queries, 9, block)
    assert best.rows.tolist() == brute_force(vectors, queries, 9)
    expected = [
        [
            queries[q].astype(float)
            @ vectors[r]
            / (np.linalg.norm(queries[q].astype(float)) * np.linalg.norm(vectors[r]))
            for r in rows
        ]
        for q, rows in enumerate(best.rows)
    ]
    np.testing.assert_allclose(best.similarity, expected, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    copies=st.lists(st.integers(0, 5), min_size=1, max_size=60),
    block=st.integers(1, 20),
    k=st.integers(1, 70),
)
def test_equal_rows_keep_the_order_of_the_set(copies: list[int], block: int, k: int) -> None:
    originals = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
    vectors = originals[copies]
    best = nearest(vectors, originals, k, block)
    for query in range(6):
        wide = originals.astype(float)
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        cosine = [float(wide[query] @ wide[one]) for one in range(6)]
        expected = sorted(range(len(copies)), key=lambda row: (-cosine[copies[row]], row))[:k]
        assert best.rows[query, : len(expected)].tolist() == expected
        assert (best.rows[query, len(expected) :] == -1).all()
        assert (best.similarity[query, len(expected) :] == -np.inf).all()


def test_the_same_bits_for_any_blocks_and_queries() -> None:
    """Vectors of an untrained network are nearly equal: their cosines differ in the last digits."""
    draw = np.random.default_rng(2)
    vectors = (1 + 1e-4 * draw.normal(size=(400, 48))).astype(np.float32)
    alike = nearest(vectors, vectors[:30], 10, 400)
    assert alike.rows.tolist() == brute_force(vectors, vectors[:30], 10)
    for block, queries in ((37, slice(0, 30)), (400, slice(4, 5)), (1, slice(2, 9))):
        other = nearest(vectors, vectors[queries], 10, block)
        assert (other.rows == alike.rows[queries]).all()
        assert (other.similarity == alike.similarity[queries]).all()


def test_zero_vectors_are_like_nothing() -> None:
    vectors = np.zeros((3, 4), np.float32)
    vectors[1, 0] = 2
    best = nearest(vectors, np.eye(4, dtype=np.float32)[:1], 3, 2)
    assert best.rows.tolist() == [[1, 0, 2]]
    assert best.similarity.tolist() == [[1, 0, 0]]
    assert nearest(vectors, vectors[:1], 2, 2).similarity.tolist() == [[0, 0]]


def test_what_is_no_number_is_refused() -> None:
    vectors = np.ones((5, 3), np.float32)
    vectors[3, 1] = np.nan
    with pytest.raises(DataError, match=r"the queries hold values .* 1 rows of 5; .* row 13"):
        usable(vectors, "the queries", 10)
    vectors[3, 1] = 1e16  # squares of it would be infinite in float32
    with pytest.raises(DataError, match="no finite numbers"):
        usable(vectors)
    large = np.full((2, 3), 1e15) * [[1], [-1]]
    assert nearest(large, large, 2, 1).similarity.tolist() == [[1, -1], [1, -1]]


def test_an_array_that_is_no_table_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"an array of shape \[6\] was given"):
        open_search(np.arange(6))
