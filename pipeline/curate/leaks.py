"""The relative join: other sets against the stored buckets of a pool.

Images of an evaluation set visit the cells of the pool, and the pool's visitors visit the cells
that the set's images are members of, so a pair is looked for from both sides, as within the pool.
The same serves images that are added to a curated set.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.collapse import COPIES
from pipeline.curate.exact import Doubles, Ints
from pipeline.curate.forest import PENDING
from pipeline.curate.items import Items, Shuffled, by_cell
from pipeline.curate.join import best, visit
from pipeline.curate.portions import Ids, big_endian, order_by_id, read_range
from pipeline.curate.spread import spread
from pipeline.curate.tables import (
    ID,
    LEAKS,
    ROW,
    InputFile,
    id_array,
    ids_of,
    read_table,
    write_table,
)
from pipeline.uri import join

Array = np.ndarray[Any, Any]

# Best match of each image of a set in the pool.
QUERIES = pa.schema(
    [
        ("set", pa.string()),
        ("query_id", ID),
        ("row", ROW),
        ("image_id", ID),
        ("similarity", pa.float64()),
    ]
)
# Rows that were not kept, with an image that was and has the same vector.
INSTEAD = pa.schema([("row", ROW), ("image_id", ID)])
# Best match of each new row among the images of an earlier set.
MATCHES = pa.schema([("row", ROW), ("image_id", ID), ("similarity", pa.float64())])


def relative_pairs(
    pool: Items, other: Items, threshold: float, crops: Array, penalty: float
) -> tuple[Ints, Ints, Doubles]:
    """Pairs (item of the pool, item of the other set) of a bucket above the threshold."""
    found: list[tuple[Ints, Ints, Doubles]] = []
    pending = 0
    own, visits = dict(by_cell(*pool.members())), other.visits(home=True)
    by_others = visit(other, visits, pool, own, threshold, crops, penalty)
    own, visits = dict(by_cell(*other.members())), pool.visits(home=False)
    by_pool = visit(pool, visits, other, own, threshold, crops, penalty)
    both = chain(((j, i, s) for i, j, s, _ in by_others), ((i, j, s) for i, j, s, _ in by_pool))
    for pairs in both:
        found.append(pairs)
        pending += len(pairs[0])
        if pending > PENDING:  # the same pairs by several views and cells
            found = [_each_once(pool, other, found)]
            pending = -len(found[0][0])  # the next time when there are twice as many
    return _each_once(pool, other, found)


def _each_once(
    pool: Items, other: Items, found: list[tuple[Ints, Ints, Doubles]]
) -> tuple[Ints, Ints, Doubles]:
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    a, b = (np.concatenate([f[column] for f in found]) for column in (0, 1))
    similarity = np.concatenate([f[2] for f in found])
    chosen = best([pool.row[a], other.row[b]], similarity, [])
    return a[chosen], b[chosen], similarity[chosen]


def leak_task(
    folder: str,
    pool: Shuffled,
    sets: Sequence[tuple[str, Shuffled]],
    bucket: int,
    threshold: float,
    penalty: float,
    shards: int,
) -> dict[str, Any]:
    """Writes the best match of each pool row of a bucket, and of each image of the sets, these in
    shards by their ids.
    """
    items: Items | None = None
    columns: list[tuple[Array, ...]] = []
    for name, shuffled in sorted(sets, key=lambda one: one[0]):
        other = shuffled.read(bucket)
        if not len(other):
            continue
        items = pool.read(bucket) if items is None else items
        a, b, similarity = relative_pairs(items, other, threshold, np.array(pool.crops), penalty)
        names = np.full(len(a), name, dtype=object)
        columns.append((items.row[a], items.ids[a], names, other.ids[b], similarity))
    if not columns:
        row, ids, names, query, similarity = _none()
    else:
        row, ids, names, query, similarity = (
            np.concatenate([one[place] for one in columns]) for place in range(5)
        )
    number = np.unique(names.astype(str), return_inverse=True)[1]
    chosen = best([row], similarity, [number, query])
    hits = pa.table(
        {
            "row": row[chosen],
            "set": pa.array(names[chosen], pa.string()),
            "query_id": id_array(query[chosen]),
            "similarity": similarity[chosen],
        }
    ).cast(LEAKS)
    size = write_table(hits, str(join(folder, "rows")), f"{bucket:05d}")
    queries = _best_of_queries(names, query, row, ids, similarity)
    shard = (big_endian(ids_of(queries.column("query_id")))[1] % np.uint64(shards)).astype(np.int64)
    order = np.argsort(shard, kind="stable")
    queries = queries.take(pa.array(order))
    queries_folder = str(join(folder, "queries"))
    size += write_buckets(queries_folder, f"{bucket:05d}", queries, shard[order])
    return {"rows": len(hits), "bytes": size, "shelves": shelves_of(shard)}


def _none() -> tuple[Array, Array, Array, Array, Array]:
    ids = np.zeros((0, 16), np.uint8)
    return np.zeros(0, np.int64), ids, np.zeros(0, object), ids, np.zeros(0)


def _best_of_queries(
    names: Array, query: Ids, row: Ints, ids: Ids, similarity: Doubles
) -> pa.Table:
    """The best pool image of each image of a set, as `QUERIES`."""
    number = np.unique(names.astype(str), return_inverse=True)[1]
    both = np.unique(query, axis=0, return_inverse=True)[1].reshape(-1)
    chosen = best([number, both], similarity, [ids])
    return pa.table(
        {
            "set": pa.array(names[chosen], pa.string()),
            "query_id": id_array(query[chosen]),
            "row": row[chosen],
            "image_id": id_array(ids[chosen]),
            "similarity": similarity[chosen],
        }
    ).cast(QUERIES)


def queries_task(
    folder: str, hits: str, names: Sequence[tuple[str, Sequence[int]]], shard: int
) -> dict[str, Any]:
    """Writes the images of a shard of all sets that have a match; counts them by set."""
    tables = list(read_bucket(str(join(hits, "queries")), names, shard))
    table = pa.concat_tables([QUERIES.empty_table(), *tables])
    found = _best_of_queries(
        np.array(table.column("set").to_pylist(), dtype=object),
        ids_of(table.column("query_id")),
        table.column("row").to_numpy(),
        ids_of(table.column("image_id")),
        table.column("similarity").to_numpy(),
    )
    counts = found.group_by("set").aggregate([("row", "count")]).to_pylist()
    size = write_table(found, folder, f"{shard:05d}")
    by_set = {one["set"]: one["row_count"] for one in sorted(counts, key=lambda one: one["set"])}
    return {"rows": len(found), "bytes": size, "leaked": by_set}


def copies_task(
    folder: str,
    hits: str,
    names: Sequence[str],
    copies: tuple[str, Sequence[str]],
    first: int,
    end: int,
    name: str,
) -> dict[str, Any]:
    """Hits of rows `first` to `end`, the best one of each, and of all rows they stand for."""
    tables = [LEAKS.empty_table(), *read_range(str(join(hits, "rows")), names, first, end)]
    table = pa.concat_tables(tables).combine_chunks()
    row = table.column("row").to_numpy()
    sets = np.array(table.column("set").to_pylist(), dtype=str)
    similarity = table.column("similarity").to_numpy()
    number = np.unique(sets, return_inverse=True)[1]
    chosen = best([row], similarity, [number, ids_of(table.column("query_id"))])
    own = table.take(pa.array(chosen))
    rows = own.column("row").to_numpy()
    found = [own]
    for bucket in copies[1] if len(rows) else ():
        columns = [COPIES.field(0).name, COPIES.field(2).name]
        pairs = read_table(
            copies[0], bucket, columns, [("stands", ">=", first), ("stands", "<", end)]
        )
        stands = pairs.column("stands").to_numpy()
        at = np.minimum(np.searchsorted(rows, stands), len(rows) - 1)
        hit = rows[at] == stands
        more = own.take(pa.array(at[hit]))
        found.append(more.set_column(0, "row", pa.array(pairs.column("row").to_numpy()[hit])))
    whole = pa.concat_tables([one.cast(LEAKS) for one in found]).sort_by("row")
    return {"rows": len(whole), "bytes": write_table(whole, folder, name)}


def spread_leaks_task(
    folder: str, hits: str, names: Sequence[str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Writes the leaks of the rows of each of these input files."""
    return spread(folder, hits, names, files, LEAKS)


def kept_task(
    folder: str,
    decisions: str,
    names: Sequence[str],
    rows: int,
    copies: tuple[str, Sequence[str]],
) -> dict[str, Any]:
    """Writes one bit for each row of an earlier curation: whether it, or a row that it stands for,
    was kept; and of rows that were not kept themselves the kept image that they stand for.

    Args:
        folder: of the step.
        decisions: tables with `row` and `kept`.
        names: of the tables.
        rows: of that curation.
        copies: folder and tables of its rows with equal vectors.
    """
    kept = np.zeros(rows, bool)
    for name in names:
        table = read_table(decisions, name, ["row", "kept"])
        kept[table.column("row").to_numpy()] = table.column("kept").to_numpy(zero_copy_only=False)
    count = int(kept.sum())
    instead = [INSTEAD.empty_table()]
    for name in copies[1]:
        table = read_table(copies[0], name, ["row", "image_id", "stands"])
        row, stands = table.column("row").to_numpy(), table.column("stands").to_numpy()
        mine = np.flatnonzero(kept[row] & ~kept[stands])
        ids = ids_of(table.column("image_id"))[mine]
        mine_by_id = order_by_id(ids, row[mine])
        first = np.unique(stands[mine][mine_by_id], return_index=True)[1]
        chosen = mine_by_id[first]
        stands_kept = pa.table([stands[mine][chosen], id_array(ids[chosen])], schema=INSTEAD)
        instead.append(stands_kept)
    found = pa.concat_tables(instead).sort_by("row")
    kept[found.column("row").to_numpy()] = True
    size = write_table(pa.table({"bits": np.packbits(kept)}), folder, "kept")
    return {"rows": count, "bytes": size + write_table(found, folder, "instead")}


def match_task(
    folder: str,
    earlier: Shuffled,
    kept: str,
    new: Shuffled,
    bucket: int,
    threshold: float,
    penalty: float,
) -> dict[str, Any]:
    """Writes the best match of each new row of a bucket among the kept rows of an earlier set."""
    fresh = new.read(bucket)
    table = MATCHES.empty_table()
    if len(fresh):
        bits = read_table(kept, "kept").column("bits").to_numpy()

        def is_kept(row: Ints) -> Array:
            return np.asarray((bits[row >> 3] >> (7 - (row & 7)).astype(np.uint8)) & 1 == 1)

        members = earlier.read(bucket, is_kept)
        crops = np.array(earlier.crops)
        a, b, similarity = relative_pairs(members, fresh, threshold, crops, penalty)
        ids = members.ids[a]
        instead = read_table(kept, "instead")
        rows, row = instead.column("row").to_numpy(), members.row[a]
        at = np.minimum(np.searchsorted(rows, row), max(0, len(rows) - 1))
        if len(rows):
            other = rows[at] == row
            ids[other] = ids_of(instead.column("image_id"))[at[other]]
        table = _matches(fresh.row[b], ids, similarity)
    return {"rows": len(table), "bytes": write_table(table, folder, f"{bucket:05d}")}


def _matches(row: Ints, ids: Ids, similarity: Doubles) -> pa.Table:
    chosen = best([row], similarity, [ids])
    return pa.table(
        {"row": row[chosen], "image_id": id_array(ids[chosen]), "similarity": similarity[chosen]}
    ).cast(MATCHES)


def spread_matches_task(
    folder: str, matches: str, names: Sequence[str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Writes the best match of each row of each of these input files that has one."""
    end = files[-1].first + files[-1].rows
    tables = list(read_range(matches, names, files[0].first, end))
    table = pa.concat_tables([MATCHES.empty_table(), *tables])
    found = _matches(
        table.column("row").to_numpy(),
        ids_of(table.column("image_id")),
        table.column("similarity").to_numpy(),
    )
    row, size = found.column("row").to_numpy(), 0
    for file in files:
        begin, stop = np.searchsorted(row, [file.first, file.first + file.rows])
        size += write_table(found.slice(begin, stop - begin), folder, file.name)
    return {"rows": len(found), "bytes": size}
