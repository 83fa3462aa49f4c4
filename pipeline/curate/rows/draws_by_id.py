"""Order that depends on image ids alone: draws by hash, and the first few of every group.

"The first m of a group" by (key, image id) is what keeps a choice independent of files, workers and
row order. Keys are uniform numbers of the image, or its similarity, negated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.views.draws import GOLDEN as GOLDEN
from pipeline.views.draws import mix as mix
from pipeline.views.draws import uniforms

Array = np.ndarray[Any, Any]
# Streams of `pipeline.views.draws.uniforms`; those of training are 0 and 1.
SEEDING, REFILL, BALANCE, RETRIEVE = 16, 17, 18, 19


def draw(seed: int, what: int, ids: Array, stream: int) -> Array:
    """One uniform number in [0, 1) for each image, float64 [n].

    Args:
        seed: of the run.
        what: number of the round or of the set that is drawn for.
        ids: uint8 [n, 16].
        stream: one of the constants above.
    """
    return uniforms(seed, what, np.ascontiguousarray(ids), 1, stream)[:, 0]


def race(seed: int, what: int, ids: Array, weights: Array, stream: int) -> Array:
    """Arrival times of exponential clocks with these rates, float64 [n].

    The m earliest are a sample of m without replacement in proportion to the weights (Efraimidis
    and Spirakis, 2006). Rate 0 never arrives.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        times = -np.log1p(-draw(seed, what, ids, stream)) / weights
    return np.where(weights > 0, times, np.inf)


def id_words(ids: Array) -> tuple[Array, Array]:
    """Ids as two words each, which compare like the bytes."""
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0], words[:, 1]


def numbers_as_ids(count: int) -> Array:
    """Ids for things that are numbered, such as centroids: uint8 [count, 16]."""
    words = np.zeros((count, 2), ">u8")
    words[:, 1] = np.arange(count)
    return words.view(np.uint8).reshape(count, 16)


def in_order(groups: Array, keys: Array, ids: Array, rows: Array) -> Array:
    """Positions sorted by group, key, id and, for equal images, row."""
    high, low = id_words(ids)
    return np.lexsort((rows, low, high, keys, groups))


def group_starts(*keys: Array) -> Array:
    """Which rows are the first of their group, where those with equal keys stand together."""
    starts = np.ones(len(keys[0]), bool)
    starts[1:] = False
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return starts


def firsts(groups: Array, keys: Array, ids: Array, rows: Array, quota: Array) -> Array:
    """Positions of the first `quota[group]` of each group, in order.

    Args:
        groups: int [n], numbers below len(quota).
        keys: float64 [n].
        ids: uint8 [n, 16].
        rows: int64 [n].
        quota: int [groups].
    """
    order = in_order(groups, keys, ids, rows)
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    rank = np.arange(len(order)) - starts
    return order[rank < quota[ordered]]


def not_after(
    keys: Array,
    ids: Array,
    rows: Array,
    limit_keys: Array,
    limit_ids: Array,
    limit_rows: Array,
) -> Array:
    """Whether (key, id, row) is at most the limit beside it, bool [n]."""
    high, low = id_words(ids)
    limit_high, limit_low = id_words(limit_ids)
    upto = rows <= limit_rows
    for mine, limit in ((low, limit_low), (high, limit_high), (keys, limit_keys)):
        upto = (mine < limit) | ((mine == limit) & upto)
    return upto
