"""Get bytes in and out of storage: local paths and pyarrow URIs alike, every write whole or not."""

from __future__ import annotations

import fnmatch
import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError


def absolute_uri(uri: str) -> str:
    """The same place by a name that holds in any process: a local path is made absolute."""
    return uri if "://" in uri else str(Path(os.path.expandvars(uri)).expanduser().absolute())


@functools.lru_cache(maxsize=64)  # an S3 client asks for the region of its bucket when made
def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), uri
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(
            f"cannot open {uri}: {str(error).splitlines()[0]}",
            hint="use a local path or a URI that pyarrow reads, such as s3://bucket/folder.",
        ) from error
    return filesystem, path.rstrip("/") or "/"


def resolve_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a local path or URI, and the path in it.

    Raises:
        DataError: the URI names a scheme or bucket that cannot be opened.
    """
    return _filesystem(absolute_uri(str(uri)))


def list_parquet(fs: pafs.FileSystem, path: str, uri: str) -> list[pafs.FileInfo]:
    """The parquet files at a path, sorted; hidden files and folders are left out.

    Raises:
        DataError: there is no such path or no parquet file in it.
    """
    folder, _, pattern = path.rpartition("/")
    if "*" in pattern:
        infos = _files(fs, folder, uri, recursive=False)
        found = [i for i in infos if fnmatch.fnmatchcase(i.base_name, pattern)]
        root = folder
    else:
        infos = _files(fs, path, uri, recursive=True)
        found = [i for i in infos if i.base_name.endswith(".parquet") or i.path == path]
        root = path
    found = [i for i in found if not _hidden(i.path[len(root) :])]
    if not found:
        raise DataError(
            f"no parquet files under {uri}",
            hint=f"pack a folder of images first: python jobs/pack.py data.source={uri} "
            "data.shards=shards/",
        )
    return sorted(found, key=lambda info: str(info.path))


def _files(fs: pafs.FileSystem, path: str, uri: str, *, recursive: bool) -> list[pafs.FileInfo]:
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"no such path: {uri}", hint="check data.shards (and the mount).")
    if info.type == pafs.FileType.File:
        return [info]
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive))
    return [i for i in infos if i.type == pafs.FileType.File]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


@contextmanager
def atomic_path(fs: pafs.FileSystem, path: str) -> Iterator[str]:
    """Give a temporary path beside `path`; it takes the name at the end, or goes on an error."""
    folder, _, name = path.rpartition("/")
    fs.create_dir(folder or "/", recursive=True)
    # The leading dot keeps a file that a kill left behind out of every listing of ours.
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        if isinstance(fs, pafs.LocalFileSystem):
            with Path(temporary).open("rb") as written:
                os.fsync(written.fileno())
        fs.move(temporary, path)
    except BaseException:
        if fs.get_file_info(temporary).type == pafs.FileType.File:
            fs.delete_file(temporary)
        raise


def write_bytes_atomic(content: bytes, fs: pafs.FileSystem, path: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with atomic_path(fs, path) as temporary, fs.open_output_stream(temporary) as stream:
        stream.write(content)


@contextmanager
def parquet_writer_atomic(
    schema: pa.Schema, fs: pafs.FileSystem, path: str
) -> Iterator[pq.ParquetWriter]:
    """A parquet writer whose file is there whole at the end, or not at all.

    Columns of encoded images are not compressed a second time. The bytes depend on what is written
    and on the pyarrow version only.
    """
    images = {field.name for field in schema if pa.types.is_binary(field.type)}
    with (
        atomic_path(fs, path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            filesystem=fs,
            compression={name: "none" if name in images else "zstd" for name in schema.names},
            use_dictionary=[name for name in ("format", "label") if name in schema.names],
            # Statistics of image bytes would copy two whole images to the footer.
            write_statistics=[name for name in schema.names if name not in images],
        ) as writer,
    ):
        yield writer


def write_parquet_atomic(
    table: pa.Table, fs: pafs.FileSystem, path: str, row_group_size: int
) -> None:
    """Write a parquet file so that it is there whole or not at all; `row_group_size` in rows."""
    with parquet_writer_atomic(table.schema, fs, path) as writer:
        writer.write_table(table, row_group_size=row_group_size)
