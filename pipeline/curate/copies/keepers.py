"""Which image of each component is kept, and a guard against chains.

Of each component the keeper is chosen: images that do not go in any case (leaks, copies of what was
curated earlier) first, then those that are taken as they are, then the larger area, then more bytes
for each pixel, then the smaller image id. A chain A-B-C of copies may end far from its start:
members whose exact similarity to the keeper is too low are given to keepers of their own (leaders).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.items import Visiting, visiting_of
from pipeline.curate.copies.keeper_facts import KeeperFacts, OnDisk
from pipeline.curate.rows.draws_by_id import group_starts, id_words
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.read_rows import Ids, Rows
from pipeline.curate.rows.tables import COMPONENTS, ID, id_array, write_table

# `tables.COMPONENTS` with the id of the row itself.
MEMBERS = pa.schema([*COMPONENTS, ("image_id", ID)])
CHUNK = 4096  # rows compared with their keepers at once
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Guard:
    """Against chains.

    Attributes:
        least: similarity to its keeper below which a member is of a chain.
        chains: `split`: such members get keepers of their own; `keep`: they do not.
    """

    least: float
    chains: str


def keep_task(
    folder: str,
    facts: KeeperFacts,
    part: int,
    visiting: Visiting | None,
    penalty: float,
    guard: Guard,
) -> dict[str, Any]:
    """Chooses the keepers of the components of a part; writes `MEMBERS`, by row.

    Args:
        folder: of the step.
        facts: about the rows.
        part: which.
        visiting: views that count.
        penalty: of crops.
        guard: against chains.
    """
    column = facts.read(part)
    if column is None:
        return {"rows": 0, "bytes": write_table(MEMBERS.empty_table(), folder, f"{part:05d}")}
    vectors = facts.read_vectors(part)
    by_row = np.argsort(vectors.row)
    at = by_row[np.searchsorted(vectors.row[by_row], column["stands"])]
    order = keeper_order(
        *(column[name] for name in ("label", "goes", "as_is", "area", "density", "image_id"))
    )
    column = {name: values[order] for name, values in column.items()}
    keeper, similarity, chained, size, first_id = choose(
        column["label"],
        column["goes"],
        column["image_id"],
        at[order],
        Similarity(vectors, visiting, penalty),
        guard,
    )
    if isinstance(vectors, OnDisk):
        vectors.close()
    members = pa.table(
        {
            "row": column["row"],
            "component": id_array(first_id),
            "size": size,
            "keeper": column["row"][keeper],
            "keeper_id": id_array(column["image_id"][keeper]),
            "similarity": similarity,
            "chained": chained,
            "image_id": id_array(column["image_id"]),
        }
    ).take(pa.array(np.argsort(column["row"])))
    written = write_table(members.cast(MEMBERS), folder, f"{part:05d}")
    return {"rows": len(members), "bytes": written, "chained": int(chained.sum())}


def keeper_order(
    component: Array, goes: Array, as_is: Array, area: Array, density: Array, ids: Ids
) -> Ints:
    """Rows by component, the best one of each first."""
    high, low = id_words(ids)
    return np.lexsort((low, high, -density, -area, ~as_is, goes, component))


def choose(
    label: Array,
    goes: Array,
    ids: Ids,
    at: Ints,
    similarity_of: Similarity,
    guard: Guard,
) -> tuple[Ints, Doubles, Array, Ints, Ids]:
    """Keepers of rows that are ordered by component, the best first (`keeper_order`).

    Args:
        label: component of each row.
        goes: rows that go in any case: keepers only where all rows of their component go.
        ids: of the rows.
        at: places of their vectors.
        similarity_of: places.
        guard: against chains.

    Returns:
        For each row: the place of its keeper among these rows, the similarity to it, whether it is
        of a chain, the size of its component and the smallest image id in that.
    """
    n = len(label)
    new = group_starts(label)
    start = np.flatnonzero(new)
    component = np.cumsum(new) - 1
    count = np.diff(np.append(start, n))
    keeper = start[component]
    similarity = similarity_of(at, at[keeper])
    similarity[keeper == np.arange(n)] = 1.0
    chained = (similarity < guard.least) & (keeper != np.arange(n))
    if guard.chains == "split":
        for one in np.unique(component[chained]):
            rows = np.arange(start[one], start[one] + count[one])
            _lead(rows[chained[rows]], goes, at, similarity_of, guard.least, keeper, similarity)
    high, low = id_words(ids)
    smallest = np.lexsort((low, high, component))[start]
    return keeper, similarity, chained, count[component], ids[smallest[component]]


def _lead(
    left: Ints,
    goes: Array,
    at: Ints,
    similarity_of: Similarity,
    least: float,
    keeper: Ints,
    similarity: Doubles,
) -> None:
    """Leaders: the best of those left takes all of them that are like it, until none is left.

    Rows that go in any case lead nobody; where no leader takes them the first keeper stays theirs.
    """
    while len(left) and not goes[left[0]]:
        leader, others = left[0], left[1:]
        keeper[leader], similarity[leader] = leader, 1.0
        to_leader = similarity_of(at[others], np.full(len(others), at[leader]))
        taken = to_leader >= least
        keeper[others[taken]], similarity[others[taken]] = leader, to_leader[taken]
        left = others[~taken]


class Similarity:
    """Exact similarities of rows to each other, all views counted.

    Args:
        rows: with their crops where views count; in memory or on disk.
        visiting: as in `items.Visiting`, or None.
        penalty: what the similarity of a crop is reduced by.
    """

    def __init__(self, rows: Rows | OnDisk, visiting: Visiting | None, penalty: float) -> None:
        self.rows, self.visiting, self.penalty = rows, visiting, penalty

    def __call__(self, a: Ints, b: Ints) -> Doubles:
        """Similarity of each pair of places a, b."""
        similarity = np.empty(len(a))
        for begin in range(0, len(a), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            one, other = self.rows.only(a[chunk]), self.rows.only(b[chunk])
            similarity[chunk] = self._seen(one, other)
            if one.crops is not None:
                similarity[chunk] = np.maximum(similarity[chunk], self._seen(other, one))
        return similarity

    def _seen(self, visitors: Rows, members: Rows) -> Doubles:
        views, crops = visiting_of(visitors, self.visiting)
        of = members.vectors.astype(np.float64)
        seen = np.full(len(of), -np.inf)
        for view in range(views.shape[1]):
            dot = np.einsum("nd,nd->n", views[:, view].astype(np.float64), of)
            seen = np.maximum(seen, dot - (self.penalty if crops[view] else 0.0))
        return seen
