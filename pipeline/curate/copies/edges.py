"""From the pairs of all buckets to one maximum spanning forest, in shards that fit a task.

The forest of few pairs is made by one task. Of many, components come first: as in Kiveris et al.
2014 ("Connected Components in MapReduce and Beyond"), rounds of two steps let each row point to a
smaller row of its component, until all point to the smallest. A step reads and writes narrow
pairs in shards of rows, so none holds the whole graph. Then each pair goes to the shard of its
component, and each shard has a forest of its own; together they are the one of all pairs, since no
pair joins two components.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.join import PAIRS, Forest
from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.draws_by_id import group_starts
from pipeline.curate.rows.exact import Ints
from pipeline.curate.rows.read_rows import order_by_id
from pipeline.curate.rows.tables import EDGES, ROW, ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.uri import Place

SHARD_PAIRS = 2_500_000  # of a task, which holds some 430 bytes for each
ENDS = pa.schema([("row", ROW), ("other", ROW)])

# A table of pairs: folder, name, and whether it is one of rows with equal vectors.
Source = tuple[str, str, bool]
Names = tuple[tuple[str, tuple[int, ...]], ...]


def reduce(
    root: Place,
    pairs: Result,
    names: Sequence[str],
    equals: Result,
    equal_names: Sequence[str],
    lowest: float,
    shards: int | None = None,
) -> tuple[Result, ...]:
    """The steps to the forest; the last one, `edges`, has a table of `tables.EDGES` of each shard.

    Args:
        root: folder of the curation.
        pairs: the step of `join.join_task`.
        names: of its tables.
        equals: the step of `collapse.collapse_task`.
        equal_names: of its tables.
        lowest: similarity that edges must be above.
        shards: how many; default: by the number of pairs.
    """
    sources: list[Source] = [(pairs.folder, name, False) for name in names]
    sources += [(equals.folder, name, True) for name in equal_names]
    every = int(pairs.total("edges") + equals.total("copies"))
    shards = shards or max(1, -(-every // SHARD_PAIRS))
    key = [pairs.key, equals.key, lowest, shards]
    if shards == 1:
        task = Task("00000", ("00000", sources, lowest))
        return (run_step(root, "edges", key, [task], forest_task),)
    rows, steps = _components(root, key, sources, lowest, shards)
    tasks = [
        Task(f"{n:05d}", (f"{n:05d}", source, lowest, shards)) for n, source in enumerate(sources)
    ]
    ends = run_step(root, "copies/joined/ends", key, tasks, ends_task)
    read = ((rows.folder, _names(rows)), (ends.folder, _names(ends)))
    tasks = [Task(f"{s:05d}", (f"{s:05d}", s, *read, shards)) for s in range(shards)]
    placed = run_step(root, "copies/joined/placed", [rows.key, ends.key], tasks, place_task)
    tasks = [
        Task(f"{s:05d}", (f"{s:05d}", s, placed.folder, _names(placed))) for s in range(shards)
    ]
    forest = run_step(root, "edges", [placed.key], tasks, shard_task)
    return (*steps, ends, placed, forest)


def _components(
    root: Place, key: Any, sources: Sequence[Source], lowest: float, shards: int
) -> tuple[Result, list[Result]]:
    """The step whose pairs are (row, smallest row of its component), both ways, and all steps."""
    tasks = [
        Task(f"{n:05d}", (f"{n:05d}", source, lowest, shards)) for n, source in enumerate(sources)
    ]
    last = run_step(root, "copies/joined/start", key, tasks, start_task)
    steps = [last]
    for turn in count():
        changed = 0
        for name, function in (("large", large_task), ("small", small_task)):
            tasks = [
                Task(f"{s:05d}", (f"{s:05d}", s, last.folder, _names(last), shards))
                for s in range(shards)
            ]
            last = run_step(root, f"copies/joined/{turn:03d}/{name}", [last.key], tasks, function)
            steps.append(last)
            changed += int(last.total("changed"))
        if not changed:
            return last, steps
    raise AssertionError("unreachable")


def _names(result: Result) -> Names:
    return tuple((f"{n:05d}", tuple(a["shelves"])) for n, a in enumerate(result.accounts))


def read_pairs(source: Source, lowest: float) -> pa.Table:
    """A table of pairs above `lowest`, as `join.PAIRS`."""
    folder, name, equal = source
    if not equal:
        return read_table(folder, name)
    columns = ["row", "stands", "similarity", "image_id", "stands_id"]
    table = read_table(folder, name, columns)
    above = table.column("similarity").to_numpy() > lowest
    return table.filter(pa.array(above)).select(columns).rename_columns(PAIRS.names).cast(PAIRS)


def _ends(source: Source, lowest: float) -> tuple[Ints, Ints]:
    table = read_pairs(source, lowest)
    return table.column("a").to_numpy(), table.column("b").to_numpy()


def start_task(folder: str, name: str, source: Source, lowest: float, shards: int) -> Account:
    """The components within one table: each row with the smallest one, both ways."""
    row, label = connected(*_ends(source, lowest))
    other = row != label
    return _write(folder, name, *_both(row[other], label[other]), shards)


def large_task(
    folder: str, name: str, shard: int, before: str, names: Names, shards: int
) -> Account:
    """Large star: the smallest of a row and its neighbours gets all larger neighbours of the row.

    Written by the larger row of each pair.
    """
    row, other, least = _stars(before, names, shard)
    larger = other > row
    changed = int((least != row)[larger].sum())
    return _write(folder, name, other[larger], least[larger], shards) | {"changed": changed}


def small_task(
    folder: str, name: str, shard: int, before: str, names: Names, shards: int
) -> Account:
    """Small star: the smallest of the smaller neighbours of a row gets the others and the row."""
    row, other, least = _stars(before, names, shard)
    away = other != least
    low, high = np.append(least, least[away]), np.append(row, other[away])
    return _write(folder, name, *_both(high, low), shards) | {"changed": int(away.sum())}


def _both(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    return np.append(a, b), np.append(b, a)


def _stars(folder: str, names: Names, shard: int) -> tuple[Ints, Ints, Ints]:
    """Pairs of a shard by row, each once, with the smallest of the row and all its neighbours."""
    tables = [ENDS.empty_table(), *read_bucket(folder, names, shard)]
    row, other = (
        np.concatenate([table.column(name).to_numpy() for table in tables]) for name in ENDS.names
    )
    del tables
    order = np.lexsort((other, row))
    row, other = row[order], other[order]
    new = group_starts(row, other)
    row, other = row[new], other[new]
    first = np.searchsorted(row, row)  # neighbours are in order
    return row, other, np.minimum(row, other[first])


def _write(folder: str, name: str, row: Ints, other: Ints, shards: int) -> Account:
    shard = part_of(row, shards)
    order = np.argsort(shard, kind="stable")
    table = pa.table([row[order], other[order]], schema=ENDS)
    size = write_buckets(folder, name, table, shard[order])
    return {"rows": len(row), "bytes": size, "shelves": shelves_of(shard)}


def ends_task(folder: str, name: str, source: Source, lowest: float, shards: int) -> Account:
    """Sends each pair to the shard of its first row."""
    return _send(folder, name, read_pairs(source, lowest), None, shards)


def place_task(
    folder: str,
    name: str,
    shard: int,
    components: tuple[str, Names],
    ends: tuple[str, Names],
    shards: int,
) -> Account:
    """Sends the pairs of a shard of rows to the shard of their component."""
    row, _, least = _stars(*components, shard)
    table = pa.concat_tables([PAIRS.empty_table(), *read_bucket(*ends, shard)])
    at = np.searchsorted(row, table.column("a").to_numpy())
    return _send(folder, name, table, least[at], shards)


def _send(folder: str, name: str, table: pa.Table, key: Ints | None, shards: int) -> Account:
    shard = part_of(table.column("a").to_numpy() if key is None else key, shards)
    order = np.argsort(shard, kind="stable")
    size = write_buckets(folder, name, table.take(pa.array(order)), shard[order])
    return {"rows": len(table), "bytes": size, "shelves": shelves_of(shard)}


def shard_task(folder: str, name: str, shard: int, placed: str, names: Names) -> Account:
    """The forest of the pairs of some components."""
    return _forest(folder, name, list(read_bucket(placed, names, shard)))


def forest_task(folder: str, name: str, sources: Sequence[Source], lowest: float) -> Account:
    """The forest of all pairs."""
    return _forest(folder, name, [read_pairs(source, lowest) for source in sources])


def _forest(folder: str, name: str, tables: list[pa.Table]) -> Account:
    table = pa.concat_tables([PAIRS.empty_table(), *(t.cast(PAIRS) for t in tables)])
    tables.clear()
    rows = np.concatenate([table.column(name).to_numpy() for name in ("a", "b")])
    row, first, inverse = np.unique(rows, return_index=True, return_inverse=True)
    both = np.concatenate([ids_of(table.column(name)) for name in ("a_id", "b_id")])
    order = order_by_id(both[first], row)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    node = rank[inverse]
    forest = Forest()
    forest.add(node[: len(table)], node[len(table) :], table.column("similarity").to_numpy())
    a, b, similarity = forest.edges()
    by_id = row[order]
    edges = pa.table({"a": by_id[a], "b": by_id[b], "similarity": similarity}).cast(EDGES)
    return {"rows": len(edges), "bytes": write_table(edges, folder, name)}


# ---- Components of edges, each called by its smallest row, and the tasks that they go to.


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
