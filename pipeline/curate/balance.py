"""A sample of an exact size that shows rare things as well as frequent ones.

The target is shared out across the levels of a hierarchical k-means (`waterfill`); which rows of a
leaf are taken is a draw by hash of their image ids. Only counts come to the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate import smallest
from pipeline.curate.choosing import BALANCE, draw
from pipeline.curate.considered import Considered
from pipeline.curate.hierarchy import Hierarchy
from pipeline.curate.lloyd import Cost
from pipeline.curate.smallest import Entries, Limits
from pipeline.curate.tables import BALANCED, ids_of, read_table, write_table
from pipeline.curate.waterfill import effective, largest, share
from pipeline.curate.work import Account, Result, Task, run_step
from pipeline.uri import Place, join

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Balanced:
    """What was chosen.

    Attributes:
        result: the step that wrote `NNNNN.parquet` (`tables.BALANCED`) for each input file.
        summary: numbers for the report; see `summary_of`.
        cost: of the choice, without the hierarchy.
    """

    result: Result
    summary: dict[str, Any]
    cost: Cost


def balance(
    root: Place,
    name: str,
    rows: Considered,
    hierarchy: Hierarchy,
    images: int,
    seed: int,
    floor: int,
    floor_members: int,
) -> Balanced:
    """Chooses `images` of the rows, or all where there are fewer.

    Args:
        root: folder of the curation.
        name: of the step.
        rows: that the hierarchy was built of.
        hierarchy: of these rows.
        images: to choose.
        seed: of the run.
        floor: images of every leaf with at least `floor_members` rows, as far as `images` allows.
        floor_members: see `floor`.
    """
    cost = Cost()
    shares = share(hierarchy.sizes, hierarchy.parents, images, floor, floor_members)
    limits = smallest.limits(
        root,
        name,
        rows,
        shares.leaves,
        drawn_entries,
        (hierarchy.folder, seed),
        [hierarchy.key, seed],
        cost,
    )
    place = str(join(root, *name.split("/"), f"tops-{hierarchy.key}"))
    write_table(pa.table({"top": hierarchy.tops()}), place, "tops")
    tasks = [Task(file, (file, hierarchy.folder, seed, limits, place)) for file in rows.names]
    result = run_step(root, f"{name}/chosen", limits.key, tasks, _choose_task)
    cost.add(result)
    summary = summary_of(hierarchy, shares.leaves, images)
    summary |= {
        "floor": floor,
        "floor_members": floor_members,
        "leaves_with_floor": shares.floored,
        "leaves_floor_met": shares.floor_met,
        "floor_honoured": shares.floor_met == shares.floored,
        "similarity": list(hierarchy.leaves.similarity),
    }
    return Balanced(result, summary, cost)


def drawn_entries(name: str, assigned: str, seed: int) -> Entries:
    """Rows of a file that ask to be chosen by a draw."""
    table = read_table(assigned, name, ["row", "image_id", "leaf"])
    ids = ids_of(table["image_id"])
    return Entries(
        np.asarray(table["leaf"].to_numpy(), np.int64),
        draw(seed, 0, ids, BALANCE),
        ids,
        np.asarray(table["row"].to_numpy(), np.int64),
    )


def _choose_task(
    folder: str, name: str, assigned: str, seed: int, limits: Limits, place: str
) -> Account:
    entries = drawn_entries(name, assigned, seed)
    chosen = limits.load().chosen(entries)
    tops = np.asarray(read_table(place, "tops")["top"].to_numpy(), np.int64)
    columns = [entries.rows, entries.groups, tops[entries.groups], chosen]
    written = write_table(pa.table(columns, schema=BALANCED), folder, name)
    return {"rows": len(entries.rows), "bytes": written, "chosen": int(chosen.sum())}


def summary_of(hierarchy: Hierarchy, given: Array, images: int) -> dict[str, Any]:
    """Numbers about a choice.

    Args:
        hierarchy: the levels.
        given: rows chosen of each leaf, int64 [leaves].
        images: that were asked for.

    Returns:
        `rows`, `asked`, `chosen`, `sizes_before` and `sizes_after` of the leaves, and for each
        level, leaves first: `clusters`, `occupied`, `unsampled` (with rows, of which none is
        chosen), `effective_before`, `effective_after`, `largest_before`, `largest_after`.
    """
    before, after = hierarchy.level_sizes(hierarchy.sizes), hierarchy.level_sizes(given)
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
        "chosen": int(np.sum(given)),
        "levels": levels,
        "sizes_before": hierarchy.sizes.tolist(),
        "sizes_after": np.asarray(given).tolist(),
    }
