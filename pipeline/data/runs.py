"""Packing, first half: a task's images verified and written as runs sorted by id.

A run is an index (parquet, one row per image, sorted by id) beside the encoded images one after the
other in the same order (`.bin`), so a shard can fetch its range of ids from any run by one read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.data.columns import image_id
from pipeline.data.decode import BadImage, decode
from pipeline.data.items import Item, read_task
from pipeline.data.sources import Refused, Task
from pipeline.data.storage import resolve_uri, retries
from pipeline.data.transfer import atomic_path, write_bytes_atomic, write_parquet_atomic

INDEX_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("offset", pa.int64()),  # bytes in the .bin file
        pa.field("size", pa.int64()),  # bytes
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("format", pa.string()),
        pa.field("folder", pa.string()),  # class by place in a folder or archive
        pa.field("label", pa.int64()),  # class id in the source file's own list of names
    ]
)
_INDEX_ROW_GROUP = 512


@dataclass(frozen=True)
class PackSpec:
    """What every task of one pack needs to know. Extra columns travel as a schema."""

    source: str
    root: str  # of the source, in its file system
    shards: str
    work: str
    image_column: str
    label_column: str
    max_pixels: int
    max_image_bytes: int
    row_group_images: int
    run_bytes: int
    extras: pa.Schema
    name_lists: tuple[tuple[str, ...], ...]
    channels: int = 3  # that every image must be able to give


class _Row(NamedTuple):
    image_id: str
    source: str
    encoded: bytes
    width: int
    height: int
    format: str
    folder: str | None
    label: int | None


@dataclass
class _Run:
    """Images in memory that the next run will hold, and their extra columns."""

    rows: list[_Row] = field(default_factory=list)
    extras: list[pa.Table] = field(default_factory=list)
    bytes: int = 0


def write_runs(index: int, task: Task, spec: PackSpec) -> dict[str, Any]:
    """Read a task, write its runs, and return (and store, last) its account.

    The account: `images` = kept + duplicates + len(bad); runs with their bytes; folders and largest
    label seen in good images.
    """
    before = retries()
    fs, _ = resolve_uri(spec.source)
    work_fs, work = resolve_uri(spec.work)
    name = f"{work}/runs/task-{index:06d}"
    account: dict[str, Any] = {
        "index": index,
        "images": 0,
        "duplicates": 0,
        "names": task.names,
        "max_label": -1,
        "runs": [],
        "bad": [],
    }
    folders: set[str | None] = set()
    run = _Run()

    def flush() -> None:
        nonlocal run
        if run.rows:
            path = f"{name}-{len(account['runs']):04d}"
            rows, size, duplicates = _write_run(run, spec.extras, work_fs, path)
            account["runs"].append({"path": path, "rows": rows, "bytes": size, "names": task.names})
            account["duplicates"] += duplicates
        run = _Run()

    for items, extras in read_task(
        fs,
        spec.root,
        task,
        spec.image_column,
        spec.label_column,
        spec.max_image_bytes,
        spec.extras,
    ):
        kept = []
        for place, item in enumerate(items):
            account["images"] += 1
            found = _verify(item, spec.max_pixels, spec.channels)
            if isinstance(found, Refused):
                account["bad"].append(dataclasses.astuple(found))
                continue
            folders.add(found.folder)
            if found.label is not None:
                account["max_label"] = max(account["max_label"], found.label)
            run.rows.append(found)
            run.bytes += len(found.encoded)
            kept.append(place)
        if spec.extras:
            run.extras.append(
                _null_table(spec.extras, len(kept))
                if extras is None
                else extras.take(pa.array(kept, pa.int64()))
            )
        if run.bytes >= spec.run_bytes:
            flush()
    flush()
    account["folders"] = sorted(folder for folder in folders if folder is not None)
    account["retries"] = retries() - before
    write_bytes_atomic(json.dumps(account).encode(), work_fs, f"{name}.json")
    return account


def _null_table(schema: pa.Schema, rows: int) -> pa.Table:
    return pa.table([pa.nulls(rows, f.type) for f in schema], schema=schema)


def _verify(item: Item | Refused, max_pixels: int, channels: int) -> _Row | Refused:
    if isinstance(item, Refused):
        return item
    name = image_id(item.encoded)
    try:
        pixels, form = decode(item.encoded, max_pixels, channels)
    except BadImage as bad:
        return Refused(item.source, bad.reason, bad.detail, name)
    height, width = pixels.shape[:2]
    return _Row(name, item.source, item.encoded, width, height, form, item.folder, item.label)


def _write_run(
    run: _Run, extra_schema: pa.Schema, fs: pafs.FileSystem, path: str
) -> tuple[int, int, int]:
    """Sort by (id, source), keep the first of each id; returns rows, bytes, duplicates."""
    order = sorted(range(len(run.rows)), key=lambda i: run.rows[i][:2])
    keep = [i for k, i in enumerate(order) if k == 0 or run.rows[order[k - 1]][0] != run.rows[i][0]]
    offset = 0
    index: list[list[Any]] = [[] for _ in INDEX_SCHEMA]
    with atomic_path(fs, f"{path}.bin") as temporary, Path(temporary).open("wb") as stream:
        for i in keep:
            name, source, encoded, *about = run.rows[i]
            stream.write(encoded)
            values = (name, source, offset, len(encoded), *about)
            for column, value in zip(index, values, strict=True):
                column.append(value)
            offset += len(encoded)
    arrays = [pa.array(v, f.type) for v, f in zip(index, INDEX_SCHEMA, strict=True)]
    table = pa.table(arrays, schema=INDEX_SCHEMA)
    if extra_schema:
        extras = pa.concat_tables(run.extras).take(keep)
        for field_ in extra_schema:
            # A prefix, for an extra column may have the name of one of the index.
            table = table.append_column(f"extra:{field_.name}", extras.column(field_.name))
    write_parquet_atomic(table, fs, f"{path}.parquet", _INDEX_ROW_GROUP)
    return len(keep), offset, len(order) - len(keep)
