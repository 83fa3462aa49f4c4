"""One curated shard: what is kept of its range of ids, read from all files that have some of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.curate.decide.shard_form import Form, decided, formed, opened
from pipeline.curate.rows.tables import InputFile, Inputs, read_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.pack.merge import id_range, row_groups, shard_name, shard_of
from pipeline.storage.places import file_info, resolve_uri
from pipeline.storage.transfer import open_patiently, parquet_writer_atomic
from pipeline.uri import Place, join

EARLIER = "earlier"  # the set of images that are there already


@dataclass(frozen=True)
class Piece:
    """What a shard takes from one file: the rows of an input, or row groups that were sorted."""

    file: InputFile
    sorted: str = ""  # name of the sorted file
    groups: tuple[int, ...] = ()


def write_shard(
    folder: str,
    index: int,
    count: int,
    pieces: tuple[Piece, ...],
    decisions: str,
    sorted_folder: str,
    form: Form,
    row_group_images: int,
) -> Account:
    """Task: writes shard `index` of `count`; no rows, no file.

    Raises:
        RuntimeError: two rows have one id.
    """
    low, high = id_range(index, count)
    new, old = (
        [
            table
            for piece in pieces
            if (piece.file.set == EARLIER) is there
            for table in _read(piece, low, high, decisions, sorted_folder, form)
        ]
        for there in (False, True)
    )
    new, again = _without(new, old)
    tables = [*new, *old]
    table = _in_order(pa.concat_tables(tables) if tables else form.schema.empty_table())
    account: Account = {"name": shard_name(index), "rows": table.num_rows, "row_groups": []}
    account["again"] = again
    ids = table.column("image_id").to_pylist()
    labels = table.column("label").to_pylist()
    if len(set(ids)) != len(ids):
        raise RuntimeError(f"shard {index} would hold an image twice")
    account["bytes"] = 0
    if ids:
        fs, path = resolve_uri(str(join(folder, account["name"])))
        sizes = pc.binary_length(table.column("image")).to_numpy()
        with parquet_writer_atomic(form.schema, fs, path) as writer:
            for start, end in row_groups(sizes, row_group_images):
                writer.write_table(table.slice(start, end - start), row_group_size=end - start)
                account["row_groups"].append(end - start)
        account["bytes"] = file_info(fs, path).size
    digest = hashlib.blake2b(digest_size=16)
    for name, label in zip(ids, labels, strict=True):
        digest.update(f"{name} {label}\n".encode())
    account["labelled"] = sum(label is not None for label in labels)
    account["digest"] = digest.hexdigest()
    return account


def _without(new: list[pa.Table], old: list[pa.Table]) -> tuple[list[pa.Table], int]:
    """New rows whose ids are not among the old ones, and how many were."""
    if not new or not old:
        return new, 0
    known = pa.concat_arrays([c for t in old for c in t.column("image_id").chunks])
    fresh = [t.filter(pc.invert(pc.is_in(t.column("image_id"), known))) for t in new]
    return fresh, sum(map(len, new)) - sum(map(len, fresh))


def _in_order(table: pa.Table) -> pa.Table:
    ids = table.column("image_id").to_numpy(zero_copy_only=False).astype(str)
    if (ids[1:] >= ids[:-1]).all():
        return table
    # binary columns above 2 GiB in one chunk cannot be taken from; a shard has a quarter of one
    return table.take(pa.array(np.argsort(ids, kind="stable")))


def _read(
    piece: Piece, low: str, high: str, decisions: str, sorted_folder: str, form: Form
) -> Iterator[pa.Table]:
    """The rows of a piece with low <= id < high that are kept, in the form of a shard."""
    if piece.sorted:
        fs, path = resolve_uri(str(join(sorted_folder, f"{piece.sorted}.parquet")))
        with open_patiently(fs, path) as file, pq.ParquetFile(file) as parquet:
            yield parquet.read_row_groups(list(piece.groups)).cast(form.schema)
        return
    if piece.file.set == EARLIER:
        with opened(piece.file) as parquet:
            names = parquet.read(columns=["image_id"]).column(0).to_pylist()
        ids, kept = np.array(names, "U32"), np.ones(len(names), bool)
    else:
        ids, kept = decided(piece.file, decisions)
    kept &= (ids >= low) & (ids < high)
    first = 0
    with opened(piece.file) as parquet:
        for group, rows in enumerate(piece.file.file.row_groups):
            chosen = np.flatnonzero(kept[first : first + rows])
            if len(chosen):
                table = parquet.read_row_group(group)
                if len(chosen) < rows:
                    table = table.take(pa.array(chosen))
                yield formed(table, ids[first + chosen], None, piece.file, form)
            first += rows


# ---- Input files that are not ordered by id, each sorted by itself, for the shards to read from.
#
# Row groups of a sorted file end where a shard ends, so a shard reads what is its own.


RUN_BYTES = 256 * 2**20  # of images that are sorted at once


def sort_files(
    root: Place,
    inputs: Inputs,
    decisions: Result,
    fingerprints: str,
    form: Form,
    count: int,
    key: str,
) -> Result | None:
    """The step that sorts the files that are not packed; None where nothing of them is kept."""
    loose = [
        file
        for file, account in zip(inputs.files, decisions.accounts, strict=True)
        if file.set not in form.packed and account["kept"]
    ]
    if not loose:
        return None
    tasks = [Task(file.name, (file, count, decisions.folder, fingerprints, form)) for file in loose]
    return run_step(root, "sorted", key, tasks, sort_file)


def sort_file(
    folder: str, file: InputFile, count: int, decisions: str, fingerprints: str, form: Form
) -> Account:
    """Task: the rows of a file that are kept, as one or more files sorted by id."""
    ids, kept = decided(file, decisions)
    about = read_table(fingerprints, file.name, ["source", "width", "height"])
    runs: list[dict[str, Any]] = []
    buffered: list[pa.Table] = []
    total = 0

    def flush() -> None:
        if not buffered:
            return
        table = pa.concat_tables(buffered)
        table = table.take(pc.sort_indices(table, [("image_id", "ascending")]))
        name = f"{file.name}-{len(runs):03d}"
        places = [shard_of(x, count) for x in table.column("image_id").to_pylist()]
        fs, path = resolve_uri(str(join(folder, f"{name}.parquet")))
        order, first = [], 0
        with parquet_writer_atomic(form.schema, fs, path) as writer:
            for end in range(1, len(places) + 1):
                if end == len(places) or places[end] != places[first]:
                    writer.write_table(table.slice(first, end - first), row_group_size=end - first)
                    order.append(places[first])
                    first = end
        runs.append({"name": name, "shards": order})
        buffered.clear()

    with opened(file) as parquet:
        first = 0
        for group, rows in enumerate(file.file.row_groups):
            chosen = np.flatnonzero(kept[first : first + rows])
            if len(chosen):
                table = parquet.read_row_group(group).take(pa.array(chosen))
                buffered.append(
                    formed(table, ids[first + chosen], about.take(first + chosen), file, form)
                )
                total += table.nbytes
                if total >= RUN_BYTES:
                    flush()
                    total = 0
            first += rows
    flush()
    return {"rows": int(kept.sum()), "file": file.index, "runs": runs}
