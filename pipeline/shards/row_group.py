"""One row group of a shard: encoded images, ids, labels and sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError, one_line
from pipeline.images.bad_image import check_id
from pipeline.shards.classes import label_ids
from pipeline.shards.columns import image_id, is_ours
from pipeline.shards.shard_set import ShardColumns, ShardSet, open_parquet
from pipeline.storage.places import resolve_uri
from pipeline.storage.retry import with_retries


@dataclass(frozen=True)
class RowGroup:
    """B rows of a shard: image_ids uint8[B, 16], labels int64[B] (-1: none), images on demand.

    `named` says that the ids were stored beside the images and not made of them just now.
    `sizes` int64[B, 2] are height and width of the decoded images, 0 where the file does not say.
    """

    images: pa.Array = field(repr=False)  # binary or large_binary
    image_ids: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    labels: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    sizes: np.ndarray[Any, np.dtype[np.int64]] = field(repr=False)
    named: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def encoded(self) -> list[memoryview]:
        """The encoded images where they lie; empty where the shard has null."""
        return values_of(self.images)

    def image(self, row: int) -> bytes:
        """The encoded image of a row; b"" where the shard has null."""
        return bytes(self.encoded[row])

    def checked(self, row: int) -> bytes:
        """The encoded image of a row; callers decode it.

        Raises:
            BadImage: a stored id is of other bytes.
        """
        encoded = self.image(row)
        if self.named:
            check_id(encoded, self.image_ids[row].tobytes())
        return encoded

    @property
    def hex_ids(self) -> list[str]:
        """The ids as the 32 hex digits that tables show."""
        return [bytes(value).hex() for value in self.image_ids]


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
        ids_of_labels = label_ids(table.column(columns.label), columns.names)
        labels = ids_of_labels.fill_null(-1).to_numpy()
    else:
        labels = np.full(len(images), -1, np.int64)
    # From a bytearray: an array over bytes would be read-only, which torch warns about.
    packed = np.frombuffer(bytearray.fromhex("".join(ids)), np.uint8).reshape(-1, 16)
    return RowGroup(images, packed, labels, sizes, named=own)


def read_sources(columns: ShardColumns, path: str, row_group: int) -> list[str]:
    """Path or URL of each image of a row group: the column `source` of packed shards, `path` beside
    the bytes of hub ones, else "".

    Args:
        columns: of the set.
        path: of the file, in the file system of `columns.uri`.
        row_group: its number.

    Raises:
        DataError: the file is not readable as parquet, or the storage failed after all tries.
    """

    def read() -> list[str | None]:
        with open_parquet(resolve_uri(columns.uri)[0], path) as parquet:
            schema = parquet.schema_arrow
            if is_ours(schema):
                return list(parquet.read_row_group(row_group, ["source"]).column(0).to_pylist())
            kind = schema.field(columns.image).type
            if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                # Of a struct this reads the one field; the bytes of the images stay where they are.
                column = parquet.read_row_group(row_group, [f"{columns.image}.path"]).column(0)
                return [value and value["path"] for value in column.to_pylist()]
            return [""] * parquet.metadata.row_group(row_group).num_rows

    return [source or "" for source in with_retries(f"reading {path}", read)]


def _read_columns(columns: ShardColumns, path: str, row_group: int) -> tuple[pa.Table, bool, bool]:
    """The columns that a `RowGroup` needs; whether the file is ours, and has labels."""
    with open_parquet(resolve_uri(columns.uri)[0], path) as parquet:
        schema = parquet.schema_arrow
        own = is_ours(schema)
        labelled = columns.labels and columns.label in schema.names
        names = [columns.image, *["image_id", "height", "width"] * own]
        table = parquet.read_row_group(row_group, columns=[*names, *[columns.label] * labelled])
    return table, own, labelled


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
    values = [view[a:b] for a, b in pairwise(ends)]
    for row in np.flatnonzero(array.is_null()) if array.null_count else ():
        values[row] = view[:0]
    return values
