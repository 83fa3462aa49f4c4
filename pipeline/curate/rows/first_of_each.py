"""Order among rows, and the first ones of each group: numpy and tables in memory, no files.

What comes first is decided by a key, then by image ids: so no order of files, workers or rows
changes it. "The first m of a group" by (key, image id) is what each choice is made of.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray[Any, Any]


def id_words(ids: Array) -> tuple[Array, Array]:
    """Ids, or hashes of 16 bytes, as two numbers each, which compare like the bytes."""
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0], words[:, 1]


def in_order(*keys: Array) -> Array:
    """Places by the first key, of equals by the second, and so on; uint8 [n, 16] counts as ids."""
    flat = [word for key in keys for word in (id_words(key) if key.ndim == 2 else (key,))]
    return np.lexsort(flat[::-1])


def group_starts(*keys: Array) -> Array:
    """Which rows are the first of their group, where those with equal keys stand together."""
    starts = np.ones(len(keys[0]), bool)
    starts[1:] = False
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return starts


def first_of_each(group: Array, *order: Array) -> tuple[Array, Array]:
    """Rows that are not the first of their group by `order`: their places, and those of the first.

    Args:
        group: uint8 [n, 16].
        order: keys [n], or ids.
    """
    by = in_order(group, *order)
    new = group_starts(*id_words(group[by]))
    first = by[np.flatnonzero(new)[np.cumsum(new) - 1]]
    return by[~new], first[~new]


def firsts(groups: Array, keys: Array, ids: Array, rows: Array, quota: Array) -> Array:
    """Places of the first `quota[group]` of each group, in order.

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


def best(table: pa.Table, *by: str) -> pa.Table:
    """One row for each value of the columns `by`, in their order: the most similar one, of equals
    that with the smallest of the other columns.
    """
    others = [name for name in table.column_names if name not in (*by, "similarity")]
    keys = [*((name, "ascending") for name in by), ("similarity", "descending")]
    keys += [(name, "ascending") for name in others]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    if len(table) < 2:
        return table
    again = np.ones(len(table) - 1, bool)
    for name in by:
        same = pc.equal(table[name].slice(1), table[name].slice(0, len(table) - 1))
        again &= same.to_numpy(zero_copy_only=False)
    first = np.append(True, ~again)
    return table.filter(pa.array(first))
