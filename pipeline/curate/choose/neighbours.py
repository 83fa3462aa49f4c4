"""Sample-based retrieval: the pool's rows nearest to each seed image (DINOv2 paper, section 3).

Exact: single precision finds candidates, doubles decide, equals are ordered by image id. A task
holds a block of seeds and goes through a part of the pool, so the seeds are read once for each
part and the pool once for each block; the products cost far more than both.

An image of the set that is in the pool too (equal image id) is never retrieved for the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.choose.first_few import Entries
from pipeline.curate.rows.exact import Doubles, Halves, dots, margin
from pipeline.curate.rows.read_rows import Points, RowSet
from pipeline.curate.rows.tables import ID, ROW, id_array, read_table
from pipeline.curate.steps.steps import Account, Output, Step, Steps, by_number

Array = np.ndarray[Any, Any]

SEED_ROWS = 2**16  # of one task
POOL_ROWS = 2**18  # of one task
BLOCK_SEEDS, BLOCK_POOL = 4096, 4096  # products in memory at once
PAIRS = 2**14  # that doubles decide at once
# What seeds ask for, between the steps of retrieval
ASKED = pa.schema(
    [
        ("row", ROW),
        ("query_id", ID),
        ("similarity", pa.float64()),
        ("rank", pa.int32()),
        ("cluster", pa.int64()),
    ]
)


def all_ids(folder: str, names: Sequence[str]) -> pa.ChunkedArray:
    """Ids of all rows of these files, whether they count or not."""
    columns = [read_table(folder, name, ["image_id"])["image_id"].cast(ID) for name in names]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], ID)


def are_in(ids: Array, others: pa.ChunkedArray) -> Array:
    """Which of these ids are among others, bool [n]."""
    among: Array = pc.is_in(id_array(ids), others).to_numpy(zero_copy_only=False)
    return among


@dataclass
class Neighbours:
    """The nearest rows to each of some seeds so far.

    Args:
        seeds: of which `ids` and `vectors` are used.
        count: neighbours of each.
        least: similarity that a neighbour has at least.
    """

    seeds: Points
    count: int
    least: float

    def __post_init__(self) -> None:
        self._nearest = Entries.joined([])
        self._waiting: list[Entries] = []
        self._last = np.full(len(self.seeds.ids), self.least)  # similarity that one must have

    def add(self, points: Points) -> None:
        """Looks at more rows of the pool."""
        for start in range(0, len(points.rows), BLOCK_POOL):
            block = slice(start, start + BLOCK_POOL)
            pool = points.vectors[block].astype(np.float32).T
            for first in range(0, len(self._last), BLOCK_SEEDS):
                seeds = self.seeds.vectors[first : first + BLOCK_SEEDS]
                fast = seeds.astype(np.float32) @ pool
                self._look(fast, first, points, start)
            if sum(len(w.rows) for w in self._waiting) > max(10_000, len(self._nearest.rows)):
                self._keep_nearest()

    def nearest(self) -> Entries:
        """Groups are numbers of seeds, keys negated similarities; by seed and rank."""
        self._keep_nearest()
        return self._nearest

    def _look(self, fast: Array, first: int, points: Points, start: int) -> None:
        """Keeps candidates among products of seeds from `first` and points from `start`."""
        wrong = margin(points.vectors.shape[1])
        seeds = self.seeds.vectors
        last = self._last[first : first + len(fast)] - wrong
        asked = fast >= last[:, None]
        # At first nearly all of the pool passes, because no seed has its neighbours yet.
        if fast.shape[1] > self.count and asked.sum() > 4 * self.count * len(fast):
            best = -np.partition(-fast, self.count - 1, axis=1)[:, self.count - 1]
            asked &= fast >= (best - 2 * wrong)[:, None]
        i, j = np.nonzero(asked)
        exact = _dots(seeds, i + first, points.vectors, j + start)  # doubles decide
        near = exact >= self._last[i + first]
        i, j = i[near] + first, j[near] + start
        self._waiting.append(Entries(i, -exact[near], points.ids[j], points.rows[j]))

    def _keep_nearest(self) -> None:
        """Keeps the nearest of what was found."""
        both = Entries.joined([self._nearest, *self._waiting])
        quota = np.full(len(self._last), self.count)
        self._nearest, self._waiting = both.first(quota), []
        full = np.bincount(self._nearest.groups, minlength=len(quota)) == self.count
        ends = np.searchsorted(self._nearest.groups, np.flatnonzero(full), side="right") - 1
        self._last[full] = -self._nearest.keys[ends]


def _dots(a: Halves, i: Array, b: Halves, j: Array) -> Doubles:
    products = np.empty(len(i))
    for at in range(0, len(i), PAIRS):
        part = slice(at, at + PAIRS)
        products[part] = dots(a[i[part]], b[j[part]])
    return products


def ask_neighbours(
    steps: Steps, pool: RowSet, seeds: RowSet, count: int, least: float
) -> tuple[Step, dict[str, int]]:
    """What the seeds of a set ask for.

    Args:
        steps: whose folder is the set's own.
        pool: rows to retrieve.
        seeds: images to ask.
        count: neighbours of each.
        least: similarity of a neighbour, at least.

    Returns:
        The step that wrote what they ask for (`ASKED`, by row), and counts: `requested`, `found`
        and `seeds_short`, which have fewer neighbours than `count`.
    """
    blocks = by_number(seeds.groups(SEED_ROWS))
    pairs = {
        f"{name}-{number}": (block, group)
        for name, block in blocks.items()
        for number, group in by_number(pool.groups(POOL_ROWS)).items()
    }
    near = steps.run("near", _near_task, pairs, pool=pool, seeds=seeds, count=count, least=least)
    asked = steps.run("asked", _merge_task, blocks, near=near, seeds=seeds, count=count)
    return asked, {
        "requested": seeds.rows * count,
        "found": int(asked.total("rows")),
        "seeds_short": int(asked.total("short")),
    }


def _near_task(
    out: Output,
    both: tuple[Sequence[str], Sequence[str]],
    pool: RowSet,
    seeds: RowSet,
    count: int,
    least: float,
) -> None:
    """The rows of a part of the pool that are nearest to each of a block of seeds."""
    block, group = both
    own = all_ids(seeds.source.folder, seeds.names)
    search = Neighbours(seeds.source.read_all(block), count, least)
    for file in group:
        points = pool.source.read(file)
        other = ~are_in(points.ids, own)
        search.add(Points(points.rows[other], points.ids[other], points.vectors[other]))
    out.table(search.nearest().table())


def _merge_task(
    out: Output, block: Sequence[str], near: Step, seeds: RowSet, count: int
) -> Account:
    """The nearest of all parts of the pool to each seed of a block, by row."""
    ids = seeds.source.ids(block)
    quota = np.full(len(ids), count)
    nearest = Entries.joined([])
    for part in near.tables:
        if part.startswith(f"{out.name}-"):
            nearest = Entries.joined([nearest, Entries.read(near.read(part))]).first(quota)
    groups = nearest.groups
    rank = np.arange(len(groups)) - np.searchsorted(groups, groups, side="left")
    order = np.argsort(nearest.rows, kind="stable")
    columns = [
        nearest.rows[order],
        id_array(ids[groups[order]]),
        -nearest.keys[order],
        rank[order].astype(np.int32),
        np.full(len(order), -1),
    ]
    out.table(pa.table(columns, schema=ASKED))
    return {"short": int((np.bincount(groups, minlength=len(ids)) < count).sum())}
