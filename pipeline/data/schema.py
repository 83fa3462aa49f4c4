"""Open and read image shards: packed by this project, or parquet files as a hub stores them.

The public face of the shard format; its parts are `columns` (what a shard is) and `storage`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.data.columns import (
    BAD_IMAGE_SCHEMA,
    IMAGE_SHARD_SCHEMA,
    MANIFEST,
    SCHEMA_VERSION,
    check_columns,
    class_names_of,
    image_id,
    is_ours,
    shard_metadata,
)
from pipeline.data.retry import with_retries
from pipeline.data.storage import absolute_uri, list_parquet, public_uri, resolve_uri
from pipeline.data.transfer import (
    atomic_path,
    parquet_writer_atomic,
    read_json,
    write_bytes_atomic,
    write_parquet_atomic,
)
from pipeline.errors import DataError, StorageError, one_line

__all__ = [
    "BAD_IMAGE_SCHEMA",
    "IMAGE_SHARD_SCHEMA",
    "MANIFEST",
    "SCHEMA_VERSION",
    "RowGroup",
    "ShardColumns",
    "ShardFile",
    "ShardSet",
    "absolute_uri",
    "atomic_path",
    "check_columns",
    "class_names_of",
    "image_array",
    "image_id",
    "is_ours",
    "list_parquet",
    "open_shards",
    "parquet_writer_atomic",
    "read_group",
    "read_row_group",
    "resolve_uri",
    "shard_metadata",
    "values_of",
    "write_bytes_atomic",
    "write_parquet_atomic",
]


@dataclass(frozen=True)
class ShardFile:
    """One parquet file: path in its file system, rows, rows of each row group, bytes."""

    path: str
    rows: int
    row_groups: tuple[int, ...]
    bytes: int

    @property
    def name(self) -> str:
        """The file name without its folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ShardSet:
    """A set of shards as a stage sees it. Small, holds no open file: safe to send to a task."""

    uri: str
    files: tuple[ShardFile, ...]
    rows: int
    class_names: tuple[str, ...]
    packed: bool  # written by this project: unique ids, rows ordered by id over all files
    digest: str
    image_column: str
    label_column: str
    has_labels: bool

    @property
    def image_bytes(self) -> float:
        """Mean size of an encoded image, by the sizes of the files."""
        return sum(file.bytes for file in self.files) / max(1, self.rows)

    @property
    def columns(self) -> ShardColumns:
        """The small part of this that a read task needs."""
        return ShardColumns(self.uri, self.image_column, self.label_column)

    def parquet(self, file_index: int) -> pq.ParquetFile:
        """Open one file, for a stage that reads other columns than `read_row_group` gives."""
        return _open_parquet(resolve_uri(self.uri)[0], self.files[file_index].path)


@dataclass(frozen=True)
class RowGroup:
    """B rows of a shard: image_ids uint8[B, 16], labels int64[B] (-1: none), images on demand.

    `sizes` int64[B, 2] are height and width of the decoded images, 0 where the file does not say.
    """

    images: pa.Array = field(repr=False)  # binary or large_binary
    image_ids: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    labels: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    sizes: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def encoded(self) -> list[memoryview]:
        """The encoded images where they lie; empty where the shard has null."""
        return values_of(self.images)

    def image(self, row: int) -> bytes:
        """The encoded image of a row; b"" where the shard has null."""
        return bytes(self.encoded[row])

    @property
    def hex_ids(self) -> list[str]:
        """The ids as the 32 hex digits that tables show."""
        return [bytes(value).hex() for value in self.image_ids]


def open_shards(uri: str, image_column: str = "image", label_column: str = "label") -> ShardSet:
    """Find the shards at `uri`: a folder (of any depth), one file, or `folder/train-*.parquet`.

    A folder that this project packed is opened by its manifest alone, which knows the columns; of
    other files the footers are read.

    Raises:
        DataError: no such path, no parquet file, packing not finished, a shard missing or cut, no
            image column, or columns of a type that cannot be used.
    """
    uri = absolute_uri(str(uri))
    fs, path = resolve_uri(uri)
    infos = list_parquet(fs, path, uri)
    if infos[0].path != path and "*" not in path:
        manifest = read_json(fs, f"{path}/{MANIFEST}")
        if manifest is not None:
            return shards_of_manifest(uri, path, manifest, infos)
    return _from_footers(uri, fs, path, infos, image_column, label_column)


def _open_parquet(fs: pafs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        return with_retries(f"reading {path}", lambda: pq.ParquetFile(fs.open_input_file(path)))
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}",
            hint="it may have been cut while it was copied: fetch it again or take it away.",
        ) from error


def shards_of_manifest(
    uri: str, path: str, manifest: dict[str, Any], infos: Sequence[pafs.FileInfo]
) -> ShardSet:
    """The set that a manifest describes.

    Args:
        uri: of the set.
        path: its folder in the file system.
        manifest: what `_manifest.json` holds.
        infos: the files that are there.

    Raises:
        DataError: another schema version, or a shard that is missing or of another size.
    """
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{public_uri(uri)} has schema version {manifest.get('schema_version')}, "
            f"this code reads {SCHEMA_VERSION}",
            hint="pack the images again, or use the version that wrote them.",
        )
    sizes = {info.path: info.size for info in infos}
    files = []
    for entry in manifest["files"]:
        name, size = entry["name"], entry["bytes"]
        found = sizes.get(f"{path}/{name}")
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(
                f"shard {name} of {public_uri(uri)} {state}",
                hint="copy the folder again, or pack again: a second run writes what is missing.",
            )
        groups = tuple(int(rows) for rows in entry["row_groups"])
        files.append(ShardFile(f"{path}/{name}", int(entry["rows"]), groups, int(size)))
    return ShardSet(
        uri=uri,
        files=tuple(files),
        rows=sum(file.rows for file in files),
        class_names=tuple(manifest["class_names"]),
        packed=True,
        digest=str(manifest["digest"]),
        image_column="image",
        label_column="label",
        has_labels=int(manifest["labelled"]) > 0,
    )


def _from_footers(
    uri: str,
    fs: pafs.FileSystem,
    path: str,
    infos: Sequence[pafs.FileInfo],
    image_column: str,
    label_column: str,
) -> ShardSet:
    def footer(info: pafs.FileInfo) -> tuple[ShardFile, pa.Schema, bool]:
        with _open_parquet(fs, info.path) as parquet:
            meta, schema = parquet.metadata, parquet.schema_arrow
            check_columns(schema, info.base_name, image_column, label_column)
            groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
            labelled = label_column in schema.names and _any_value(meta, label_column)
        return ShardFile(info.path, meta.num_rows, groups, info.size), schema, labelled

    with ThreadPoolExecutor(8) as pool:  # footers of remote files are a round trip each
        found = list(pool.map(footer, infos))
    ours = [is_ours(schema) for _, schema, _ in found]
    whole = len(infos) > 1 or infos[0].path != path
    if any(ours) and whole and "*" not in path:
        raise DataError(
            f"{public_uri(uri)} holds packed shards but no {MANIFEST}: packing was not finished",
            hint="run the same pack again; it goes on where it stopped.",
        )
    names = {class_names_of(schema, label_column) for _, schema, _ in found} - {()}
    if len(names) > 1:
        raise DataError(
            f"the files under {public_uri(uri)} have different class names",
            hint="pack them into one set first: python jobs/pack.py data.source="
            f"{public_uri(uri)} data.shards=shards/",
        )
    digest = hashlib.blake2b(digest_size=16)
    for file, _, _ in found:
        digest.update(f"{file.name}\0{file.bytes}\0{file.rows}\n".encode())
    return ShardSet(
        uri=uri,
        files=tuple(file for file, _, _ in found),
        rows=sum(file.rows for file, _, _ in found),
        class_names=next(iter(names), ()),
        packed=all(ours),
        digest=digest.hexdigest(),
        image_column=image_column,
        label_column=label_column,
        has_labels=any(labelled for _, _, labelled in found),
    )


def _any_value(meta: pq.FileMetaData, column: str) -> bool:
    """Whether a column has a value that is not null, by the footer; True where it does not say."""
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    if column not in paths:
        return False
    for group in range(meta.num_row_groups):
        chunk = meta.row_group(group).column(paths.index(column))
        stats = chunk.statistics
        if stats is None or not stats.has_null_count or stats.null_count < chunk.num_values:
            return True
    return False


def image_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """The encoded images of a column of either form as one array, binary or large_binary."""
    array = column
    if isinstance(column, pa.ChunkedArray):
        # `combine_chunks` copies even a single chunk, here all images of a row group.
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what combine_chunks gives for more than 2 GiB
        array = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in array.chunks])
    if pa.types.is_struct(array.type):
        # `field` does not look at the nulls of the struct itself, `flatten` does.
        array = array.flatten()[array.type.get_field_index("bytes")]
    plain = pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)
    return array if plain else array.cast(pa.large_binary())


def values_of(array: pa.Array) -> list[memoryview]:
    """The values of a binary or large_binary array where they lie (a scalar would be a copy); a
    null has no bytes.
    """
    _, starts, data = array.buffers()
    wide = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    ends = np.frombuffer(starts, wide)[array.offset : array.offset + len(array) + 1].tolist()
    view = memoryview(data if data is not None else b"")
    found = [view[a:b] for a, b in pairwise(ends)]
    for row in np.flatnonzero(array.is_null()) if array.null_count else ():
        found[row] = view[:0]
    return found


@dataclass(frozen=True)
class ShardColumns:
    """Where a set's files are and which of their columns are read: all that a read task needs."""

    uri: str
    image: str
    label: str


def read_row_group(shards: ShardSet, file_index: int, row_group: int) -> RowGroup:
    """Read one row group: encoded images, ids, labels and sizes."""
    return read_group(shards.columns, shards.files[file_index].path, row_group)


def read_group(columns: ShardColumns, path: str, row_group: int) -> RowGroup:
    """Read one row group of the file at `path` (in the file system of `columns.uri`).

    Ids and sizes are taken from files of this project; elsewhere ids are computed, whatever a
    column `image_id` says (COCO has one, of numbers).

    Raises:
        DataError: the file is not readable as parquet, or the storage failed after all tries.
    """
    try:
        table, own, labelled = with_retries(
            f"reading row group {row_group} of {path}",
            lambda: _read_columns(columns, path, row_group),
        )
    except DataError:  # a sentence already; storage's is one
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"row group {row_group} of {path} cannot be read: {one_line(error)}",
            hint="the file is damaged: fetch it again, or pack again.",
        ) from error
    images = image_array(table.column(columns.image))
    sizes = np.zeros((len(images), 2), np.int64)
    if own:
        ids = table.column("image_id").to_pylist()
        for axis, name in enumerate(("height", "width")):
            sizes[:, axis] = table.column(name).to_numpy()
    else:
        ids = [image_id(item.as_py() or b"") for item in images]
    if labelled:
        labels = table.column(columns.label).cast(pa.int64()).fill_null(-1).to_numpy()
    else:
        labels = np.full(len(images), -1, np.int64)
    # From a bytearray: an array over bytes would be read-only, which torch warns about.
    packed = np.frombuffer(bytearray.fromhex("".join(ids)), np.uint8).reshape(-1, 16)
    return RowGroup(images, packed, labels, sizes)


def _read_columns(columns: ShardColumns, path: str, row_group: int) -> tuple[pa.Table, bool, bool]:
    """The columns that a `RowGroup` needs; whether the file is ours, and has labels."""
    with _open_parquet(resolve_uri(columns.uri)[0], path) as parquet:
        schema = parquet.schema_arrow
        own = is_ours(schema)
        labelled = columns.label in schema.names
        names = [columns.image, *["image_id", "height", "width"] * own]
        table = parquet.read_row_group(row_group, columns=[*names, *[columns.label] * labelled])
    return table, own, labelled
