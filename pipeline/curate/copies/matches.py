"""New images that are like an image that an earlier curation kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.items import ImageSet, Shuffled
from pipeline.curate.copies.join import best, relative_pairs
from pipeline.curate.copies.relative import shuffle_others
from pipeline.curate.copies.stored_copies import Copies
from pipeline.curate.look.looks import PAIRS, Looking, look_at, verdicts_of
from pipeline.curate.rows.by_file import file_groups, write_by_file
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
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.uri import Place

EARLIER = "earlier"  # name of the earlier images where pairs are looked at
Array = np.ndarray[Any, Any]
# Rows that were not kept, with an image that was and has the same vector.
INSTEAD = pa.schema([("row", ROW), ("image_id", ID)])
# Best match of each new row among the images of an earlier set.
MATCHES = pa.schema([("row", ROW), ("image_id", ID), ("similarity", pa.float64())])


def find_matches(
    root: Place,
    earlier: Copies,
    images: ImageSet,
    *,
    decisions: tuple[str, Sequence[str], str],
    threshold: float,
    looking: Looking | None = None,
    gpus: float = 0.0,
) -> tuple[Result, tuple[Result, ...]]:
    """The best match of each new image among the kept images of an earlier curation.

    Args:
        root: folder of the new curation.
        earlier: the copies of the earlier one.
        images: the new ones; their vectors are made as the earlier ones.
        decisions: folder, names and key of tables with `row` and `kept` of the earlier one.
        threshold: similarity that a match must be above.
        looking: for the second look, with the earlier images as the set `EARLIER`; None: what is
            alike is a match.
        gpus: of the tasks that compare.

    Returns:
        The step whose folder has `MATCHES` of each new input file, and all steps.
    """
    folder, names, key = decisions
    kept = run_step(
        root,
        "matching/kept",
        [key, earlier.keys["copies/collapse"]],
        [Task("kept", (folder, tuple(names), earlier.rows, earlier.copies))],
        kept_task,
    )
    inputs = images.inputs
    placed, new = shuffle_others(earlier, root, "matching/shuffle", images, gpus)
    matched = run_step(
        root,
        "matching/buckets",
        [kept.key, placed.key, threshold, earlier.penalty],
        [
            Task(
                f"{b:05d}",
                (earlier.shuffled, kept.folder, new, b, threshold, earlier.penalty),
            )
            for b in range(earlier.buckets)
        ],
        match_task,
        gpus=gpus,
    )
    bucket_names = [f"{b:05d}" for b in range(earlier.buckets)]
    groups = file_groups(inputs.files)
    nearest = run_step(
        root,
        "matches" if looking is None else "matching/best",
        [matched.key, inputs.digest],
        [Task(name, (matched.folder, bucket_names, files)) for name, files in groups],
        matches_by_file_task,
    )
    if looking is None:
        return nearest, (kept, placed, matched, nearest)
    file_names = [file.name for file in inputs.files]
    looked = look_at(
        root,
        "matching/looks",
        looking,
        [nearest.key],
        [(name, (nearest.folder, name)) for name in file_names],
        pairs_of_matches,
    )
    same = run_step(
        root,
        "matches",
        [looked.key],
        [Task(name, (name, looked.folder, looked.names[name])) for name in file_names],
        hold_task,
    )
    return same, (kept, placed, matched, nearest, *looked.steps, same)


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
    others = pa.concat_tables(instead).sort_by("row")
    kept[others.column("row").to_numpy()] = True
    size = write_table(pa.table({"bits": np.packbits(kept)}), folder, "kept")
    return {"rows": count, "bytes": size + write_table(others, folder, "instead")}


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
    best_of_all = _matches(
        table.column("row").to_numpy(),
        ids_of(table.column("image_id")),
        table.column("similarity").to_numpy(),
    )
    return {"rows": len(best_of_all), "bytes": write_by_file(folder, best_of_all, files)}


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
