"""A set of image shards: its files, columns, classes and ranges. How it is opened: `shards.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.value_range import FULL, ValueRange
from pipeline.storage.places import resolve_uri
from pipeline.storage.retry import with_retries
from pipeline.storage.transfer import open_patiently


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
class ShardColumns:
    """Where a set's files are and which of their columns are read: all that a read task needs.

    `names` are the classes where the label column holds names and no ids.
    """

    uri: str
    image: str
    label: str
    labels: bool = True  # False: the label column is not looked at
    names: tuple[str, ...] = ()
    value_range: ValueRange = FULL


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
    reads_labels: bool = True  # False: the label column is not looked at
    labels_are_names: bool = False  # the label column holds names and no ids
    value_range: ValueRange | None = None  # that its images are decoded with; None: not known
    used_range: ValueRange | None = None  # of values of deep images; None: none, or not known

    @property
    def image_bytes(self) -> float:
        """Mean size of an encoded image, by the sizes of the files."""
        return sum(file.bytes for file in self.files) / max(1, self.rows)

    @property
    def columns(self) -> ShardColumns:
        """The small part of this that a read task needs."""
        names = self.class_names if self.labels_are_names else ()
        return ShardColumns(
            self.uri,
            self.image_column,
            self.label_column,
            self.reads_labels,
            names,
            self.value_range or FULL,
        )

    def parquet(self, file_index: int) -> pq.ParquetFile:
        """Open one file, for a stage that reads other columns than `read_row_group` gives.

        Every read of a remote file is tried again where it fails.
        """
        return open_parquet(resolve_uri(self.uri)[0], self.files[file_index].path, piecewise=True)


def open_parquet(
    fs: pafs.FileSystem, path: str, piecewise: bool = False, verify: bool = False
) -> pq.ParquetFile:
    """Open one file.

    Args:
        fs: where it is.
        path: of the file.
        piecewise: each read is tried again where it fails. Without it a reader tries the whole call
            again, which lets Arrow read several columns of a remote file at once.
        verify: compare pages with their checksums, where the file has them; a read raises OSError.

    Raises:
        DataError: it is not readable as parquet.
    """
    # Arrow opens no local file whose name is not UTF-8, as files of others may have it.
    patient = piecewise and not (isinstance(fs, pafs.LocalFileSystem) and path.isascii())

    def opened() -> pq.ParquetFile:
        source = open_patiently(fs, path) if patient else fs.open_input_file(path)
        return pq.ParquetFile(source, page_checksum_verification=verify)

    try:
        return with_retries(f"reading {path}", opened)
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}",
            hint="it may have been cut while it was copied: fetch it again or take it away.",
        ) from error


def row_group_rows(meta: pq.FileMetaData) -> tuple[int, ...]:
    """Rows of each row group, by the footer."""
    return tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))


def column_chunks(meta: pq.FileMetaData, column: str) -> Iterator[pq.ColumnChunkMetaData]:
    """What the footer says of a column, a row group after the other; nothing if there is none."""
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    if column in paths:
        for group in range(meta.num_row_groups):
            yield meta.row_group(group).column(paths.index(column))
