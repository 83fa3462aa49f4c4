"""Equal images, by bytes or by pixels: one row of each group is kept, before anything is joined.

Equal bytes decode to equal pixels, so one shuffle by the hash of the pixels brings both kinds
together. Only narrow rows travel (hash, id, row, bytes: 57 bytes each); a task holds a bucket of
hashes or a range of rows, never all of them.

Groups are made of all images that can be decoded. Quality rules measure pixels, so they pass or
fail a group as a whole: other limits change which groups there are, and no keeper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.tables import (
    AS_IS,
    EXACT,
    ROW,
    InputFile,
    Inputs,
    id_array,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.uri import Place

STEP = "exact"
BUCKET_ROWS = 4_000_000  # of 57 bytes: with what sorting needs, half a gigabyte
PORTION_ROWS = 4_000_000  # of consecutive files that one task writes the result of

# A row that goes: with the row that is kept for it, and by what they are equal.
_GONE = pa.schema([("row", ROW), ("keeper", ROW), ("method", pa.string())])


def collapse(
    root: Place,
    inputs: Inputs,
    fingerprints: Result,
    quality: Result | None = None,
    step: str = STEP,
) -> Result:
    """Writes `tables.EXACT` of every input file.

    Of equal images the one is kept that is in a set taken as it is, then the one with more bytes
    (equal pixels have equal areas), then the smaller image id. Rows of equal bytes differ in their
    source only: the smaller hash of set and source, so that the order of the files does not count.

    Args:
        root: folder of the curation.
        inputs: all images.
        fingerprints: of all inputs.
        quality: marks; rows that it marks are left out. None: only rows that cannot be decoded are.
        step: name of the last of the three steps; the others are the same for any marks.

    Returns:
        the last of three steps, with the time of all. Accounts have rows (of the result), bytes,
        `copies_bytes` and `copies_pixels` (rows that are not kept).
    """
    marks = quality.folder if quality else ""
    buckets = max(1, -(-inputs.rows // BUCKET_ROWS))
    tasks = [Task(f.name, (f, fingerprints.folder, buckets)) for f in inputs.files]
    key = [2, fingerprints.key, buckets]
    hashes = run_step(root, f"{STEP}_hashes", key, tasks, hash_file)
    names = [
        (file.name, tuple(account["shelves"]))
        for file, account in zip(inputs.files, hashes.accounts, strict=True)
    ]
    tasks = [Task(f"{b:05d}", (hashes.folder, names, b)) for b in range(buckets)]
    groups = run_step(root, f"{STEP}_groups", [hashes.key], tasks, group_bucket)
    gone = [task.name for task in tasks]
    tasks = [
        Task(files[0].name, (files, fingerprints.folder, marks, groups.folder, gone))
        for files in _portions(inputs.files)
    ]
    key = [groups.key, quality.key if quality else ""]
    collapsed = run_step(root, step, key, tasks, write_files)
    steps = (hashes, groups, collapsed) if step == STEP else (collapsed,)
    return replace(
        collapsed,
        seconds=sum(step.seconds for step in steps),
        cpu_s=sum(step.cpu_s for step in steps),
        peak_bytes=max(step.peak_bytes for step in steps),
    )


def _portions(files: Sequence[InputFile]) -> list[tuple[InputFile, ...]]:
    """Files in order, so many together that their rows are about PORTION_ROWS at most."""
    portions: list[list[InputFile]] = []
    room = 0
    for file in files:
        if not portions or file.rows > room:
            portions.append([])
            room = PORTION_ROWS
        portions[-1].append(file)
        room -= file.rows
    return [tuple(part) for part in portions]


def own(exact: Result) -> int:
    """Rows that are their own keeper, by the accounts of `collapse`."""
    copies = exact.total("copies_bytes") + exact.total("copies_pixels")
    return int(exact.total("rows") - copies)


def passing(fingerprints: str, quality: str, name: str, columns: Sequence[str]) -> pa.Table:
    """Columns of the fingerprints of a file, of the rows that can be decoded and pass quality."""
    table = read_table(fingerprints, name, [*columns, *{"error"} - set(columns)])
    keep = pc.equal(table.column("error"), "")
    if quality:
        reason = read_table(quality, name, ["reason"]).column("reason")
        keep = pc.and_(keep, pc.equal(reason, ""))
    return table.filter(keep).select(list(columns))


def hash_file(folder: str, file: InputFile, fingerprints: str, buckets: int) -> Account:
    """Task: sends the rows of a file to the buckets of their pixel hashes."""
    columns = ["row", "image_id", "source", "bytes", "pixel_hash"]
    table = passing(fingerprints, "", file.name, columns)
    hashes = ids_of(table.column("pixel_hash"))
    bucket = (_words(hashes)[0] % np.uint64(buckets)).astype(np.int64)
    order = np.argsort(bucket, kind="stable")
    ties = [
        int.from_bytes(blake2b(f"{file.set}\0{source}".encode(), digest_size=8).digest(), "big")
        for source in table.column("source").to_pylist()
    ]
    narrow = pa.table(
        {
            "hash": id_array(hashes[order]),
            "image_id": id_array(ids_of(table.column("image_id"))[order]),
            "row": table.column("row").to_numpy()[order],
            "bytes": table.column("bytes").to_numpy()[order],
            "tie": np.asarray(ties, np.uint64)[order],
            "later": np.full(len(order), file.kind != AS_IS, np.uint8),
        }
    )
    size = write_buckets(folder, file.name, narrow, bucket[order])
    return {"rows": len(table), "bytes": size, "shelves": shelves_of(bucket)}


def group_bucket(
    folder: str, hashes: str, names: Sequence[tuple[str, Sequence[int]]], bucket: int
) -> Account:
    """Task: the rows of a bucket that are not kept, by row."""
    tables = list(read_bucket(hashes, names, bucket))
    gone, rows = _GONE.empty_table(), 0
    if tables:
        table = pa.concat_tables(tables)
        rows = len(table)
        gone = _gone(table)
    return {"rows": rows, "bytes": write_table(gone, folder, f"{bucket:05d}")}


def _gone(table: pa.Table) -> pa.Table:
    ids, row = ids_of(table.column("image_id")), table.column("row").to_numpy()
    high, low = _words(ids_of(table.column("hash")))
    first, second = _words(ids)
    size, tie, later = (table.column(name).to_numpy() for name in ("bytes", "tie", "later"))
    order = np.lexsort((row, tie, second, first, -size, later, low, high))
    high, low = high[order], low[order]
    new = np.ones(len(order), bool)
    new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    keeper = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    mine, other = order[~new], keeper[~new]
    by_row = np.argsort(row[mine])
    mine, other = mine[by_row], other[by_row]
    same = (first[mine] == first[other]) & (second[mine] == second[other])
    method = np.where(same, "bytes", "pixels").tolist()
    return pa.table({"row": row[mine], "keeper": row[other], "method": method}, _GONE)


def write_files(
    folder: str,
    files: Sequence[InputFile],
    fingerprints: str,
    quality: str,
    groups: str,
    names: Sequence[str],
) -> Account:
    """Task: the result of some consecutive files."""
    first, end = files[0].first, files[-1].first + files[-1].rows
    inside = [("row", ">=", first), ("row", "<", end)]
    tables = [_GONE.empty_table(), *(read_table(groups, name, filters=inside) for name in names)]
    gone = pa.concat_tables(tables).combine_chunks().sort_by("row")
    away, keepers = gone.column("row").to_numpy(), gone.column("keeper").to_numpy()
    methods = np.array(["", *gone.column("method").to_pylist()], object)
    rows = size = 0
    counts = {"bytes": 0, "pixels": 0}
    for file in files:
        row = passing(fingerprints, quality, file.name, ["row"]).column("row").to_numpy()
        place = np.searchsorted(away, row)
        is_copy = np.zeros(len(row), bool)
        is_copy[place < len(away)] = away[place[place < len(away)]] == row[place < len(away)]
        keeper = row.copy()
        keeper[is_copy] = keepers[place[is_copy]]
        method = methods[np.where(is_copy, place + 1, 0)].tolist()
        table = pa.table({"row": row, "keeper": keeper, "method": method}, EXACT)
        size += write_table(table, folder, file.name)
        rows += len(row)
        for kind in counts:
            counts[kind] += method.count(kind)
    return {
        "rows": rows,
        "bytes": size,
        "copies_bytes": counts["bytes"],
        "copies_pixels": counts["pixels"],
    }


def own_rows(folder: str, exact: str, name: str) -> Account:
    """Task: the rows of a file that are kept of their group, in a table of `row`."""
    table = read_table(exact, name, ["row", "keeper"])
    own = table.filter(pc.equal(table.column("row"), table.column("keeper"))).select(["row"])
    return {"rows": len(own), "bytes": write_table(own, folder, name)}


def _words(ids: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[Any, Any]:
    """16 bytes as two numbers that compare as the bytes do."""
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64).reshape(-1, 2)
    return words[:, 0], words[:, 1]
