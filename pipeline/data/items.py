"""Reads one task of a source: encoded images one after the other, or why there is none."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.data.row_group import image_array
from pipeline.data.sources import Refused, Task, extra_fields, readable
from pipeline.data.transfer import open_patiently, read_bytes
from pipeline.errors import StorageError

_BATCH_ROWS = 32  # of a parquet file in memory at once
_REMOTE_READS = 8  # under way at once
_RECORDS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


@dataclass(frozen=True)
class Item:
    """One encoded image as the source gives it; `folder` is its class by place, if any."""

    source: str
    encoded: bytes
    folder: str | None = None
    label: int | None = None


# Items, and their extra columns in the order of the items (None: there are none).
Piece = tuple[Sequence[Item | Refused], pa.Table | None]


def read_task(
    fs: pafs.FileSystem,
    root: str,
    task: Task,
    image_column: str,
    label_column: str,
    max_image_bytes: int,
    extras: pa.Schema,
) -> Iterator[Piece]:
    """All images of a task in their order. Nothing that is wrong with the source raises.

    Raises:
        StorageError: remote storage failed after all tries. That says nothing about the images.
    """
    if task.kind == "files":
        yield from _read_files(fs, root, task.paths)
    elif task.kind == "tar":
        for item in _read_tar(fs, root, task.paths[0], max_image_bytes):
            yield [item], None
    else:
        columns = ("image", "label") if task.own else (image_column, label_column)
        yield from _read_parquet(fs, root, task, *columns, max_image_bytes, extras)


def _folder(path: str) -> str | None:
    return PurePosixPath(path).parent.name or None


def _read_files(fs: pafs.FileSystem, root: str, paths: Sequence[str]) -> Iterator[Piece]:
    def read(path: str) -> Item | Refused:
        try:
            if isinstance(fs, pafs.LocalFileSystem):  # by Python, which takes names of any bytes
                encoded = Path(f"{root}/{path}").read_bytes()
            else:
                encoded = read_bytes(fs, f"{root}/{path}")
        except OSError as error:
            if isinstance(error, StorageError) and error.passing:
                raise
            if isinstance(error, StorageError):
                return Refused(readable(path), "unreadable", error.what[:200])
            return Refused(readable(path), "unreadable", f"{type(error).__name__}: {error}"[:200])
        folder = _folder(path)
        return Item(readable(path), encoded, readable(folder) if folder else None)

    if isinstance(fs, pafs.LocalFileSystem):
        for path in paths:
            yield [read(path)], None
        return
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        for at in range(0, len(paths), _REMOTE_READS):
            yield list(pool.map(read, paths[at : at + _REMOTE_READS])), None


def _read_tar(
    fs: pafs.FileSystem, root: str, path: str, max_image_bytes: int
) -> Iterator[Item | Refused]:
    """Members in one sequential read; nothing is written to disk, so no path can climb out."""
    members = 0
    try:
        with (
            open_patiently(fs, f"{root}/{path}") as file,
            tarfile.open(fileobj=file, mode="r|*", tarinfo=_StrictHeader) as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it grows and grows
                parts = PurePosixPath(member.name).parts
                hidden = any(p.startswith(".") and p not in (".", "..") for p in parts)
                if member.isdir() or hidden:
                    continue
                yield _member(archive, member, readable(path), max_image_bytes)
                members += 1
    except StorageError:
        raise
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        cut = isinstance(error, EOFError) or "unexpected end" in str(error)
        detail = f"the archive breaks off after {members} files: {error}"[:200]
        yield Refused(readable(path), "truncated" if cut else "undecodable", detail)


class _StrictHeader(tarfile.TarInfo):
    """Ends with an error where tarfile would take a broken header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            kind = type(error).__name__  # the subclasses are not documented, so not imported
            if kind == "EOFHeaderError":  # two blocks of zeros: the proper end
                raise
            if kind in ("EmptyHeaderError", "TruncatedHeaderError"):
                raise EOFError("no end mark") from error
            raise tarfile.ReadError(str(error)) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        # tarfile reads long names and pax records into memory, whatever size they say they have.
        if header.type in _RECORDS and header.size > 2**20:
            raise tarfile.ReadError(f"a header record of {header.size} bytes")
        return header


def _member(
    archive: tarfile.TarFile, member: tarfile.TarInfo, path: str, max_image_bytes: int
) -> Item | Refused:
    inside = PurePosixPath(member.name)
    source = f"{path}/{readable(member.name)}"
    if inside.is_absolute() or ".." in inside.parts:
        return Refused(source, "outside", "the path leads out of the archive")
    if member.issym() or member.islnk():
        return Refused(source, "link", f"link to {readable(member.linkname)}"[:200])
    if not member.isfile():
        return Refused(source, "not_an_image", "not a regular file")
    if member.size > max_image_bytes:
        detail = f"{member.size} bytes, at most {max_image_bytes} are read"
        return Refused(source, "too_large", detail)
    stream = archive.extractfile(member) or io.BytesIO()
    encoded = stream.read()
    if len(encoded) < member.size:
        raise EOFError(f"{readable(member.name)} has {len(encoded)} of {member.size} bytes")
    folder = inside.parent.name
    return Item(source, encoded, readable(folder) if folder else None)


def _read_parquet(
    fs: pafs.FileSystem,
    root: str,
    task: Task,
    image_column: str,
    label_column: str,
    max_image_bytes: int,
    extras: pa.Schema,
) -> Iterator[Piece]:
    path = task.paths[0]
    with open_patiently(fs, f"{root}/{path}") as file, pq.ParquetFile(file) as parquet:
        schema, meta = parquet.schema_arrow, parquet.metadata
        kept = extra_fields(schema, image_column, label_column, own=task.own)
        columns = [image_column, *[name for name, _ in kept], *["source"] * task.own]
        columns += [label_column] * (label_column in schema.names)
        starts = [0]
        for group in range(meta.num_row_groups):
            starts.append(starts[-1] + meta.row_group(group).num_rows)
        for group in task.row_groups:
            row, end = starts[group], starts[group + 1]
            try:
                for batch in parquet.iter_batches(_BATCH_ROWS, [group], columns):
                    table = pa.Table.from_batches([batch])
                    items = _rows(table, readable(path), row, task.own, image_column, label_column)
                    yield (
                        [_limited(item, max_image_bytes) for item in items],
                        _extras(table, {field.name: name for name, field in kept}, extras),
                    )
                    row += len(items)
            except StorageError:
                raise
            except (pa.ArrowException, OSError) as error:
                detail = f"cannot read the row group: {str(error).splitlines()[0]}"[:200]
                yield (
                    [
                        Refused(f"{readable(path)}#{n}", "undecodable", detail)
                        for n in range(row, end)
                    ],
                    None,
                )


def _rows(
    table: pa.Table, path: str, first: int, own: bool, image_column: str, label_column: str
) -> list[Item]:
    images = image_array(table.column(image_column))
    labels: list[int | None] = [None] * len(images)
    if label_column in table.column_names:
        column = table.column(label_column).cast(pa.int64())
        # Hub data sets mark images without a class by -1.
        labels = pc.if_else(pc.greater_equal(column, 0), column, None).to_pylist()
    if own:
        sources = table.column("source").to_pylist()
    else:
        sources = [f"{path}#{first + i}" for i in range(len(images))]
    return [
        Item(source, image.as_py() or b"", None, label)
        for source, image, label in zip(sources, images, labels, strict=True)
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
