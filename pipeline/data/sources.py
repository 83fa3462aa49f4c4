"""Lists a source of images and cuts it into reading tasks; both depend on the source alone.

A source is a folder of any depth, a file, or `folder/pattern*`. In it, `.parquet` files are sets of
images, `.tar`, `.tar.gz` and `.tgz` are archives, and every other file is tried as an image. Hidden
files (a part of the path starts with a dot) and the marks of this project are left out.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.data.columns import (
    IMAGE_SHARD_SCHEMA,
    MANIFEST,
    check_columns,
    class_names_of,
    is_ours,
)
from pipeline.data.storage import file_info, list_files, public_uri, resolve_uri
from pipeline.data.transfer import open_patiently
from pipeline.errors import DataError, StorageError

TASK_BYTES = 64 * 2**20  # of source in one task: small enough for a small machine and for a retry
TASK_FILES = 1000
ARCHIVES = (".tar", ".tar.gz", ".tgz")
_MARKS = (MANIFEST, "_done.json")


@dataclass(frozen=True)
class Entry:
    """A file of the source: path under its root, bytes, last change (ns; 0 where unknown)."""

    path: str
    size: int
    stamp: int


@dataclass(frozen=True)
class Refused:
    """A file or row that gave no image: where, one of the documented reasons, what exactly."""

    source: str
    reason: str
    detail: str
    image_id: str | None = None


@dataclass(frozen=True)
class Listing:
    """What is in a source: files sorted by path, links that were not followed."""

    root: str
    entries: tuple[Entry, ...]
    refused: tuple[Refused, ...]
    hidden: int
    packed: bool  # a pack of this project, finished


@dataclass(frozen=True)
class Task:
    """Part of a source for one reading task: some files, one archive, or row groups of one file."""

    kind: str  # "files", "tar", "parquet"
    paths: tuple[str, ...]
    row_groups: tuple[int, ...] = ()
    names: int = -1  # which of `Plan.name_lists` the labels of the file count in
    own: bool = False  # the file is a shard of this project


@dataclass(frozen=True)
class Plan:
    """All tasks, the lists of class names in parquet files, and the extra columns of the output."""

    tasks: tuple[Task, ...]
    refused: tuple[Refused, ...]
    name_lists: tuple[tuple[str, ...], ...]
    extras: pa.Schema


def readable(path: str) -> str:
    """A path as text: bytes that are no UTF-8 are written as backslash escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def list_source(uri: str) -> Listing:
    """List a source: sorted, links that leave it and things that are no files listed as refused.

    Raises:
        DataError: there is no such path, or no file in it.
    """
    fs, path = resolve_uri(uri)
    local = isinstance(fs, pafs.LocalFileSystem)
    folder, _, pattern = path.rpartition("/")
    info = file_info(fs, path, tries=3)
    if info.type == pafs.FileType.NotFound and "*" in pattern:
        found = _walk_local(folder, pattern) if local else _walk_remote(fs, folder, pattern)
        root = folder
    elif info.type == pafs.FileType.NotFound:
        raise DataError(
            f"no such path: {public_uri(uri)}", hint="check data.source (and the mount)."
        )
    elif info.type == pafs.FileType.File:
        root, found = folder, iter([Entry(pattern, info.size, info.mtime_ns or 0)])
    else:
        root, found = path, _walk_local(path) if local else _walk_remote(fs, path)
    entries: list[Entry] = []
    refused: list[Refused] = []
    hidden, packed = 0, False
    for item in found:
        relative = item.path if isinstance(item, Entry) else item.source
        if any(part.startswith(".") for part in relative.split("/")):
            hidden += 1
        elif isinstance(item, Refused):
            refused.append(item)
        elif relative.rpartition("/")[2] in _MARKS:
            packed |= relative == MANIFEST
        else:
            entries.append(item)
    if not entries and not refused:
        raise DataError(
            f"no files under {public_uri(uri)}"
            + (f" ({hidden} hidden ones are left out)" if hidden else ""),
            hint="data.source is a folder of images, tar files or parquet files.",
        )
    entries.sort(key=lambda entry: os.fsencode(entry.path))
    refused.sort(key=lambda item: item.source)
    return Listing(root, tuple(entries), tuple(refused), hidden, packed)


def _walk_local(root: str, pattern: str = "") -> Iterator[Entry | Refused]:
    """Files under a folder; no link is followed that leads out of it or to another folder."""
    real_root = Path(root).resolve()
    if not real_root.is_dir():
        raise DataError(f"no such path: {root}", hint="check data.source (and the mount).")
    waiting = [root]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for item in found:
                relative = os.path.relpath(item.path, root)
                if pattern and not fnmatch.fnmatchcase(item.name, pattern):
                    continue
                if item.is_dir(follow_symlinks=False):
                    waiting += [] if pattern else [item.path]
                    continue
                if item.is_symlink():
                    target = _target(item.path)
                    if target is None or not target.is_file():
                        yield Refused(readable(relative), "link", "link to a folder, or broken")
                        continue
                    if not target.is_relative_to(real_root):
                        yield Refused(readable(relative), "link", "leads out of the source")
                        continue
                about = item.stat()
                if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
                    yield Refused(readable(relative), "not_an_image", "not a regular file")
                    continue
                yield Entry(relative, about.st_size, about.st_mtime_ns)


def _target(link: str) -> Path | None:
    """Where a link leads in the end; None where links form a circle."""
    try:
        return Path(link).resolve()
    except (OSError, RuntimeError):  # RuntimeError up to Python 3.12
        return None


def _walk_remote(fs: pafs.FileSystem, root: str, pattern: str = "") -> Iterator[Entry | Refused]:
    for info in list_files(fs, root, recursive=not pattern, missing=False):
        if fnmatch.fnmatchcase(info.base_name, pattern or "*"):
            yield Entry(info.path[len(root) :].lstrip("/"), info.size, info.mtime_ns or 0)


def plan_tasks(
    uri: str, listing: Listing, image_column: str, label_column: str, max_image_bytes: int
) -> Plan:
    """Cut a listing into tasks; footers of parquet files are read here.

    Raises:
        DataError: a parquet file without usable columns, an unfinished pack, or extra columns of
            the same name that do not fit together.
    """
    fs, _ = resolve_uri(uri)
    tables = [e for e in listing.entries if e.path.endswith(".parquet")]
    with ThreadPoolExecutor(8) as pool:  # remote footers are a round trip each
        footers = list(pool.map(lambda e: _footer(fs, f"{listing.root}/{e.path}"), tables))
    refused = list(listing.refused)
    tasks: list[Task] = []
    name_lists: list[tuple[str, ...]] = []
    schemas: list[pa.Schema] = []
    for entry, footer in zip(tables, footers, strict=True):
        if isinstance(footer, str):
            refused.append(Refused(readable(entry.path), "undecodable", footer))
            continue
        own = is_ours(footer[0])
        if own and not listing.packed and len(listing.entries) > 1:
            raise DataError(
                f"{public_uri(uri)} holds packed shards but no {MANIFEST}: "
                "packing was not finished",
                hint="finish that pack first, or name the files as folder/part-*.parquet.",
            )
        columns = ("image", "label") if own else (image_column, label_column)
        check_columns(footer[0], entry.path, *columns)
        schemas.append(pa.schema([f for _, f in extra_fields(footer[0], *columns, own=own)]))
        names = class_names_of(footer[0], columns[1])
        if names and names not in name_lists:
            name_lists.append(names)
        index = name_lists.index(names) if names else -1
        for groups in _row_group_runs(footer[1]):
            tasks.append(Task("parquet", (entry.path,), groups, index, own))
    batch: list[str] = []
    size = 0
    for entry in listing.entries:
        if entry.path.endswith(".parquet"):
            continue
        if entry.path.endswith(ARCHIVES):
            tasks.append(Task("tar", (entry.path,)))
        elif entry.size > max_image_bytes:
            detail = f"{entry.size} bytes, at most {max_image_bytes} are read"
            refused.append(Refused(readable(entry.path), "too_large", detail))
        else:
            if batch and (size + entry.size > TASK_BYTES or len(batch) >= TASK_FILES):
                tasks.append(Task("files", tuple(batch)))
                batch, size = [], 0
            batch.append(entry.path)
            size += entry.size
    if batch:
        tasks.append(Task("files", tuple(batch)))
    return Plan(tuple(tasks), tuple(refused), tuple(name_lists), _join(uri, schemas))


def _footer(fs: pafs.FileSystem, path: str) -> tuple[pa.Schema, pq.FileMetaData] | str:
    try:
        with open_patiently(fs, path) as file, pq.ParquetFile(file) as parquet:
            return parquet.schema_arrow, parquet.metadata
    except StorageError:
        raise
    except (pa.ArrowException, OSError) as error:
        return f"not a readable parquet file: {str(error).splitlines()[0]}"[:200]


def _row_group_runs(meta: pq.FileMetaData) -> Iterator[tuple[int, ...]]:
    groups: list[int] = []
    size = 0
    for group in range(meta.num_row_groups):
        groups.append(group)
        size += meta.row_group(group).total_byte_size
        if size >= TASK_BYTES:
            yield tuple(groups)
            groups, size = [], 0
    if groups:
        yield tuple(groups)


def extra_fields(
    schema: pa.Schema, image_column: str, label_column: str, *, own: bool
) -> list[tuple[str, pa.Field]]:
    """Columns of a source file that are kept: (name there, field in the shards).

    A foreign column with a name of ours (`width`, `source`, ...) is kept as `original_<name>`.
    """
    kept = []
    for field in schema:
        taken = field.name in IMAGE_SHARD_SCHEMA.names
        if field.name in (image_column, label_column) or (own and taken):
            continue
        name = f"original_{field.name}" if taken else field.name
        kept.append((field.name, field.with_name(name).with_nullable(True).remove_metadata()))
    return kept


def _join(uri: str, schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        joined = pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the parquet files under {public_uri(uri)} disagree: {str(error).splitlines()[0]}",
            hint="pack them apart, or give the column one type.",
        ) from error
    return pa.schema(sorted(joined, key=lambda field: str(field.name)))
