"""Maximum spanning forests: of all pairs that are copies, as few as say the same.

Pairs are ordered by similarity, then by the two image ids. With that no two are equal, so there is
one forest, the forest of forests of parts is the forest of all, and no order of work changes it.
The components of its edges above any threshold are those of all pairs above it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.curate.exact import Doubles, Ints

PENDING = 2_000_000  # pairs kept before they are reduced


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
        found = (np.minimum(i[kept], j[kept]), np.maximum(i[kept], j[kept]), similarity[kept])
        self.parts, self.pending = [found], len(kept)
        self.reduced = len(kept)
        return found
