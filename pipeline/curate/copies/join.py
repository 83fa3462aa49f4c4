"""The exact join within cells: which pairs of images are alike.

Each vector is compared with the members of its nearest cells: one matrix product of members and
visitors for each cell, in single precision, with doubles for what comes near the threshold. What is
found in a bucket is reduced to its maximum spanning forest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.items import Items, Shuffled, by_cell
from pipeline.curate.rows.draws_by_id import group_starts, id_words
from pipeline.curate.rows.exact import Doubles, Ints, device, full_precision, pairs_above
from pipeline.curate.rows.read_rows import Ids, order_by_id
from pipeline.curate.rows.tables import ID, ROW, id_array, write_table

TILE = 2048  # items on each side of a product: 16 MiB
PENDING = 2_000_000  # pairs kept before they are reduced

Array = np.ndarray[Any, Any]
Pairs = tuple[Ints, Ints, Doubles]

# Pairs of a bucket, with the ids that order pairs of equal similarity.
PAIRS = pa.schema(
    [("a", ROW), ("b", ROW), ("similarity", pa.float64()), ("a_id", ID), ("b_id", ID)]
)


def join_task(
    folder: str, shuffled: Shuffled, bucket: int, lowest: float, penalty: float
) -> dict[str, Any]:
    """Joins a bucket with itself and writes the forest of its pairs above `lowest`."""
    items = shuffled.read(bucket)
    node, row, ids = nodes_of(items)
    forest = Forest()
    compared = 0
    for i, j, similarity, products in self_pairs(items, lowest, np.array(shuffled.crops), penalty):
        compared += products
        a, b = node[i], node[j]
        other = a != b
        forest.add(a[other], b[other], similarity[other])
    a, b, similarity = forest.edges()
    size = write_table(pairs_table(row, ids, a, b, similarity), folder, f"{bucket:05d}")
    _, sizes = np.unique(items.members()[1], return_counts=True)
    return {
        "rows": int(items.member.sum()),
        "bytes": size,
        "items": len(items),
        "pairs": forest.pairs,
        "edges": len(a),
        "compared": compared,
        "largest_cell": int(sizes.max(initial=0)),
    }


def nodes_of(items: Items) -> tuple[Ints, Ints, Ids]:
    """Node of each item; rows and ids of the nodes, which are ordered by image id."""
    row, first, inverse = np.unique(items.row, return_index=True, return_inverse=True)
    ids = items.ids[first]
    order = order_by_id(ids, row)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse], row[order], ids[order]


def pairs_table(row: Ints, ids: Ids, a: Ints, b: Ints, similarity: Doubles) -> pa.Table:
    """Pairs of nodes as `PAIRS`."""
    return pa.table(
        {
            "a": row[a],
            "b": row[b],
            "similarity": similarity,
            "a_id": id_array(ids[a]),
            "b_id": id_array(ids[b]),
        }
    ).cast(PAIRS)


def self_pairs(
    items: Items, lowest: float, crops: Array, penalty: float
) -> Iterator[tuple[Ints, Ints, Doubles, int]]:
    """Pairs of items of a bucket above `lowest`, and how many products were made."""
    own = dict(by_cell(*items.members()))
    for _, mine in by_cell(*items.members()):
        x = items.vectors[mine]
        for a in range(0, len(mine), TILE):
            for b in range(a, len(mine), TILE):
                i, j, similarity = tile(x[a : a + TILE], x[b : b + TILE], lowest)
                upper = j + b > i + a
                products = len(x[a : a + TILE]) * len(x[b : b + TILE])
                yield mine[i[upper] + a], mine[j[upper] + b], similarity[upper], products
    yield from visit(items, items.visits(home=False), items, own, lowest, crops, penalty)


def visit(
    visitors: Items,
    visits: tuple[Ints, Array],
    hosts: Items,
    own: dict[int, Ints],
    lowest: float,
    crops: Array,
    penalty: float,
) -> Iterator[tuple[Ints, Ints, Doubles, int]]:
    """Pairs (visitor, member) above `lowest` in the cells that visitors and members share.

    Args:
        visitors: who visits.
        visits: (visitor, cell) of each visit.
        hosts: who is visited.
        own: members of each cell.
        lowest: of the similarity.
        crops: which views are of crops; their similarity is reduced by the penalty.
        penalty: see crops.

    Yields:
        Visitors, members, similarities, and how many products were made.
    """
    reduced = np.where(crops, penalty, 0.0)
    for cell, guests in by_cell(*visits):
        mine = own.get(cell)
        if mine is None:
            continue
        y = hosts.vectors[mine]
        for a in range(0, len(guests), TILE):
            here = guests[a : a + TILE]
            x, less = visitors.vectors[here], reduced[visitors.view[here]]
            for b in range(0, len(mine), TILE):
                i, j, similarity = tile(x, y[b : b + TILE], lowest, less)
                members = mine[j + b]
                yield here[i], members, similarity - less[i], len(x) * len(y[b : b + TILE])


def tile(x: Array, y: Array, lowest: float, less: Array | None = None) -> Pairs:
    """Pairs of x and y whose exact product, less what `less` says of x, is above `lowest`."""
    threshold: Any = lowest if less is None or not less.any() else lowest + less
    if on := device():
        import torch

        # TF32 would be wrong by more than the margin that doubles look at.
        with torch.inference_mode(), full_precision(torch):
            a, b = (torch.from_numpy(np.ascontiguousarray(v)).to(on) for v in (x, y))
            return pairs_above(x, y, threshold, (a @ b.T).cpu().numpy())
    return pairs_above(x, y, threshold)


def best(keys: Sequence[Array], similarity: Doubles, ids: Sequence[Ids | Array]) -> Ints:
    """Places of the best pair of each key: the highest similarity, then the smallest of `ids`."""
    if not len(similarity):
        return np.zeros(0, np.int64)
    ties: list[Array] = []
    for one in reversed(ids):
        ties.extend(reversed(id_words(one)) if one.ndim == 2 else [one])
    order = np.lexsort([*ties, -similarity, *keys])
    return order[group_starts(*(key[order] for key in keys))]


# ---- The relative join: another set against the stored buckets of a pool.
#
# Images of the other set visit the cells of the pool, and the pool's visitors visit the cells
# that the set's images are members of, so a pair is looked for from both sides, as within the
# pool.


def relative_pairs(
    pool: Items, other: Items, threshold: float, crops: Array, penalty: float
) -> tuple[Ints, Ints, Doubles]:
    """Pairs (item of the pool, item of the other set) of a bucket above the threshold."""
    pairs: list[Pairs] = []
    pending = 0
    own, visits = dict(by_cell(*pool.members())), other.visits(home=True)
    by_others = visit(other, visits, pool, own, threshold, crops, penalty)
    own, visits = dict(by_cell(*other.members())), pool.visits(home=False)
    by_pool = visit(pool, visits, other, own, threshold, crops, penalty)
    both = chain(((j, i, s) for i, j, s, _ in by_others), ((i, j, s) for i, j, s, _ in by_pool))
    for of_cell in both:
        pairs.append(of_cell)
        pending += len(of_cell[0])
        if pending > PENDING:  # the same pairs by several views and cells
            pairs = [_each_once(pool, other, pairs)]
            pending = -len(pairs[0][0])  # the next time when there are twice as many
    return _each_once(pool, other, pairs)


def _each_once(pool: Items, other: Items, pairs: list[Pairs]) -> Pairs:
    """Of the pairs of items that are of the same two rows, the most similar one."""
    if not pairs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    a, b, similarity = (np.concatenate(column) for column in zip(*pairs, strict=True))
    chosen = best([pool.row[a], other.row[b]], similarity, [])
    return a[chosen], b[chosen], similarity[chosen]


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
