"""Images that are like an image of an evaluation set: the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.copies.collapse import COPIES
from pipeline.curate.copies.items import Items, Shuffled
from pipeline.curate.copies.join import best, relative_pairs
from pipeline.curate.look.looks import PAIRS
from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.by_file import by_file
from pipeline.curate.rows.draws_by_id import group_starts, id_words
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.file_rows import Tables
from pipeline.curate.rows.read_rows import Ids, read_range
from pipeline.curate.rows.tables import (
    ID,
    LEAKS,
    ROW,
    InputFile,
    id_array,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account
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
    shard = (id_words(ids_of(queries.column("query_id")))[1] % np.uint64(shards)).astype(np.int64)
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
    leaked = _best_of_queries(
        np.array(table.column("set").to_pylist(), dtype=object),
        ids_of(table.column("query_id")),
        table.column("row").to_numpy(),
        ids_of(table.column("image_id")),
        table.column("similarity").to_numpy(),
    )
    counts = leaked.group_by("set").aggregate([("row", "count")]).to_pylist()
    size = write_table(leaked, folder, f"{shard:05d}")
    by_set = {one["set"]: one["row_count"] for one in sorted(counts, key=lambda one: one["set"])}
    return {"rows": len(leaked), "bytes": size, "leaked": by_set}


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
    hits_of_all = [own]
    for bucket in copies[1] if len(rows) else ():
        columns = [COPIES.field(0).name, COPIES.field(2).name]
        pairs = read_table(
            copies[0], bucket, columns, [("stands", ">=", first), ("stands", "<", end)]
        )
        stands = pairs.column("stands").to_numpy()
        at = np.minimum(np.searchsorted(rows, stands), len(rows) - 1)
        hit = rows[at] == stands
        more = own.take(pa.array(at[hit]))
        hits_of_all.append(more.set_column(0, "row", pa.array(pairs.column("row").to_numpy()[hit])))
    whole = pa.concat_tables([one.cast(LEAKS) for one in hits_of_all]).sort_by("row")
    return {"rows": len(whole), "bytes": write_table(whole, folder, name)}


def pairs_of_leaks(folder: str, name: str) -> pa.Table:
    """Rows with images of evaluation sets, as `looks.PAIRS`."""
    table = read_table(folder, name, ["row", "set", "query_id", "similarity"])
    columns = [table["row"], pa.array(np.full(len(table), -1)), table["set"], table["query_id"]]
    return pa.table([*columns, table["similarity"]], schema=PAIRS)


def hold_task(
    folder: str, name: str, looked: str, names: Sequence[str], first: int, end: int
) -> dict[str, Any]:
    """Writes the best match of each of the rows `first` to `end` that shows the same, as
    `tables.LEAKS`.
    """
    columns, same = ["row", "set", "other_id", "similarity"], ("same", "=", True)
    rows = [("row", ">=", first), ("row", "<", end)]
    tables = [read_table(looked, one, columns, [same, *rows]) for one in names]
    same_pairs = [table.rename_columns(LEAKS.names).cast(LEAKS) for table in tables]
    table = pa.concat_tables([LEAKS.empty_table(), *same_pairs]).combine_chunks()
    sets = np.array(table["set"].to_pylist(), dtype=str)
    number = np.unique(sets, return_inverse=True)[1]
    order: list[Array] = [number, ids_of(table["query_id"])]
    chosen = best([table["row"].to_numpy()], table["similarity"].to_numpy(), order)
    shown = table.take(pa.array(chosen)).sort_by("row")
    return {"rows": len(shown), "bytes": write_table(shown, folder, name)}


def count_task(
    folder: str, looked: str, names: Sequence[str], shards: int, shard: int
) -> dict[str, Any]:
    """Counts the images of each set, of those of a shard, that some row shows the same as."""
    leaked: dict[str, set[bytes]] = {}
    for name in names:
        table = read_table(looked, name, ["set", "other_id"], [("same", "=", True)])
        ids = ids_of(table["other_id"])
        mine = id_words(ids)[1] % np.uint64(shards) == shard
        sets = table["set"].filter(pa.array(mine)).to_pylist()
        for one, image in zip(sets, ids[mine], strict=True):
            leaked.setdefault(one, set()).add(image.tobytes())
    counts = {one: len(images) for one, images in sorted(leaked.items())}
    return {"rows": sum(counts.values()), "held": counts}


def leaks_by_file_task(
    folder: str, hits: str, names: Sequence[str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Writes the leaks of the rows of each of these input files."""
    return by_file(folder, hits, names, files, LEAKS)


# ---- Components with an image that leaks, where leaks take their components with them.


# of each component with a row that leaks: its best match
LEAKING = pa.schema(
    [
        ("component", ID),
        ("set", pa.string()),
        ("query_id", ID),
        ("similarity", pa.float64()),
        ("row_id", ID),  # image of the component that matches
    ]
)


def leaks_of(folder: str, file: InputFile, tables: Tables) -> Account:
    """Task: the best match of each component that has rows of this file that leak."""
    leaks = read_table(tables.leaks, file.name)
    members = read_table(tables.components, file.name, ["row", "component"])
    ids = read_table(tables.fingerprint, file.name, ["row", "image_id"])
    places = leaks.column("row").to_numpy() - file.first
    leaks = leaks.append_column("row_id", ids.column("image_id").take(pa.array(places)))
    joined = leaks.join(members, "row", join_type="inner") if len(members) else leaks.slice(0, 0)
    if not len(members):
        joined = joined.append_column("component", pa.array([], ID))
    best = _best(joined.select(LEAKING.names).cast(LEAKING))
    return {"rows": len(best), "bytes": write_table(best, folder, file.name)}


def best_leaks(folder: str, names: tuple[str, ...], by_file: str) -> Account:
    """Task: the files of `leaks_of` as one, `leaking.parquet`, with a row for each component."""
    best = _best(
        pa.concat_tables([read_table(by_file, name) for name in names] or [LEAKING.empty_table()])
    )
    return {"rows": len(best), "bytes": write_table(best, folder, "leaking")}


def _best(table: pa.Table) -> pa.Table:
    """One row for each component: the most similar match, then the smallest ids."""
    order = [("component", "ascending"), ("similarity", "descending")]
    order += [(name, "ascending") for name in ("set", "query_id", "row_id")]
    table = table.take(pc.sort_indices(table, sort_keys=order)).combine_chunks()
    first = group_starts(*id_words(ids_of(table.column("component"))))
    return table.filter(pa.array(first))
