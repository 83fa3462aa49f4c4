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

from pipeline.curate.copies.collapse import copies_of
from pipeline.curate.copies.items import Visiting
from pipeline.curate.copies.similarity import Likeness, OnDisk
from pipeline.curate.rows.bucketed import raw, read_bucket, shelves_of, unraw, write_buckets
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.read_rows import (
    CROPS,
    Ids,
    Portion,
    Rows,
    big_endian,
    read_range,
    read_rows,
)
from pipeline.curate.rows.tables import (
    AS_IS,
    COMPONENTS,
    ID,
    ROW,
    InputFile,
    Vectors,
    id_array,
    ids_of,
    read_table,
    write_table,
)
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


# ---- What the choice of keepers needs of each row, from all tables to the tasks of its
# component.

PART_BYTES = 2**27  # of the vectors that a task takes


def parts_for(rows: int, vectors: Vectors) -> int:
    """Tasks that choose keepers, for so many rows with copies."""
    each = vectors.dim * 2 * (1 + CROPS * vectors.views) + 100
    return max(1, -(-rows * each // PART_BYTES))


def gather_task(
    folder: str,
    vectors: Vectors,
    portion: Portion,
    files: Sequence[InputFile],
    labels: tuple[str, Sequence[str]],
    copies: tuple[str, Sequence[str]],
    fingerprints: str,
    aside: Sequence[str],
    parts: int,
) -> dict[str, Any]:
    """Writes what the choice of keepers needs of a portion's rows, by component.

    Bucket 2 b has all rows, 2 b + 1 the vectors of those that stand for themselves.
    """
    rows: list[dict[str, Array]] = []
    kinds = {file.name: file.kind for file in files}
    stands = copies_of(portion, copies)
    copy, stand = stands.column("row").to_numpy(), stands.column("stands").to_numpy()
    for part in portion.parts:
        found = list(read_range(*labels, part.first, part.end))
        if not found:
            continue
        own = pa.concat_tables(found).sort_by("row")
        row, label = (own.column(name).to_numpy() for name in LABELS.names)
        columns = ["row", "image_id", "bytes", "width", "height"]
        facts = next(read_range(fingerprints, [part.name], part.first, part.end, columns))
        at = np.searchsorted(facts.column("row").to_numpy(), row)
        area = facts.column("width").to_numpy().astype(np.int64) * facts.column("height").to_numpy()
        density = facts.column("bytes").to_numpy() / np.maximum(area, 1)
        going = np.zeros(len(row), bool)
        for one in aside:
            for table in read_range(one, [part.name], part.first, part.end, ["row"]):
                going |= np.isin(row, table.column("row").to_numpy())
        of = np.arange(len(row)) if not len(copy) else np.searchsorted(copy, row)
        is_copy = np.isin(row, copy)
        rows.append(
            {
                "row": row,
                "label": label,
                "image_id": ids_of(facts.column("image_id"))[at],
                "as_is": np.full(len(row), kinds[part.name] == AS_IS),
                "area": area[at],
                "density": density[at],
                "goes": going,
                "stands": np.where(is_copy, stand[np.minimum(of, len(stand) - 1)], row)
                if len(copy)
                else row,
            }
        )
    if not rows:
        return {"rows": 0, "bytes": 0, "shelves": [], "vector_shelves": []}
    whole = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    bucket = part_of(whole["label"], parts)
    order = np.argsort(bucket, kind="stable")
    table = pa.table(
        {
            name: id_array(values[order]) if name == "image_id" else values[order]
            for name, values in whole.items()
        }
    )
    size = write_buckets(str(join(folder, "rows")), portion.name, table, bucket[order])
    own = whole["stands"] == whole["row"]
    wanted = whole["row"][own]
    found_rows = read_rows(vectors, portion, views=True)
    found_rows = found_rows.only(np.isin(found_rows.row, wanted))
    by_row = np.argsort(wanted)
    label = whole["label"][own][by_row][np.searchsorted(wanted[by_row], found_rows.row)]
    mine = part_of(label, parts)
    order = np.argsort(mine, kind="stable")
    columns_of = {"row": found_rows.row[order], "vector": raw(found_rows.vectors[order])}
    if found_rows.crops is not None:
        crops = found_rows.crops[order].reshape(len(order), CROPS * vectors.dim)
        columns_of["crops"] = raw(crops)
    size += write_buckets(
        str(join(folder, "vectors")), portion.name, pa.table(columns_of), mine[order]
    )
    shelves = {"shelves": shelves_of(bucket), "vector_shelves": shelves_of(mine)}
    return {"rows": len(whole["row"]), "bytes": size, **shelves}


# ---- Components of edges, each called by its smallest row, and the tasks that components go to.


LABELS = pa.schema([("row", ROW), ("label", ROW)])


def connected(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Rows that are in an edge, and the smallest row of the component of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    row, node = np.unique(np.concatenate([a, b]), return_inverse=True)
    ones = np.ones(len(a), np.int8)
    graph = coo_array((ones, (node[: len(a)], node[len(a) :])), shape=(len(row), len(row)))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, label, row)
    return row, smallest[label]


def label_task(folder: str, edges: str, name: str, threshold: float) -> dict[str, Any]:
    """Writes the component of each row that is in an edge above the threshold.

    Args:
        folder: of the step.
        edges: folder of `tables.EDGES`; components are in one table each.
        name: of a table.
        threshold: of the similarity.
    """
    table = read_table(edges, name, filters=[("similarity", ">", threshold)])
    row, label = connected(table.column("a").to_numpy(), table.column("b").to_numpy())
    size = write_table(pa.table({"row": row, "label": label}).cast(LABELS), folder, name)
    return {"rows": len(row), "bytes": size, "components": len(np.unique(label))}


def part_of(label: Ints, parts: int) -> Ints:
    """Which task a component goes to: mixed, since labels of files are near each other."""
    mixed = label.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)
