"""Spanning forests against Kruskal's algorithm in a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate import forest

Pair = tuple[int, int, float]


def kruskal(pairs: list[Pair]) -> list[Pair]:
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    kept = []
    for similarity, i, j in sorted((-s, min(i, j), max(i, j)) for i, j, s in pairs):
        if root(i) != root(j):
            parent[root(i)] = root(j)
            kept.append((i, j, -similarity))
    return kept


some_pairs = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([0.5, 0.7, 0.9])).filter(
        lambda pair: pair[0] != pair[1]
    ),
    max_size=60,
)


@settings(deadline=None)
@given(pairs=some_pairs, cuts=st.lists(st.integers(0, 60), max_size=4), pending=st.integers(0, 30))
def test_forest_is_that_of_kruskal_whatever_the_parts(
    pairs: list[Pair], cuts: list[int], pending: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "PENDING", pending)
        found = forest.Forest()
        for part in np.split(np.arange(len(pairs)), sorted(min(c, len(pairs)) for c in cuts)):
            some = [pairs[place] for place in part]
            i, j = (np.array([pair[c] for pair in some], np.int64) for c in (0, 1))
            found.add(i, j, np.array([pair[2] for pair in some]))
        kept = list(zip(*(column.tolist() for column in found.edges()), strict=True))
    assert kept == kruskal(pairs)
    assert found.pairs == len(pairs)
