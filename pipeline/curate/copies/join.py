"""The exact join within cells: which pairs of images are alike.

Each vector is compared with the members of its nearest cells: one matrix product of members and
visitors for each cell, in single precision, with doubles for what comes near the threshold. What is
found in a bucket is reduced to its maximum spanning forest.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import Items, StoredItems, by_cell
from pipeline.curate.copies.forest import PAIRS, PENDING, Forest, nodes_of
from pipeline.curate.rows.exact import Doubles, Ints, device, full_precision, pairs_above
from pipeline.curate.rows.first_of_each import best
from pipeline.curate.rows.tables import ID, ROW, id_array
from pipeline.curate.steps.steps import Account, Output

TILE = 2048  # items on each side of a product: 16 MiB

Array = np.ndarray[Any, Any]

# Pairs of rows of two sets, each with the id of the image.
PAIRS_BETWEEN = pa.schema(
    [("row", ROW), ("image_id", ID), ("other", ROW), ("other_id", ID), ("similarity", pa.float64())]
)


def join_bucket(
    out: Output, bucket: int, stored: StoredItems, lowest: float, penalty: float
) -> Account:
    """Task: joins a bucket with itself and writes the forest of its pairs above `lowest`."""
    here = stored.read(bucket)
    node, row, ids = nodes_of(here.row, here.ids)
    forest = Forest()
    compared = 0
    for i, j, similarity, products in self_pairs(here, lowest, np.array(stored.crops), penalty):
        compared += products
        a, b = node[i], node[j]
        different = a != b
        forest.add(a[different], b[different], similarity[different])
    a, b, similarity = forest.edges()
    columns = [row[a], row[b], similarity, id_array(ids[a]), id_array(ids[b])]
    out.table(pa.table(columns, schema=PAIRS))
    _, sizes = np.unique(here.members()[1], return_counts=True)
    return {
        "rows": int(here.member.sum()),
        "items": len(here),
        "pairs": forest.pairs,
        "edges": len(a),
        "compared": compared,
        "largest_cell": int(sizes.max(initial=0)),
    }


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


def tile(
    x: Array, y: Array, lowest: float, less: Array | None = None
) -> tuple[Ints, Ints, Doubles]:
    """Pairs of x and y whose exact product, less what `less` says of x, is above `lowest`."""
    threshold: Any = lowest if less is None or not less.any() else lowest + less
    if on := device():
        import torch

        # TF32 would be wrong by more than the margin that doubles look at.
        with torch.inference_mode(), full_precision(torch):
            a, b = (torch.from_numpy(np.ascontiguousarray(v)).to(on) for v in (x, y))
            return pairs_above(x, y, threshold, (a @ b.T).cpu().numpy())
    return pairs_above(x, y, threshold)


# ---- The relative join: another set against the stored buckets of a pool.
#
# Images of the other set visit the cells of the pool, and the pool's visitors visit the cells
# that the set's images are members of, so a pair is looked for from both sides, as within the
# pool.


def pairs_between(
    pool: Items, other: Items, threshold: float, crops: Array, penalty: float
) -> pa.Table:
    """The most similar items of each two rows of a bucket above the threshold, `PAIRS_BETWEEN`."""
    own, visits = dict(by_cell(*pool.members())), other.visits(home=True)
    by_others = visit(other, visits, pool, own, threshold, crops, penalty)
    own, visits = dict(by_cell(*other.members())), pool.visits(home=False)
    by_pool = visit(pool, visits, other, own, threshold, crops, penalty)
    both = chain(((j, i, s) for i, j, s, _ in by_others), ((i, j, s) for i, j, s, _ in by_pool))
    pairs = [PAIRS_BETWEEN.empty_table()]
    pending, most = 0, PENDING
    for a, b, similarity in both:
        ids, other_ids = id_array(pool.ids[a]), id_array(other.ids[b])
        columns = [pool.row[a], ids, other.row[b], other_ids, similarity]
        pairs.append(pa.table(columns, schema=PAIRS_BETWEEN))
        pending += len(a)
        if pending > most:  # the same pairs by several views and cells
            pairs = [best(pa.concat_tables(pairs), "row", "other")]
            pending, most = 0, max(PENDING, len(pairs[0]))
    return best(pa.concat_tables(pairs), "row", "other")
