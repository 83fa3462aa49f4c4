"""A sample of an exact size that shows rare things as well as frequent ones.

The target is shared out across the levels of a hierarchical k-means (`waterfill`); which rows of a
leaf are taken is a draw by hash of their image ids. Only counts come to the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import first_few
from pipeline.curate.choose.first_few import Entries, Limits
from pipeline.curate.choose.hierarchy import Hierarchy, added_up
from pipeline.curate.rows.draws_by_id import BALANCE, draw
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import BALANCED, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sample:
    """What a balanced sample is asked for.

    Attributes:
        images: to choose; all where there are fewer.
        seed: of the run.
        floor: images of every leaf with at least `floor_members` rows, as far as `images` allows.
        floor_members: see `floor`.
    """

    images: int
    seed: int
    floor: int
    floor_members: int


@dataclass(frozen=True)
class Balanced:
    """What was chosen.

    Attributes:
        result: the step that wrote `NNNNN.parquet` (`tables.BALANCED`) for each input file.
        summary: numbers for the report; see `summary_of`.
    """

    result: Step
    summary: dict[str, Any]


def balanced_sample(steps: Steps, rows: RowSet, hierarchy: Hierarchy, sample: Sample) -> Balanced:
    """Chooses some of the rows.

    Args:
        steps: whose folder is the sample's own.
        rows: that the hierarchy was built of.
        hierarchy: of these rows.
        sample: what is asked for.
    """
    shares = leaf_shares(
        hierarchy.sizes, hierarchy.parents, sample.images, sample.floor, sample.floor_members
    )
    reader = partial(drawn_entries, assigned=hierarchy.assigned, seed=sample.seed)
    limits = first_few.limits(steps, rows, shares.leaves, reader)
    chosen = steps.run(
        "chosen",
        _choose_task,
        dict.fromkeys(rows.names),
        reader=reader,
        limits=limits,
        tops=hierarchy.tops(),
    )
    summary = summary_of(hierarchy, shares.leaves, sample.images)
    summary |= {
        "floor": sample.floor,
        "floor_members": sample.floor_members,
        "leaves_with_floor": shares.floored,
        "leaves_floor_met": shares.floor_met,
        "floor_honoured": shares.floor_met == shares.floored,
        "similarity": list(hierarchy.leaves.similarity),
    }
    return Balanced(chosen, summary)


def drawn_entries(name: str, assigned: Step, seed: int) -> Entries:
    """Rows of a file that ask to be chosen by a draw."""
    table = assigned.read(name, ["row", "image_id", "leaf"])
    return Entries.of(table, draw(seed, 0, ids_of(table["image_id"]), BALANCE))


def _choose_task(
    out: Output, _: None, reader: first_few.Reader, limits: Limits, tops: Array
) -> Account:
    entries = reader(out.name)
    chosen = limits.load().chosen(entries)
    columns = [entries.rows, entries.groups, tops[entries.groups], chosen]
    out.table(pa.table(columns, schema=BALANCED))
    return {"chosen": int(chosen.sum())}


def summary_of(hierarchy: Hierarchy, taken: Array, images: int) -> dict[str, Any]:
    """Numbers about a choice.

    Args:
        hierarchy: the levels.
        taken: rows chosen of each leaf, int64 [leaves].
        images: that were asked for.

    Returns:
        `rows`, `asked`, `chosen`, `sizes_before` and `sizes_after` of the leaves, and for each
        level, leaves first: `clusters`, `occupied`, `unsampled` (with rows, of which none is
        chosen), `effective_before`, `effective_after`, `largest_before`, `largest_after`.
    """
    before, after = hierarchy.level_sizes(hierarchy.sizes), hierarchy.level_sizes(taken)
    levels = [
        {
            "clusters": len(pool),
            "occupied": int((pool > 0).sum()),
            "unsampled": int(((pool > 0) & (chosen == 0)).sum()),
            "effective_before": effective(pool),
            "effective_after": effective(chosen),
            "largest_before": largest(pool),
            "largest_after": largest(chosen),
        }
        for pool, chosen in zip(before, after, strict=True)
    ]
    return {
        "rows": int(hierarchy.sizes.sum()),
        "asked": images,
        "chosen": int(np.sum(taken)),
        "levels": levels,
        "sizes_before": hierarchy.sizes.tolist(),
        "sizes_after": np.asarray(taken).tolist(),
    }


# ---- How many images each cluster gives: water-filling, level by level, over a floor.
#
# Water-filling gives every cluster the same number, but no more than it has: the level c at which
# the sum of min(c, size) is the target (Vo et al. 2024, section 3.3). The floor is ours: a leaf
# with enough members is never left out as long as the target allows.


def waterfill(sizes: Array, target: int, floors: Array | None = None) -> Array:
    """Parts of `target` that are as equal as can be, each at least its floor, at most its size.

    What is left when all that can give more gave equally goes to the larger ones first, one each,
    of equals to the lower number.

    Args:
        sizes: most that each can give, int [n].
        target: in all; everything is given where this is more.
        floors: least that each gives, int [n]; at most the sizes, their sum at most the target.

    Returns:
        int64 [n], whose sum is the target or the sum of the sizes.
    """
    sizes = np.asarray(sizes, np.int64)
    least = np.zeros_like(sizes) if floors is None else np.asarray(floors, np.int64)
    target = int(max(0, min(target, sizes.sum())))
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the highest level whose sum is at most the target
        middle = (low + high + 1) // 2
        if np.clip(middle, least, sizes).sum() <= target:
            low = middle
        else:
            high = middle - 1
    parts: Array = np.clip(low, least, sizes)
    more = np.flatnonzero((sizes > low) & (parts <= low))
    more = more[np.argsort(-sizes[more], kind="stable")]
    parts[more[: target - int(parts.sum())]] += 1
    return parts


@dataclass(frozen=True)
class Shares:
    """What each leaf gives.

    Attributes:
        leaves: images of each, int64 [leaves].
        floored: leaves that the floor is for.
        floor_met: of them, those that give as much as the floor asks.
    """

    leaves: Array
    floored: int
    floor_met: int


def leaf_shares(
    sizes: Array, parents: Sequence[Array], target: int, floor: int, floor_members: int
) -> Shares:
    """Shares the target out from the top level down to the leaves.

    Where the floors of all leaves are more than the target, they are what is shared out, so that
    as many leaves as possible give something.

    Args:
        sizes: rows of each leaf, int64 [leaves].
        parents: for each level but the top, the cluster of the next level of each cluster.
        target: images in all.
        floor: images of a leaf with at least `floor_members` rows.
        floor_members: see `floor`.
    """
    sizes = np.asarray(sizes, np.int64)
    floors = np.where(sizes >= max(1, floor_members), np.minimum(floor, sizes), 0)
    if floors.sum() > target:
        leaves = _down(floors, np.zeros_like(floors), parents, target)
    else:
        leaves = _down(sizes, floors, parents, target)
    asked = floors > 0
    return Shares(leaves, int(asked.sum()), int((leaves[asked] >= floors[asked]).sum()))


def _down(sizes: Array, floors: Array, parents: Sequence[Array], target: int) -> Array:
    """Water-fills the top level, and what each cluster gets among its children."""
    size_of, floor_of = added_up(sizes, parents), added_up(floors, parents)
    # From the top down: a cluster's part is what its children share out among themselves.
    parts = waterfill(size_of[-1], target, floor_of[-1])
    for level in range(len(parents) - 1, -1, -1):
        above, below = parents[level], np.zeros(len(parents[level]), np.int64)
        order = np.argsort(above, kind="stable")
        ends = np.cumsum(np.bincount(above, minlength=len(parts)))
        for cluster, (start, end) in enumerate(pairwise([0, *ends])):
            children = order[start:end]
            below[children] = waterfill(
                size_of[level][children], int(parts[cluster]), floor_of[level][children]
            )
        parts = below
    return parts


def effective(counts: Array) -> float:
    """Effective number of clusters: the exponential of the entropy of their shares; 0 for none."""
    counts = np.asarray(counts, np.float64)
    shares = counts[counts > 0] / max(1.0, counts.sum())
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def largest(counts: Array) -> float:
    """Share of the largest cluster; 0 for none."""
    total = float(np.sum(counts))
    return float(np.max(counts)) / total if total else 0.0
