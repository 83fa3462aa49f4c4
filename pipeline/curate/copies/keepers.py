"""Which image of each component is kept, and a guard against chains.

Of each component the keeper is chosen: images that do not go in any case (leaks, copies of what was
curated earlier) first, then those that are taken as they are, then the larger area, then more bytes
for each pixel, then the smaller image id. A chain A-B-C of copies may end far from its start:
members whose exact similarity to the keeper is too low are given to keepers of their own (leaders).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import Visiting, visiting_of
from pipeline.curate.copies.keeper_facts import OnDisk, read_facts, read_vectors
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.first_of_each import group_starts, in_order
from pipeline.curate.rows.read_rows import Ids, Rows
from pipeline.curate.rows.tables import COMPONENTS, ID, id_array
from pipeline.curate.steps.steps import Account, Output, Step

# `tables.COMPONENTS` with the id of the row itself.
MEMBERS = pa.schema([*COMPONENTS, ("image_id", ID)])
CHUNK = 4096  # rows compared with their keepers at once
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CopyRule:
    """When images are copies.

    Attributes:
        threshold: two that show the same are if they are more similar than this.
        guard: a member that is so much less like its keeper is of a chain.
        chains: `split`: such members get keepers of their own; `keep`: they do not.
    """

    threshold: float
    guard: float = 0.1
    chains: str = "split"

    @property
    def least(self) -> float:
        """Similarity to its keeper below which a member is of a chain."""
        return self.threshold - self.guard


@dataclass(frozen=True)
class HowSimilar:
    """What counts for the similarity of two images.

    Attributes:
        visiting: further views of an image, as in `cell_items.Visiting`, or None.
        penalty: what the similarity of a crop is reduced by.
    """

    visiting: Visiting | None = None
    penalty: float = 0.0


def choose_keepers(
    out: Output, shard: int, facts: Step, dim: int, similar: HowSimilar, rule: CopyRule
) -> Account:
    """Task: chooses the keepers of the components of a shard; writes `MEMBERS`, by row.

    Args:
        out: where to.
        shard: which.
        facts: about the rows (`keeper_facts.gather_facts`).
        dim: of a vector.
        similar: how rows are compared.
        rule: what is a copy, and what a chain.
    """
    column = read_facts(facts, shard)
    if not len(column["row"]):
        out.table(MEMBERS.empty_table())
        return {}
    vectors = read_vectors(facts, shard, dim)
    by_row = np.argsort(vectors.row)
    at = by_row[np.searchsorted(vectors.row[by_row], column["stands"])]
    order = keeper_order(
        *(column[name] for name in ("label", "goes", "as_is", "area", "density", "image_id"))
    )
    column = {name: values[order] for name, values in column.items()}
    label, goes, ids, row = (column[name] for name in ("label", "goes", "image_id", "row"))
    chosen = choose(label, goes, ids, at[order], Similarity(vectors, similar), rule)
    if isinstance(vectors, OnDisk):
        vectors.close()
    keeper = chosen.keeper
    columns = [
        row,
        id_array(chosen.component),
        chosen.size,
        row[keeper],
        id_array(ids[keeper]),
        chosen.similarity,
        chosen.chained,
        id_array(ids),
    ]
    out.table(pa.table(columns, schema=MEMBERS).take(pa.array(np.argsort(row))))
    return {"chained": int(chosen.chained.sum())}


def keeper_order(
    component: Array, goes: Array, as_is: Array, area: Array, density: Array, ids: Ids
) -> Ints:
    """Rows by component, the best one of each first."""
    return in_order(component, goes, ~as_is, -area, -density, ids)


class Chosen(NamedTuple):
    """Of each row.

    Attributes:
        keeper: its place among these rows.
        similarity: to the keeper.
        chained: whether it is of a chain.
        size: of its component.
        component: the smallest image id in that.
    """

    keeper: Ints
    similarity: Doubles
    chained: Array
    size: Ints
    component: Ids


def choose(
    label: Array, goes: Array, ids: Ids, at: Ints, similarity_of: Similarity, rule: CopyRule
) -> Chosen:
    """Keepers of rows that are ordered by component, the best first (`keeper_order`).

    Args:
        label: component of each row.
        goes: rows that go in any case: keepers only where all rows of their component go.
        ids: of the rows.
        at: places of their vectors.
        similarity_of: places.
        rule: what is a copy, and what a chain.
    """
    n = len(label)
    new = group_starts(label)
    start = np.flatnonzero(new)
    component = np.cumsum(new) - 1
    count = np.diff(np.append(start, n))
    keeper = start[component]
    similarity = similarity_of(at, at[keeper])
    similarity[keeper == np.arange(n)] = 1.0
    chained = (similarity < rule.least) & (keeper != np.arange(n))
    if rule.chains == "split":
        for one in np.unique(component[chained]):
            rows = np.arange(start[one], start[one] + count[one])
            _lead(rows[chained[rows]], goes, at, similarity_of, rule.least, keeper, similarity)
    smallest = in_order(component, ids)[start]
    return Chosen(keeper, similarity, chained, count[component], ids[smallest[component]])


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
        how: they are compared.
    """

    def __init__(self, rows: Rows | OnDisk, how: HowSimilar) -> None:
        self.rows, self.how = rows, how

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
        views, crops = visiting_of(visitors, self.how.visiting)
        of = members.vectors.astype(np.float64)
        seen = np.full(len(of), -np.inf)
        for view in range(views.shape[1]):
            dot = np.einsum("nd,nd->n", views[:, view].astype(np.float64), of)
            seen = np.maximum(seen, dot - (self.how.penalty if crops[view] else 0.0))
        return seen
