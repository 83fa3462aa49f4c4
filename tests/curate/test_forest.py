"""Spanning forests against Kruskal's algorithm in a plain loop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.curate.copies import forest
from pipeline.curate.copies.equal_vectors import EQUAL
from pipeline.curate.copies.forest import PAIRS
from pipeline.curate.rows.tables import id_array, write_table
from pipeline.curate.steps.steps import Step, Steps
from tests.curate.planted import ids_for
from tests.standins import without_ray

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
        tree = forest.Forest()
        for part in np.split(np.arange(len(pairs)), sorted(min(c, len(pairs)) for c in cuts)):
            of_part = [pairs[place] for place in part]
            i, j = (np.array([pair[c] for pair in of_part], np.int64) for c in (0, 1))
            tree.add(i, j, np.array([pair[2] for pair in of_part]))
        kept = list(zip(*(column.tolist() for column in tree.edges()), strict=True))
    assert kept == kruskal(pairs)
    assert tree.pairs == len(pairs)


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_have_the_forest_of_kruskal(tmp_path: Path, shards: int) -> None:
    rng = np.random.default_rng(4)
    # A path of 300 rows in any order, small groups, and loops of a few similarities.
    path = rng.permutation(300)
    pairs = [(int(a), int(b), 0.5) for a, b in pairwise(path)]
    for first in range(300, 900, 4):
        members = rng.permutation(np.arange(first, first + 4))
        pairs += [(int(members[i]), int(members[j]), float(rng.choice([0.6, 0.7, 0.9])))
                  for i, j in ((0, 1), (1, 2), (2, 0), (3, 1))]  # fmt: skip
    equals = [(900 + i, int(path[i]), 0.99) for i in range(9)] + [(950, 299, 0.3)]
    ids = ids_for(1000)
    ids = ids[np.lexsort(ids.T[::-1])]  # rows are in the order of their ids, as Kruskal's nodes
    sources = np.array_split(rng.permutation(len(pairs)), 12)
    for number, part in enumerate(sources):
        _write_pairs(
            tmp_path / "pairs", f"{number:05d}", [pairs[i] for i in part], ids, PAIRS.names
        )
    columns = ["row", "stands", "similarity", "image_id", "stands_id"]
    _write_pairs(tmp_path / "equals", "00000", equals, ids, columns)

    def step(name: str, names: list[str], **account: int) -> Step:
        return Step(name, name, str(tmp_path / name), (account,), tables=tuple(names))

    joined = step("pairs", [f"{number:05d}" for number in range(len(sources))], edges=len(pairs))
    steps = Steps(tmp_path / "run")
    with without_ray():
        equal = step("equals", ["00000"], copies=len(equals))
        edges = forest.edges_of(steps, forest.Alike(joined, equal, 0.4), shards)
    assert len(edges.tables) == shards
    # The turns are one line of the costs, whatever their number; each leaves a folder.
    turns = len(list((tmp_path / "run/copies/joined").glob("*/large")))
    assert turns == 0 if shards == 1 else 3 <= turns <= 12
    names = [one.name for one in steps.done]
    assert names == (["edges"] if shards == 1 else ["copies/joined", "edges"])
    kept: list[Pair] = []
    for shard in edges.tables:
        table = edges.read(shard)
        kept += zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True)
        if shards > 1:
            assert 0 < len(table) < 1000
    expected = kruskal(pairs + equals[:-1])
    assert sorted(kept) == sorted(expected) and len(expected) == 299 + 3 * 150 + 9


def _write_pairs(
    folder: Path, name: str, pairs: list[Pair], ids: np.ndarray, to: list[str]
) -> None:
    a, b, similarity = (np.array([pair[column] for pair in pairs]) for column in range(3))
    columns = [a, b, similarity, id_array(ids[a]), id_array(ids[b])]
    table = pa.table(dict(zip(to, columns, strict=True)))
    schema = PAIRS if to == PAIRS.names else EQUAL
    write_table(table.select(schema.names).cast(schema), str(folder), name)
