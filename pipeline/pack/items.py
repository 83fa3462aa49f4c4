"""Reads one task of a source: encoded images one after the other, or why there is none."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import StorageError, shortened
from pipeline.images.kinds import HEAD, begins_like_an_image, claims_images, is_unread_archive
from pipeline.pack.archives import Content, read_archive, too_large
from pipeline.pack.labels import Label, LabelFiles
from pipeline.pack.listing import Other, Refused, left_out, readable
from pipeline.pack.source_places import inside
from pipeline.pack.sources import Reading, Task, extra_fields
from pipeline.shards.classes import canonical, label_ids, label_kind, label_names
from pipeline.shards.row_group import image_array
from pipeline.storage.transfer import open_patiently, read_bytes

_BATCH_ROWS = 32  # of a parquet file in memory at once
_REMOTE_READS = 8  # under way at once
_ROWS_NAMED = 100_000  # of a row group that cannot be read; a footer may claim any number


@dataclass(frozen=True)
class Item:
    """One encoded image as the source gives it.

    Its class by place is `folder`; by a label column `class_name`, or `label` where it holds ids.
    """

    source: str
    encoded: bytes
    folder: str | None = None
    label: int | None = None
    class_name: str | None = None
    image_id: str = ""  # that a shard stores beside it


# Items, and their extra columns in the order of the items (None: there are none).
Read = Item | Refused | Other | Label
ReadBatch = tuple[Sequence[Read], pa.Table | None]


def read_task(fs: pafs.FileSystem, root: str, task: Task, reading: Reading) -> Iterator[ReadBatch]:
    """All images of a task in their order. Nothing that is wrong with the source raises.

    Raises:
        StorageError: remote storage failed after all tries. That says nothing about the images.
    """
    labels = LabelFiles(reading.label_member)
    if task.kind == "parquet":
        yield from _read_parquet(fs, root, task, reading)
        return
    if task.kind == "archive":
        contents = read_archive(fs, root, task.paths[0], reading.max_image_bytes)
    else:
        contents = _read_files(fs, root, task, reading.max_image_bytes)
    for item in contents:
        yield [_judged(item, labels) if isinstance(item, Content) else item], None


def _judged(item: Content, labels: LabelFiles) -> Read:
    """An image, a label, or what claims to be neither."""
    if (key := labels.key(item.source)) is not None:
        try:
            value = labels.value(item.encoded)
            value = canonical([value])[0] if isinstance(value, str) else value
            return Label(item.source, key, value)
        except ValueError as error:
            return Other(item.source, "bad_label", shortened(f"no label: {error}"))
    if claims_images(item.source) or begins_like_an_image(item.encoded[:HEAD]):
        folder = canonical([item.folder])[0] if item.folder else None
        return Item(item.source, item.encoded, folder)
    if is_unread_archive(item.source):
        return Other(item.source, "unread_archive", "an archive of a kind that is not read")
    return Other(item.source, "no_image", "neither its name nor its first bytes are an image's")


def _read_files(
    fs: pafs.FileSystem, root: str, task: Task, max_bytes: int
) -> Iterator[Content | Refused | Other]:
    def read(path: str) -> Content | Refused | Other:
        source, local = readable(path), isinstance(fs, pafs.LocalFileSystem)
        try:
            if task.kind == "large":
                with open_patiently(fs, inside(root, path)) as file:
                    head, size = file.read(HEAD), file.seek(0, os.SEEK_END)
                return too_large(source, size, max_bytes, head)
            place = inside(root, path)
            encoded = _read_local(place, max_bytes) if local else read_bytes(fs, place)
        except OSError as error:
            if isinstance(error, StorageError):
                if error.passing:
                    raise
                return left_out(source, "unreadable", shortened(error.what))
            return left_out(source, "unreadable", shortened(f"{type(error).__name__}: {error}"))
        if len(encoded) > max_bytes:
            return too_large(source, len(encoded), max_bytes, encoded[:HEAD])
        folder = PurePosixPath(path).parent.name
        return Content(source, encoded, readable(folder) if folder else None)

    if isinstance(fs, pafs.LocalFileSystem):
        yield from map(read, task.paths)
        return
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        for at in range(0, len(task.paths), _REMOTE_READS):
            yield from pool.map(read, task.paths[at : at + _REMOTE_READS])


def _read_local(path: str, max_bytes: int) -> bytes:
    """The file, or its first `max_bytes` + 1 bytes, whatever became of it since it was listed."""
    # A pipe in its place would let a plain `open` wait; so would some files of /proc, whose size
    # is always 0.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError("not a regular file")
        return file.read(max_bytes + 1) if about.st_size else b""


def _read_parquet(
    fs: pafs.FileSystem, root: str, task: Task, reading: Reading
) -> Iterator[ReadBatch]:
    path = readable(task.paths[0])
    try:
        with (
            open_patiently(fs, inside(root, task.paths[0])) as file,
            pq.ParquetFile(file) as parquet,
        ):
            starts = [0]
            for group in range(parquet.metadata.num_row_groups):
                starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
            for group in task.row_groups:
                yield from _read_group(parquet, group, starts[group : group + 2], task, reading)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:  # it was read when it was listed
        detail = shortened(f"cannot be opened any more: {_first_line(error)}")
        yield [Refused(path, "unreadable", detail)], None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_group(
    parquet: pq.ParquetFile, group: int, rows: Sequence[int], task: Task, reading: Reading
) -> Iterator[ReadBatch]:
    """The rows of a row group, from the first of two row numbers to the second."""
    path, (row, end) = readable(task.paths[0]), rows
    image, label = ("image", "label") if task.own else (reading.image_column, reading.label_column)
    kept = extra_fields(parquet.schema_arrow, image, label, own=task.own)
    columns = [image, *[name for name, _ in kept], *["source", "image_id"] * task.own]
    columns += [label] * (reading.labels and label in parquet.schema_arrow.names)
    try:
        for batch in parquet.iter_batches(_BATCH_ROWS, [group], columns):
            table = pa.Table.from_batches([batch])
            items = _rows(table, path, row, task.own, image, label)
            yield (
                [_limited(item, reading.max_image_bytes) for item in items],
                _extras(table, {field.name: name for name, field in kept}, reading.extras),
            )
            row += len(items)
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        detail = shortened(f"cannot read the row group: {_first_line(error)}")
        names = [f"{path}#{n}" for n in range(row, min(end, row + _ROWS_NAMED))]
        if end - row > len(names):
            names.append(f"{path}#{row + len(names)} to {end - 1}")
        yield [Refused(name, "undecodable", detail) for name in names], None


def _rows(
    table: pa.Table, path: str, first: int, own: bool, image_column: str, label_column: str
) -> list[Item]:
    images = image_array(table.column(image_column))
    labels: list[int | None] = [None] * len(images)
    names: list[str | None] = [None] * len(images)
    if label_column in table.column_names:
        column = table.column(label_column)
        if label_kind(column.type) == "names":
            names = label_names(column).to_pylist()
        else:
            labels = label_ids(column).to_pylist()
    kept = table.column("source").to_pylist() if own else [None] * len(images)
    sources = [name or f"{path}#{first + i}" for i, name in enumerate(kept)]
    ids = table.column("image_id").to_pylist() if own else [""] * len(images)
    return [
        Item(source, image.as_py() or b"", None, label, name, stored)
        for source, image, label, name, stored in zip(
            sources, images, labels, names, ids, strict=True
        )
    ]


def _limited(item: Item, max_image_bytes: int) -> Item | Refused:
    size = len(item.encoded)
    if size <= max_image_bytes:
        return item
    return Refused(item.source, "too_large", f"{size} bytes, at most {max_image_bytes} are read")


def _extras(table: pa.Table, origin: dict[str, str], extras: pa.Schema) -> pa.Table | None:
    if not extras:
        return None
    columns = [
        table.column(origin[field.name]).cast(field.type)
        if field.name in origin
        else pa.nulls(len(table), field.type)
        for field in extras
    ]
    return pa.table(columns, schema=extras)
