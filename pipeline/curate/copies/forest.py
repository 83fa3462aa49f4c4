"""From the pairs of all buckets to one maximum spanning forest, in shards that fit a task.

The forest of few pairs is made by one task. Of many, components come first: as in Kiveris et al.
2014 ("Connected Components in MapReduce and Beyond"), rounds of two steps let each row point to a
smaller row of its component, until all point to the smallest. A step reads and writes narrow
pairs in shards of rows, so none holds the whole graph. Then each pair goes to the shard of its
component, and each shard has a forest of its own; together they are the one of all pairs, since no
pair joins two components.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.first_of_each import group_starts, in_order
from pipeline.curate.rows.read_rows import Ids
from pipeline.curate.rows.tables import EDGES, ID, ROW, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps, by_number, numbered

SHARD_PAIRS = 2_500_000  # of a task, which holds some 430 bytes for each
PENDING = 2_000_000  # pairs kept before they are reduced
# Pairs with the ids that order pairs of equal similarity.
PAIRS = pa.schema(
    [("a", ROW), ("b", ROW), ("similarity", pa.float64()), ("a_id", ID), ("b_id", ID)]
)
ENDS = pa.schema([("row", ROW), ("other", ROW)])
LABELS = pa.schema([("row", ROW), ("label", ROW)])


@dataclass(frozen=True)
class Alike:
    """Pairs that are alike, before they are a forest.

    Attributes:
        joined: those of all buckets (`join.join_bucket`).
        equal: rows with equal vectors, which are pairs too (`equal_vectors.EQUAL`).
        lowest: similarity that pairs must be above.
    """

    joined: Step
    equal: Step
    lowest: float

    @property
    def tables(self) -> dict[str, tuple[str, bool]]:
        """All tables, numbered; a table is its name, and whether it is one of equal vectors."""
        tables = [(name, False) for name in self.joined.tables]
        return by_number([*tables, *((name, True) for name in self.equal.tables)])

    def read(self, table: tuple[str, bool]) -> pa.Table:
        """The pairs of a table, as `PAIRS`."""
        name, is_equal = table
        if not is_equal:
            return self.joined.read(name, PAIRS.names)
        columns = ["row", "stands", "similarity", "image_id", "stands_id"]
        pairs = self.equal.read(name, columns, [("similarity", ">", self.lowest)])
        return pairs.rename_columns(PAIRS.names).cast(PAIRS)


def edges_of(steps: Steps, alike: Alike, shards: int | None = None) -> Step:
    """The step `edges`, with a table of `tables.EDGES` for each shard.

    Args:
        steps: of the curation.
        alike: all pairs.
        shards: how many; default: by the number of pairs.
    """
    every = int(alike.joined.total("edges") + alike.equal.total("copies"))
    shards = shards or max(1, -(-every // SHARD_PAIRS))
    if shards == 1:
        return steps.run("edges", forest_of_all, numbered(1), alike=alike)
    each, turns = numbered(shards), steps.aside()
    stars = turns.run("copies/joined/start", start_task, alike.tables, alike=alike, shards=shards)
    for turn in count():
        large = turns.run(f"copies/joined/{turn:03d}/large", large_task, each, before=stars,
                          shards=shards)  # fmt: skip
        stars = turns.run(f"copies/joined/{turn:03d}/small", small_task, each, before=large,
                          shards=shards)  # fmt: skip
        if not large.total("changed") + stars.total("changed"):
            break
    ends = turns.run("copies/joined/ends", ends_task, alike.tables, alike=alike, shards=shards)
    placed = turns.run("copies/joined/placed", place_task, each, stars=stars, ends=ends,
                       shards=shards)  # fmt: skip
    # The number of turns depends on the images, and names of metrics must not.
    steps.sum_up("copies/joined", placed, turns.done)
    return steps.run("edges", forest_of_shard, each, placed=placed)


# ---- Stars: rounds until each row points to the smallest of its component.


def start_task(out: Output, table: tuple[str, bool], alike: Alike, shards: int) -> None:
    """The components within one table: each row with the smallest one, both ways."""
    pairs = alike.read(table)
    row, label = connected(pairs["a"].to_numpy(), pairs["b"].to_numpy())
    away = row != label
    _write_both(out, row[away], label[away], shards)


def large_task(out: Output, shard: int, before: Step, shards: int) -> Account:
    """Large star: the smallest of a row and its neighbours gets all larger neighbours of the row.

    Written by the larger row of each pair.
    """
    row, other, least = _stars(before, shard)
    larger = other > row
    _write_ends(out, other[larger], least[larger], shards)
    return {"changed": int((least != row)[larger].sum())}


def small_task(out: Output, shard: int, before: Step, shards: int) -> Account:
    """Small star: the smallest of the smaller neighbours of a row gets the others and the row."""
    row, other, least = _stars(before, shard)
    away = other != least
    _write_both(out, np.append(row, other[away]), np.append(least, least[away]), shards)
    return {"changed": int(away.sum())}


def _stars(step: Step, shard: int) -> tuple[Ints, Ints, Ints]:
    """Pairs of a shard by row, each once, with the smallest of the row and all its neighbours."""
    table = step.bucket(shard, ENDS)
    row, other = (table[name].to_numpy() for name in ENDS.names)
    del table
    order = np.lexsort((other, row))
    row, other = row[order], other[order]
    new = group_starts(row, other)
    row, other = row[new], other[new]
    first = np.searchsorted(row, row)  # neighbours are in order
    return row, other, np.minimum(row, other[first])


def _write_both(out: Output, a: Ints, b: Ints, shards: int) -> None:
    _write_ends(out, np.append(a, b), np.append(b, a), shards)


def _write_ends(out: Output, row: Ints, other: Ints, shards: int) -> None:
    out.buckets(pa.table([row, other], schema=ENDS), shard_of(row, shards))


def ends_task(out: Output, table: tuple[str, bool], alike: Alike, shards: int) -> None:
    """Sends each pair to the shard of its first row."""
    pairs = alike.read(table)
    out.buckets(pairs, shard_of(pairs["a"].to_numpy(), shards))


def place_task(out: Output, shard: int, stars: Step, ends: Step, shards: int) -> None:
    """Sends the pairs of a shard of rows to the shard of their component."""
    row, _, least = _stars(stars, shard)
    pairs = ends.bucket(shard, PAIRS)
    out.buckets(pairs, shard_of(least[np.searchsorted(row, pairs["a"].to_numpy())], shards))


# ---- Forests of tables of pairs.


def forest_of_shard(out: Output, shard: int, placed: Step) -> None:
    """The forest of the pairs of some components."""
    out.table(forest_of(placed.bucket(shard, PAIRS)))


def forest_of_all(out: Output, shard: int, alike: Alike) -> None:
    """The forest of all pairs."""
    pairs = [alike.read(table) for table in alike.tables.values()]
    out.table(forest_of(pa.concat_tables([PAIRS.empty_table(), *pairs])))


def forest_of(pairs: pa.Table) -> pa.Table:
    """`tables.EDGES` of the forest of `PAIRS`."""
    rows = np.concatenate([pairs[name].to_numpy() for name in ("a", "b")])
    ids = np.concatenate([ids_of(pairs[name]) for name in ("a_id", "b_id")])
    node, row, _ = nodes_of(rows, ids)
    forest = Forest()
    forest.add(node[: len(pairs)], node[len(pairs) :], pairs["similarity"].to_numpy())
    a, b, similarity = forest.edges()
    return pa.table([row[a], row[b], similarity], schema=EDGES)


def nodes_of(rows: Ints, ids: Ids) -> tuple[Ints, Ints, Ids]:
    """Node of each row, which may come several times; rows and ids of the nodes, in the order of
    their ids.
    """
    row, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = in_order(ids[first], row)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse], row[order], ids[first][order]


# ---- Components of edges, each called by its smallest row, and the tasks that they go to.


def connected(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Rows that are in an edge, and the smallest row of the component of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    row, node = np.unique(np.concatenate([a, b]), return_inverse=True)
    ones = np.ones(len(a), np.int8)
    graph = coo_array((ones, (node[: len(a)], node[len(a) :])), shape=(len(row), len(row)))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, label, row)
    return row, smallest[label]


def label_rows(out: Output, table: str, edges: Step, threshold: float) -> Account:
    """Task: the component of each row that is in an edge above the threshold, as `LABELS`.

    Components are in one table of edges each.
    """
    pairs = edges.read(table, filters=[("similarity", ">", threshold)])
    row, label = connected(pairs["a"].to_numpy(), pairs["b"].to_numpy())
    out.table(pa.table([row, label], schema=LABELS))
    return {"components": len(np.unique(label))}


def shard_of(label: Ints, shards: int) -> Ints:
    """The shard of each component: mixed, since labels of files are near each other."""
    mixed = label.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(shards)).astype(np.int64)


# ---- Maximum spanning forests: of all pairs that are copies, as few as say the same.
#
# Pairs are ordered by similarity, then by the two image ids. With that no two are equal, so there
# is one forest, the forest of forests of parts is the forest of all, and no order of work changes
# it. The components of its edges above any threshold are those of all pairs above it.


def spanning(i: Ints, j: Ints, similarity: Doubles) -> Ints:
    """Places of the pairs that are in the maximum spanning forest.

    Args:
        i: [pairs] nodes, numbered in the order of their image ids.
        j: [pairs], others than i.
        similarity: [pairs].
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    if not len(i):
        return np.zeros(0, np.int64)
    low, high = np.minimum(i, j), np.maximum(i, j)
    order = np.lexsort((high, low, -similarity))
    nodes, small = np.unique(np.concatenate([low[order], high[order]]), return_inverse=True)
    low, high = small[: len(order)], small[len(order) :]
    # Of a pair that was found several times the most similar one; sparse matrices would add them.
    _, first = np.unique(low * np.int64(len(nodes)) + high, return_index=True)
    first.sort()
    rank = np.arange(1.0, len(first) + 1)
    shape = (len(nodes), len(nodes))
    tree = minimum_spanning_tree(coo_array((rank, (low[first], high[first])), shape=shape).tocsr())
    return np.asarray(order[first[np.sort(tree.data).astype(np.int64) - 1]], np.int64)


class Forest:
    """Takes pairs in any order and keeps their forest, in memory that is bounded by the nodes."""

    def __init__(self) -> None:
        self.parts: list[tuple[Ints, Ints, Doubles]] = []
        self.pending = self.reduced = 0
        self.pairs = 0

    def add(self, i: Any, j: Any, similarity: Any) -> None:
        """Takes pairs of nodes, numbered in the order of their image ids."""
        if not len(i):
            return
        self.pairs += len(i)
        self.parts.append((i, j, similarity))
        self.pending += len(i)
        if self.pending > PENDING + 2 * self.reduced:
            self.edges()

    def edges(self) -> tuple[Ints, Ints, Doubles]:
        """The forest so far: nodes i < j and similarities, the most similar first."""
        none = np.zeros(0, np.int64)
        i, j, similarity = (
            np.concatenate([np.asarray(part[column]) for part in self.parts] or [none])
            for column in range(3)
        )
        kept = spanning(i, j, similarity)
        forest = (np.minimum(i[kept], j[kept]), np.maximum(i[kept], j[kept]), similarity[kept])
        self.parts, self.pending = [forest], len(kept)
        self.reduced = len(kept)
        return forest
