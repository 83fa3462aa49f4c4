"""Packing, second half: a range of ids fetched from all runs, merged, and written as one shard."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, starmap
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.images.value_range import FULL, ValueRange
from pipeline.pack import duplicates
from pipeline.pack.sorted_runs import PackSpec
from pipeline.pack.sources import Plan
from pipeline.shards.classes import Classes
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, shard_metadata
from pipeline.storage.places import file_info, resolve_uri, retries, with_retries
from pipeline.storage.transfer import parquet_writer_atomic, read_bytes, write_bytes_atomic

# A row group is read whole, by each window that touches it: a quarter of a window or less, so that
# the ends of a window add little. 256 ordinary photos fit; larger images make shorter groups.
ROW_GROUP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Merge:
    """What all runs together decide: how many shards, and which class has which id."""

    shards: int
    class_names: tuple[str, ...]
    name_ids: dict[str, int]  # of label columns that hold names
    folder_ids: dict[str, int]  # empty where folders are not classes
    label_ids: tuple[tuple[int, ...], ...]  # per list of names: id of its i-th name; () : as it is
    labels: bool
    value_range: ValueRange = FULL


def merge_of(
    plan: Plan,
    read: Sequence[dict[str, Any]],
    labels: str,
    shard_bytes: int,
    source: str,
    value_range: ValueRange,
) -> Merge:
    """Decide classes and the number of shards from all that was read.

    Args:
        plan: of the reading tasks.
        read: their accounts.
        labels: as `PackOptions.labels`.
        shard_bytes: about the size of a shard.
        source: for sentences.
        value_range: that the shards note.

    Raises:
        DataError: label ids of several files that cannot be brought together.
    """
    size = sum(run["bytes"] for account in read for run in account["runs"])
    shards = max(1, math.ceil(size / shard_bytes))
    if labels == "none":
        return Merge(shards, (), {}, {}, (), labels=False, value_range=value_range)
    for account in read:
        names = plan.name_lists[account["names"]] if account["names"] >= 0 else ()
        if names and account["max_label"] >= len(names):
            raise DataError(
                f"a label is {account['max_label']} but {plan.tasks[account['index']].paths[0]} "
                f"names only {len(names)} classes",
                hint="correct the file, or pack without labels: data.labels=none.",
            )
    all_folders = sorted({folder for account in read for folder in account["folders"]})
    folders = all_folders if labels == "folder" or len(all_folders) > 1 else []
    named = sorted({name for account in read for name in account["class_names"]})
    with_ids = {account["names"] >= 0 for account in read if account["max_label"] >= 0}
    if False in with_ids and (folders or named or True in with_ids):
        raise DataError(
            f"{source} has label ids without class names beside images with named classes",
            hint="pack them apart, or without labels: data.labels=none.",
        )
    used = {account["names"] for account in read}
    lists = [names if i in used else () for i, names in enumerate(plan.name_lists)]
    classes = Classes.of([*lists, folders, named])
    return Merge(
        shards,
        classes.names,
        {name: classes.index[name] for name in named},
        {name: classes.index[name] for name in folders},
        tuple(tuple(classes.ids(names).tolist()) for names in lists),
        labels=True,
        value_range=value_range,
    )


def shard_name(index: int) -> str:
    """The file name of a shard."""
    return f"part-{index:05d}.parquet"


def id_range(index: int, shards: int) -> tuple[str, str]:
    """First id of a shard and first id after it; "g" sorts after every hex digit."""
    low, high = ((i << 128) // shards for i in (index, index + 1))
    return f"{low:032x}", f"{high:032x}" if index + 1 < shards else "g"


def shard_of(image_id: str, shards: int) -> int:
    """The shard that an id belongs to: the inverse of `id_range`."""
    return int(image_id, 16) * shards >> 128


def write_shard(index: int, merge: Merge, spec: PackSpec) -> dict[str, Any]:
    """Write shard `index` and return (and store, last) its account; no rows, no file."""
    before = retries()
    scratch_fs, scratch = resolve_uri(spec.scratch)
    fs, folder = resolve_uri(spec.shards)
    runs = json.loads(read_bytes(scratch_fs, f"{scratch}/runs.json"))
    low, high = id_range(index, merge.shards)
    parts = [_rows_of(scratch_fs, run["path"], n, low, high) for n, run in enumerate(runs)]
    every, packed = _by_id(pa.concat_tables(parts))
    every_label = _labels(every, [run["names"] for run in runs], merge)
    kept = np.flatnonzero(packed == np.arange(len(packed)))
    rows = every.take(pa.array(kept, pa.int64())).combine_chunks()
    account: dict[str, Any] = {"index": index, "name": shard_name(index), "rows": rows.num_rows}
    account |= {"duplicates": len(packed) - len(kept), "disagreeing": 0}
    if account["duplicates"]:
        classes = [_class_name(label, merge) for label in every_label]
        listed = duplicates.write_part(index, every, packed, classes, spec.scratch)
        account["disagreeing"] = duplicates.disagreeing(listed).num_rows
    groups: Iterator[pa.Table] = iter(())
    schema = pa.schema([*IMAGE_SHARD_SCHEMA, *spec.extras])
    schema = schema.with_metadata(shard_metadata(merge.class_names, merge.value_range))
    if rows.num_rows:
        labels = [every_label[row] for row in kept.tolist()]
        images = _Images(scratch_fs, [run["path"] for run in runs], rows)

        def group(start: int, end: int) -> pa.Table:
            part = rows.slice(start, end - start)
            columns = {name: part.column(name) for name in part.column_names}
            columns["image"] = images.take(start, end)
            columns["label"] = pa.array(labels[start:end], pa.int64())
            columns |= {f.name: part.column(f"extra:{f.name}") for f in spec.extras}
            return pa.table([columns[name] for name in schema.names], schema=schema)

        sizes = rows.column("size").to_numpy()
        groups = starmap(group, row_groups(sizes, spec.row_group_images))
    account |= write_ordered(schema, fs, f"{folder}/{account['name']}", groups)
    account["retries"] = retries() - before
    stored = json.dumps(account).encode()
    write_bytes_atomic(stored, scratch_fs, f"{scratch}/shards/shard-{index:06d}.json")
    return account


def write_ordered(
    schema: pa.Schema, fs: pafs.FileSystem, path: str, groups: Iterator[pa.Table]
) -> dict[str, Any]:
    """Writes row groups that are ordered by id as one shard; no groups, no file.

    Returns:
        What the manifest says of it: `row_groups`, `labelled` rows, `bytes` and the `digest` of
        its ids and labels.
    """
    digest = hashlib.blake2b(digest_size=16)
    account: dict[str, Any] = {"row_groups": [], "labelled": 0, "bytes": 0}
    if (first := next(groups, None)) is not None:
        with parquet_writer_atomic(schema, fs, path) as writer:
            for table in chain([first], groups):
                writer.write_table(table, row_group_size=len(table))
                account["row_groups"].append(len(table))
                account["labelled"] += len(table) - table["label"].null_count
                both = (table[name].to_pylist() for name in ("image_id", "label"))
                for name, label in zip(*both, strict=True):
                    digest.update(f"{name} {label}\n".encode())
        account["bytes"] = file_info(fs, path).size
    return account | {"digest": digest.hexdigest()}


def _rows_of(fs: pafs.FileSystem, path: str, run: int, low: str, high: str) -> pa.Table:
    """The index rows of one run with low <= id < high."""

    def read() -> pa.Table:
        with pq.ParquetFile(fs.open_input_file(f"{path}.parquet")) as parquet:
            groups = []
            for group in range(parquet.metadata.num_row_groups):
                stats = parquet.metadata.row_group(group).column(0).statistics
                known = stats is not None and stats.has_min_max
                if not known or (stats.max >= low and stats.min < high):
                    groups.append(group)
            return parquet.read_row_groups(groups)

    table = with_retries(f"reading {path}.parquet", read)
    ids = table.column("image_id")
    table = table.filter(pc.and_(pc.greater_equal(ids, low), pc.less(ids, high)))
    return table.append_column("run", pa.array(np.full(table.num_rows, run, np.int32)))


def _by_id(table: pa.Table) -> tuple[pa.Table, np.ndarray[Any, Any]]:
    """Rows by id, then source (then place in the source), and for each row the first of its id."""
    if not table.num_rows:
        return table, np.empty(0, np.int64)
    keys = [(name, "ascending") for name in ("image_id", "source", "run", "offset")]
    table = table.take(pc.sort_indices(table, sort_keys=keys)).combine_chunks()
    ids = table.column("image_id").combine_chunks()
    changed = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
    first = np.concatenate([[True], changed])
    return table, np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))


def _class_name(label: int | None, merge: Merge) -> str | None:
    if label is None:
        return None
    return merge.class_names[label] if merge.class_names else str(label)


def _labels(rows: pa.Table, names: list[int], merge: Merge) -> list[int | None]:
    if not merge.labels:
        return [None] * rows.num_rows
    labels: list[int | None] = []
    about = ("folder", "class_name", "label", "run")
    columns = (rows.column(name).to_pylist() for name in about)
    for folder, name, label, run in zip(*columns, strict=True):
        if name is not None:
            labels.append(merge.name_ids[name])
        elif label is None:
            labels.append(merge.folder_ids.get(folder))
        else:
            ids = merge.label_ids[names[run]] if names[run] >= 0 else ()
            labels.append(ids[label] if ids else label)
    return labels


def row_groups(sizes: np.ndarray[Any, Any], rows: int) -> Iterator[tuple[int, int]]:
    """First row and end of each row group: at most `rows` images, and ROW_GROUP_BYTES of them."""
    start, group_bytes = 0, 0
    for at, size in enumerate(sizes.tolist()):
        if at > start and (at - start == rows or group_bytes + size > ROW_GROUP_BYTES):
            yield start, at
            start, group_bytes = at, 0
        group_bytes += size
    yield start, len(sizes)


def _read_range(fs: pafs.FileSystem, path: str, low: int, high: int) -> pa.Buffer:
    with fs.open_input_file(path) as file:
        file.seek(low)
        return file.read_buffer(high - low)


class _Images:
    """The encoded images of a shard's rows: one read per run, as ids of a range lie together."""

    def __init__(self, fs: pafs.FileSystem, paths: list[str], rows: pa.Table) -> None:
        self.run = rows.column("run").to_numpy()
        self.offset = rows.column("offset").to_numpy()
        self.size = rows.column("size").to_numpy()
        self.blocks: dict[int, tuple[int, pa.Buffer]] = {}
        for run in np.unique(self.run).tolist():
            mine = self.run == run
            low = int(self.offset[mine].min())
            high = int((self.offset[mine] + self.size[mine]).max())
            block = with_retries(
                f"reading {paths[run]}.bin",
                functools.partial(_read_range, fs, f"{paths[run]}.bin", low, high),
            )
            self.blocks[run] = low, block

    def take(self, start: int, end: int) -> pa.Array:
        images = []
        for run, offset, size in zip(
            *(values[start:end].tolist() for values in (self.run, self.offset, self.size)),
            strict=True,
        ):
            low, block = self.blocks[run]
            images.append(block.slice(offset - low, size).to_pybytes())
        return pa.array(images, pa.binary())
