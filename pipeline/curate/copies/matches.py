"""New images that are like an image that an earlier curation kept: the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.items import Items, Shuffled, by_cell
from pipeline.curate.copies.join import PENDING, best, visit
from pipeline.curate.look.looks import PAIRS, verdicts_of
from pipeline.curate.rows.by_file import write_by_file
from pipeline.curate.rows.exact import Doubles, Ints
from pipeline.curate.rows.read_rows import Ids, order_by_id, read_range
from pipeline.curate.rows.tables import (
    ID,
    ROW,
    InputFile,
    id_array,
    ids_of,
    read_table,
    write_table,
)

EARLIER = "earlier"  # name of the earlier images where pairs are looked at
Array = np.ndarray[Any, Any]
# Rows that were not kept, with an image that was and has the same vector.
INSTEAD = pa.schema([("row", ROW), ("image_id", ID)])
# Best match of each new row among the images of an earlier set.
MATCHES = pa.schema([("row", ROW), ("image_id", ID), ("similarity", pa.float64())])


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


def matches_by_file_task(
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
    return {"rows": len(found), "bytes": write_by_file(folder, found, files)}


def pairs_of_matches(folder: str, name: str) -> pa.Table:
    """New rows with earlier images, as `looks.PAIRS`."""
    table = read_table(folder, name)
    sets = pa.array([EARLIER] * len(table), pa.string())
    columns = [table["row"], pa.array(np.full(len(table), -1)), sets, table["image_id"]]
    return pa.table([*columns, table["similarity"]], schema=PAIRS)


def hold_task(folder: str, name: str, looked: str, names: Sequence[str]) -> dict[str, Any]:
    """Writes the matches of a file that show the same."""
    table = verdicts_of(looked, names).select(["row", "other_id", "similarity"])
    table = table.rename_columns(MATCHES.names).cast(MATCHES).sort_by("row")
    return {"rows": len(table), "bytes": write_table(table, folder, name)}


# ---- The relative join: another set against the stored buckets of a pool.
#
# Images of the other set visit the cells of the pool, and the pool's visitors visit the cells
# that the set's images are members of, so a pair is looked for from both sides, as within the
# pool.


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
