"""Which image of each component is kept, and a guard against chains.

Of each component the keeper is chosen: images that do not go in any case (leaks, copies of what was
curated earlier) first, then those that are taken as they are, then the larger area, then more bytes
for each pixel, then the smaller image id. A chain A-B-C of copies may end far from its start:
members whose exact similarity to the keeper is too low are given to keepers of their own (leaders).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import read_bucket, unraw
from pipeline.curate.exact import Doubles, Ints
from pipeline.curate.items import Visiting
from pipeline.curate.likeness import Likeness
from pipeline.curate.portions import CROPS, Ids, Rows, big_endian
from pipeline.curate.stored import OnDisk
from pipeline.curate.tables import COMPONENTS, ID, id_array, ids_of, write_table
from pipeline.uri import join

# `tables.COMPONENTS` with the id of the row itself.
MEMBERS = pa.schema([*COMPONENTS, ("image_id", ID)])

Array = np.ndarray[Any, Any]
HELD_BYTES = 2**29  # of the vectors that a task holds; twice while they are read


def keep_task(
    folder: str,
    gathered: str,
    names: Sequence[tuple[str, Sequence[int]]],
    vector_names: Sequence[tuple[str, Sequence[int]]],
    part: int,
    dim: int,
    visiting: Visiting | None,
    penalty: float,
    least: float,
    chains: str,
) -> dict[str, Any]:
    """Chooses the keepers of the components of a part; writes `MEMBERS`, by row.

    Args:
        folder: of the step.
        gathered: of `gather_task`.
        names: of its tasks, with their shelves of rows.
        vector_names: with their shelves of vectors.
        part: which.
        dim: of a vector.
        visiting: views that count.
        penalty: of crops.
        least: similarity to its keeper below which a member is of a chain.
        chains: `split`: such members get keepers of their own; `keep`: they do not.
    """
    tables = list(read_bucket(str(join(gathered, "rows")), names, part))
    if not tables:
        return {"rows": 0, "bytes": write_table(MEMBERS.empty_table(), folder, f"{part:05d}")}
    table = pa.concat_tables(tables)
    column = {
        name: table.column(name).to_numpy() for name in table.column_names if name != "image_id"
    }
    column["image_id"] = ids_of(table.column("image_id"))
    rows = _vectors(gathered, vector_names, part, dim)
    del tables, table
    by_row = np.argsort(rows.row)
    at = by_row[np.searchsorted(rows.row[by_row], column["stands"])]
    order = keeper_order(
        *(column[name] for name in ("label", "goes", "as_is", "area", "density", "image_id"))
    )
    column = {name: values[order] for name, values in column.items()}
    keeper, similarity, chained, size, first_id = choose(
        column["label"],
        column["goes"],
        column["image_id"],
        at[order],
        Likeness(rows, visiting, penalty),
        least,
        chains,
    )
    if isinstance(rows, OnDisk):
        rows.close()
    found = pa.table(
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
    written = write_table(found.cast(MEMBERS), folder, f"{part:05d}")
    return {"rows": len(found), "bytes": written, "chained": int(chained.sum())}


def _vectors(gathered: str, names: Sequence[Any], part: int, dim: int) -> Rows | OnDisk:
    """The vectors of a part, on disk where one component makes it larger than parts should be."""
    folder = str(join(gathered, "vectors"))
    count = sum(len(table) for table in read_bucket(folder, names, part, ["row"]))
    tables = read_bucket(folder, names, part)
    first = next(tables)
    width = 1 + CROPS * ("crops" in first.column_names)
    if count * width * dim * 2 > HELD_BYTES:
        return OnDisk(chain([first], tables), dim)
    return _held([first, *tables], dim)


def _held(tables: list[pa.Table], dim: int) -> Rows:
    row = np.concatenate([table.column("row").to_numpy() for table in tables])
    vectors = np.concatenate([unraw(t.column("vector"), np.float16, dim) for t in tables])
    crops = None
    if "crops" in tables[0].column_names:
        width = CROPS * dim
        crops = np.concatenate([unraw(t.column("crops"), np.float16, width) for t in tables])
        crops = crops.reshape(-1, CROPS, dim)
    return Rows(row, np.zeros((len(row), 16), np.uint8), vectors, crops)


def keeper_order(
    component: Array, goes: Array, as_is: Array, area: Array, density: Array, ids: Ids
) -> Ints:
    """Rows by component, the best one of each first."""
    high, low = big_endian(ids)
    return np.lexsort((low, high, -density, -area, ~as_is, goes, component))


def choose(
    label: Array,
    goes: Array,
    ids: Ids,
    at: Ints,
    likeness: Likeness,
    least: float,
    chains: str,
) -> tuple[Ints, Doubles, Array, Ints, Ids]:
    """Keepers of rows that are ordered by component, the best first (`keeper_order`).

    Args:
        label: component of each row.
        goes: rows that go in any case: keepers only where all rows of their component go.
        ids: of the rows.
        at: places of their vectors.
        likeness: of places.
        least: similarity to the keeper below which a row is of a chain.
        chains: `split` or `keep`.

    Returns:
        For each row: the place of its keeper among these rows, the similarity to it, whether it is
        of a chain, the size of its component and the smallest image id in that.
    """
    n = len(label)
    new = np.ones(n, bool)
    new[1:] = label[1:] != label[:-1]
    start = np.flatnonzero(new)
    component = np.cumsum(new) - 1
    count = np.diff(np.append(start, n))
    keeper = start[component]
    similarity = likeness(at, at[keeper])
    similarity[keeper == np.arange(n)] = 1.0
    chained = (similarity < least) & (keeper != np.arange(n))
    if chains == "split":
        for one in np.unique(component[chained]):
            rows = np.arange(start[one], start[one] + count[one])
            _lead(rows[chained[rows]], goes, at, likeness, least, keeper, similarity)
    high, low = big_endian(ids)
    smallest = np.lexsort((low, high, component))[start]
    return keeper, similarity, chained, count[component], ids[smallest[component]]


def _lead(
    left: Ints,
    goes: Array,
    at: Ints,
    likeness: Likeness,
    least: float,
    keeper: Ints,
    similarity: Doubles,
) -> None:
    """Leaders: the best of those left takes all of them that are like it, until none is left.

    Rows that go in any case lead nobody; where no leader takes them the first keeper stays theirs.
    """
    while len(left) and not goes[left[0]]:
        leader, rest = left[0], left[1:]
        keeper[leader], similarity[leader] = leader, 1.0
        to_leader = likeness(at[rest], np.full(len(rest), at[leader]))
        taken = to_leader >= least
        keeper[rest[taken]], similarity[rest[taken]] = leader, to_leader[taken]
        left = rest[~taken]
