"""The relative join: another set against the stored buckets of a pool.

Images of the other set visit the cells of the pool, and the pool's visitors visit the cells that
the set's images are members of, so a pair is looked for from both sides, as within the pool.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from pipeline.curate.exact import Doubles, Ints
from pipeline.curate.forest import PENDING
from pipeline.curate.items import Items, by_cell
from pipeline.curate.join import best, visit

Array = np.ndarray[Any, Any]


def relative_pairs(
    pool: Items, other: Items, threshold: float, crops: Array, penalty: float
) -> tuple[Ints, Ints, Doubles]:
    """Pairs (item of the pool, item of the other set) of a bucket above the threshold."""
    found: list[tuple[Ints, Ints, Doubles]] = []
    pending = 0
    own, visits = dict(by_cell(*pool.members())), other.visits(home=True)
    by_others = visit(other, visits, pool, own, threshold, crops, penalty)
    own, visits = dict(by_cell(*other.members())), pool.visits(home=False)
    by_pool = visit(pool, visits, other, own, threshold, crops, penalty)
    both = chain(((j, i, s) for i, j, s, _ in by_others), ((i, j, s) for i, j, s, _ in by_pool))
    for pairs in both:
        found.append(pairs)
        pending += len(pairs[0])
        if pending > PENDING:  # the same pairs by several views and cells
            found = [_each_once(pool, other, found)]
            pending = -len(found[0][0])  # the next time when there are twice as many
    return _each_once(pool, other, found)


def _each_once(
    pool: Items, other: Items, found: list[tuple[Ints, Ints, Doubles]]
) -> tuple[Ints, Ints, Doubles]:
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    a, b = (np.concatenate([f[column] for f in found]) for column in (0, 1))
    similarity = np.concatenate([f[2] for f in found])
    chosen = best([pool.row[a], other.row[b]], similarity, [])
    return a[chosen], b[chosen], similarity[chosen]
