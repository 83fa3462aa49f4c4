"""Packing, first half: a task's images verified and written as runs sorted by id.

A run is an index (parquet, one row per image, sorted by id) beside the encoded images one after the
other in the same order (`.bin`), so a shard can fetch its range of ids from any run by one read.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.images.decode import BadImage, decode_measured
from pipeline.images.value_range import FULL, Span, ValueRange, smallest
from pipeline.pack.items import Item, read_task
from pipeline.pack.labels import Label, label_of
from pipeline.pack.listing import Other, Refused
from pipeline.pack.sources import Reading, Task
from pipeline.shards.columns import image_id
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.places import resolve_uri, retries
from pipeline.storage.transfer import (
    atomic_path,
    write_bytes_atomic,
    write_parquet_atomic,
)

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
        pa.field("class_name", pa.string()),  # class by a label column or file that holds names
    ]
)
INDEX_VERSION = 4  # a pack that was begun with other runs or tasks begins anew
_INDEX_ROW_GROUP = 512


@dataclass(frozen=True)
class PackSpec:
    """What every task of one pack needs to know. Extra columns travel as a schema."""

    source: str  # a place in its file system
    root: str  # of the source, in its file system
    shards: str
    scratch: str  # folder of the intermediate files
    reading: Reading
    max_pixels: int
    row_group_images: int
    run_bytes: int
    name_lists: tuple[tuple[str, ...], ...]
    channels: int = 3  # that every image must be able to give
    value_range: ValueRange | Literal["auto-from-sample"] = FULL
    labelled: bool = False  # files beside the images hold their labels: folders are no classes

    @property
    def extras(self) -> pa.Schema:
        """Further columns of the shards."""
        return self.reading.extras


class _Row(NamedTuple):
    image_id: str
    source: str
    encoded: bytes
    width: int
    height: int
    format: str
    folder: str | None
    label: int | None
    class_name: str | None
    span: Span | None  # of the values of a deep image


@dataclass
class _Run:
    """Images in memory that the next run will hold, and their extra columns."""

    rows: list[_Row] = field(default_factory=list)
    extras: list[pa.Table] = field(default_factory=list)
    bytes: int = 0


def write_runs(index: int, task: Task, spec: PackSpec) -> dict[str, Any]:
    """Read a task, write its runs, and return (and store, last) its account.

    The account: `images` = rows of its runs + len(bad); what was left alone; runs with their
    bytes; folders, class names and largest label seen in good images.
    """
    before = retries()
    fs, _ = resolve_uri(spec.source)
    scratch_fs, scratch = resolve_uri(spec.scratch)
    name = f"{scratch}/runs/task-{index:06d}"
    account: dict[str, Any] = {
        "index": index,
        "images": 0,
        "names": task.names,
        "runs": [],
        "bad": [],
        "others": [],
    }
    labels = _Labels(spec.labelled and task.kind != "parquet")
    spans: dict[str, Span] = {}
    run = _Run()

    def flush() -> None:
        nonlocal run
        if run.rows:
            path = f"{name}-{len(account['runs']):04d}"
            rows, size = _write_run(run, spec.extras, scratch_fs, path)
            account["runs"].append({"path": path, "rows": rows, "bytes": size, "names": task.names})
            labels.runs.append(path)
        run = _Run()

    for items, extras in read_task(fs, spec.root, task, spec.reading):
        kept = []
        for place, item in enumerate(items):
            if isinstance(item, Other):
                account["others"].append(dataclasses.astuple(item))
                continue
            if isinstance(item, Label):
                labels.add(item)
                continue
            account["images"] += 1
            image = _verify(item, spec)
            if isinstance(image, Refused):
                account["bad"].append(dataclasses.astuple(image))
                continue
            labels.see(image.folder, image.label, image.class_name)
            if image.span is not None:
                spans = smallest(spans | {image.image_id: image.span})
            run.rows.append(image)
            run.bytes += len(image.encoded)
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
    labels.write(scratch_fs)
    account["others"] += labels.others()
    account["folders"] = sorted(labels.folders)
    account["class_names"] = sorted(labels.class_names)
    account["max_label"] = labels.largest
    account["spans"] = {name: dataclasses.asdict(span) for name, span in spans.items()}
    account["retries"] = retries() - before
    write_bytes_atomic(json.dumps(account).encode(), scratch_fs, f"{name}.json")
    return account


class _Labels:
    """Classes and class ids of a task's images: by folder, or by the label files beside them."""

    def __init__(self, labelled: bool) -> None:
        self.labelled = labelled
        self.files: dict[str, Label] = {}
        self.used: set[str] = set()
        self.runs: list[str] = []
        self.folders: set[str] = set()
        self.class_names: set[str] = set()
        self.largest = -1

    def add(self, label: Label) -> None:
        """A label file was read."""
        self.files[label.key] = label

    def see(self, folder: str | None, label: int | None, class_name: str | None) -> None:
        """A good image is in this folder and has this class id, or class of this name."""
        self.folders |= {folder} if folder is not None else set()
        self.class_names |= {class_name} if class_name is not None else set()
        self.largest = max(self.largest, -1 if label is None else label)

    def write(self, fs: pafs.FileSystem) -> None:
        """Give the rows of all runs the labels of their files, which may have come after them."""
        if not self.files and not self.labelled:
            return
        values = {key: label.value for key, label in self.files.items()}
        self.folders, self.class_names, self.largest = set(), set(), -1
        for path in self.runs:
            with open_parquet(fs, f"{path}.parquet", piecewise=True) as parquet:
                table = parquet.read()
            columns: dict[str, list[Any]] = {"folder": [], "label": [], "class_name": []}
            for source in table.column("source").to_pylist():
                key, value = label_of(source, values) or ("", -1)
                self.used.add(key)
                named = value if isinstance(value, str) else None
                number = value if isinstance(value, int) and value >= 0 else None
                columns["folder"].append(None)
                columns["label"].append(number)
                columns["class_name"].append(named)
                self.see(None, number, named)
            for column, kept in columns.items():
                at = table.schema.get_field_index(column)
                field_ = table.schema.field(at)
                table = table.set_column(at, field_, pa.array(kept, field_.type))
            write_parquet_atomic(table, fs, f"{path}.parquet", _INDEX_ROW_GROUP)

    def others(self) -> list[tuple[str, str, str]]:
        """The label files, which are no images."""
        return [
            (label.source, "label", f"class {label.value}"[:200] if key in self.used
             else "no good image has its name")
            for key, label in self.files.items()
        ]  # fmt: skip


def _null_table(schema: pa.Schema, rows: int) -> pa.Table:
    return pa.table([pa.nulls(rows, f.type) for f in schema], schema=schema)


def _verify(item: Item | Refused, spec: PackSpec) -> _Row | Refused:
    if isinstance(item, Refused):
        return item
    name = image_id(item.encoded)
    if item.image_id not in ("", name):
        detail = f"its bytes are not those of {item.image_id}, by which its shard names it"
        return Refused(item.source, "damaged", detail, name)
    how = spec.max_pixels, spec.channels, spec.value_range
    try:
        pixels, form, span = decode_measured(item.encoded, *how)
    except BadImage as bad:
        return Refused(item.source, bad.reason, bad.detail, name)
    height, width = pixels.shape[:2]
    about = (width, height, form, item.folder, item.label, item.class_name, span)
    return _Row(name, item.source, item.encoded, *about)


def _write_run(
    run: _Run, extra_schema: pa.Schema, fs: pafs.FileSystem, path: str
) -> tuple[int, int]:
    """Sort by (id, source), write the bytes of equal images once; returns rows and bytes."""
    order = sorted(range(len(run.rows)), key=lambda i: run.rows[i][:2])
    written, begin, end = "", 0, 0  # id of the last image written, and where its bytes lie
    index: list[list[Any]] = [[] for _ in INDEX_SCHEMA]
    with atomic_path(fs, f"{path}.bin") as temporary, Path(temporary).open("wb") as stream:
        for i in order:
            name, source, encoded, *about, _ = run.rows[i]
            if name != written:
                stream.write(encoded)
                written, begin, end = name, end, end + len(encoded)
            values = (name, source, begin, len(encoded), *about)
            for column, value in zip(index, values, strict=True):
                column.append(value)
    arrays = [pa.array(v, f.type) for v, f in zip(index, INDEX_SCHEMA, strict=True)]
    table = pa.table(arrays, schema=INDEX_SCHEMA)
    if extra_schema:
        extras = pa.concat_tables(run.extras).take(order)
        for field_ in extra_schema:
            # A prefix, for an extra column may have the name of one of the index.
            table = table.append_column(f"extra:{field_.name}", extras.column(field_.name))
    write_parquet_atomic(table, fs, f"{path}.parquet", _INDEX_ROW_GROUP)
    return len(order), end
