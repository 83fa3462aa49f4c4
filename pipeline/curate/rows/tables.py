"""The tables of the curation: what each file holds, and the input files with their rows.

Images are numbered: `row` is the place of an image in the inputs, counted over their files in
order. Rows name images between steps, because a number is small. What is decided depends on
`image_id` alone, so that another order of the files changes nothing.

Step files are called after the input file whose rows they hold (`00012.parquet`), except where a
step shuffles rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DataError, one_line
from pipeline.images.value_range import FULL
from pipeline.shards.shards import ShardColumns, ShardFile, ShardSet
from pipeline.storage.places import resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import atomic_path
from pipeline.uri import join, public

ID = pa.binary(16)  # an image id, as bytes
ROW = pa.int64()
HALF = np.dtype(np.float16)

POOL, AS_IS = "pool", "as_is"  # what an input set is
REASONS = (
    "kept",
    "undecodable",
    "too_small",
    "aspect",
    "flat",
    "duplicate_bytes",
    "duplicate_near",
    "leaks_evaluation",
    "not_retrieved",
    "balanced_out",
)

PARTS = ("as_is", "sample", "cluster", "balanced", "pool")  # why an image is kept

# fingerprint/NNNNN.parquet, one row per input row, in order
FINGERPRINT = pa.schema(
    [
        ("row", ROW),
        ("image_id", ID),
        ("source", pa.string()),  # path or URL that the image came from; "" where unknown
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("error", pa.string()),  # reason why it cannot be decoded, or ""
        ("pixel_hash", ID),  # of size and decoded pixels; zeros where it cannot be decoded
        ("brightness_p05", pa.float32()),  # luminance, 0 to 255
        ("brightness_p50", pa.float32()),
        ("brightness_p95", pa.float32()),
        ("contrast", pa.float32()),  # standard deviation of the luminance
        ("entropy", pa.float32()),  # of the luminance histogram, bits, 0 to 8
        ("sharpness", pa.float32()),  # variance of the Laplacian at a fixed size; 0 of noise
        ("edges", pa.float32()),  # cells of 128 x 128 with a clear edge
        ("saturation", pa.float32()),  # mean, 0 to 1
        ("descriptor", pa.list_(pa.float16(), 143)),  # unit length
        ("views", pa.list_(pa.float16(), 9 * 143)),  # of nine crops
        ("thumbnail", pa.binary()),  # JPEG, longest side 96 pixels
    ]
)
# quality/NNNNN.parquet, one row per input row, in order
QUALITY = pa.schema(
    [
        ("row", ROW),
        ("reason", pa.string()),  # of REASONS, or "" where it passes
        ("rule", pa.string()),  # field of the config that it fails, or ""
        ("value", pa.float32()),  # what was measured
    ]
)
# exact/NNNNN.parquet, one row per input row that passes quality, in order
EXACT = pa.schema(
    [
        ("row", ROW),
        ("keeper", ROW),  # itself, or the row that is kept of all that are equal
        ("method", pa.string()),  # "", "bytes" or "pixels"
    ]
)
# edges/BBBBB.parquet: pairs above the lowest threshold; a maximum spanning forest of all pairs, so
# the components are right at every threshold above it
EDGES = pa.schema([("a", ROW), ("b", ROW), ("similarity", pa.float64())])
# components/NNNNN.parquet, rows of components of two or more, in order
COMPONENTS = pa.schema(
    [
        ("row", ROW),
        ("component", ID),  # its smallest image id
        ("size", pa.int64()),
        ("keeper", ROW),
        ("keeper_id", ID),
        ("similarity", pa.float64()),  # to the keeper; 1 for the keeper itself
        ("chained", pa.bool_()),  # too unlike the first keeper of its component
    ]
)
# leaks/NNNNN.parquet, rows that match an image of an evaluation set, in order; the best match
LEAKS = pa.schema(
    [
        ("row", ROW),
        ("set", pa.string()),
        ("query_id", ID),  # image of the evaluation set
        ("similarity", pa.float64()),
    ]
)
# retrieved/NNNNN.parquet, rows that a seed set asked for, in order
RETRIEVED = pa.schema(
    [
        ("row", ROW),
        ("part", pa.string()),  # sample or cluster
        ("set", pa.string()),  # seed set
        ("query_id", ID),  # its best seed image
        ("similarity", pa.float64()),
        ("rank", pa.int32()),  # among the seed's neighbours, from 0; -1 for cluster
        ("hits", pa.int32()),  # seed images that asked for it: collisions where above 1
        ("cluster", pa.int64()),  # -1 for sample
    ]
)
# balanced/NNNNN.parquet, rows that were considered, in order
BALANCED = pa.schema(
    [("row", ROW), ("leaf", pa.int64()), ("top", pa.int64()), ("chosen", pa.bool_())]
)
# decisions/NNNNN.parquet: one row per input row, in order. The first nine are the contract.
DECISIONS = pa.schema(
    [
        ("image_id", pa.string()),  # 32 hex
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("keeper_id", pa.string()),  # of duplicates
        ("similarity", pa.float32()),  # to the keeper or the query
        ("component", pa.string()),
        ("cluster", pa.int64()),
        ("query_id", pa.string()),  # image of an evaluation or seed set
        ("score", pa.float32()),  # what a quality rule measured
        # quality rule; bytes, pixels, near or earlier of a copy; a leak's or seed's set; mix.<part>
        ("rule", pa.string()),
        ("part", pa.string()),  # as_is, sample, cluster, balanced or pool: why it is kept
        ("source", pa.string()),  # which input, and the top folder in it
        ("hits", pa.int32()),  # seed images that asked for it
        ("row", ROW),
    ]
)


@dataclass(frozen=True)
class InputFile:
    """One shard among the inputs: which set it is of, its first row and where to read it."""

    index: int
    set: str
    kind: str  # POOL or AS_IS
    first: int
    file: ShardFile
    columns: ShardColumns
    digest: str = ""  # of all inputs

    @property
    def name(self) -> str:
        """What step files about it are called."""
        return f"{self.index:05d}"

    @property
    def key(self) -> str:
        """Changes with what is in it, and not with the place where it is."""
        return f"{self.digest}/{self.name}"

    @property
    def rows(self) -> int:
        """Images in it."""
        return self.file.rows

    @property
    def end(self) -> int:
        """The row after its last one."""
        return self.first + self.file.rows


@dataclass(frozen=True)
class Inputs:
    """All images that go in. Small enough to send to tasks, except with 100,000 files."""

    files: tuple[InputFile, ...]
    digest: str

    @classmethod
    def of(cls, sets: Sequence[tuple[str, str, ShardSet]]) -> Inputs:
        """From (name, kind, shards) of each set, in the order in which their rows count."""
        # The columns too: a digest of shards that were not packed here knows sizes alone.
        digest = "-".join(
            f"{name}:{kind}:{shards.digest}:{shards.image_column}:{shards.label_column}"
            + ("" if shards.columns.value_range == FULL else f":{shards.value_range}")
            for name, kind, shards in sets
        )
        files: list[InputFile] = []
        first, short = 0, fingerprint(digest)
        for name, kind, shards in sets:
            for file in shards.files:
                files.append(InputFile(len(files), name, kind, first, file, shards.columns, short))
                first += file.rows
        return cls(tuple(files), digest)

    @property
    def key(self) -> str:
        """Changes with what is in any of them."""
        return self.digest

    @property
    def by_name(self) -> dict[str, InputFile]:
        """The files, a task each."""
        return {file.name: file for file in self.files}

    @property
    def rows(self) -> int:
        """Images in all."""
        return self.files[-1].end if self.files else 0


@dataclass(frozen=True)
class Vectors:
    """Embedded rows: one parquet file per input file, `row`, `image_id` and unit vectors in half
    precision.

    Attributes:
        folder: of `NNNNN.parquet`.
        names: of the files, without `.parquet`.
        dim: width of a vector.
        column: `vector`, or `descriptor` where these are fingerprints.
        views: nine crops beside the vector (`views`); then mirrored vectors and crops count too.
        key: of the step that made them.
    """

    folder: str
    names: tuple[str, ...]
    dim: int
    key: str
    column: str = "vector"
    views: bool = False


def vector_schema(dim: int) -> pa.Schema:
    """Of an embedding file."""
    return pa.schema([("row", ROW), ("image_id", ID), ("vector", pa.list_(pa.float16(), dim))])


def write_table(table: pa.Table, folder: str, name: str, row_group_size: int = 65_536) -> int:
    """Writes `folder/name.parquet` whole or not at all, with checksums; returns its bytes."""
    with table_writer(table.schema, folder, name) as (writer, size):
        writer.write_table(table, row_group_size=row_group_size)
    return size()


@contextmanager
def table_writer(
    schema: pa.Schema, folder: str, name: str
) -> Iterator[tuple[pq.ParquetWriter, Callable[[], int]]]:
    """As `write_table`, piece by piece: a writer, and what tells the bytes of the closed file."""
    fs, path = resolve_uri(str(join(folder, f"{name}.parquet")))
    sizes: list[int] = []
    with atomic_path(fs, path) as temporary:
        with pq.ParquetWriter(
            temporary,
            schema,
            compression={
                n: "none" if _dense(schema.field(n).type) else "zstd" for n in schema.names
            },
            use_dictionary=[f.name for f in schema if pa.types.is_string(f.type)],
            write_statistics=[f.name for f in schema if pa.types.is_integer(f.type)],
            write_page_checksum=True,
        ) as writer:
            yield writer, lambda: sizes[0]
        sizes.append(Path(temporary).stat().st_size)


def _dense(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_binary(kind))


def read_table(
    folder: str, name: str, columns: Sequence[str] | None = None, filters: Any = None
) -> pa.Table:
    """Reads `folder/name.parquet`, checking its checksums.

    Raises:
        DataError: it is missing or damaged; names the file.
    """
    place = str(join(folder, f"{name}.parquet"))
    fs, path = resolve_uri(place)
    try:
        return pq.read_table(
            path,
            columns=list(columns) if columns is not None else None,
            filesystem=fs,
            filters=filters,
            page_checksum_verification=True,
            partitioning=None,
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{public(place)} cannot be read: {one_line(error)}",
            f"it is damaged or missing: delete the folder {public(folder)} and run again; "
            "everything else is reused",
        ) from error


def matrix(column: pa.ChunkedArray, width: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """A column of fixed-size lists as [rows, width], not copied where it is one chunk."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    values = array.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, HALF).reshape(-1, width)


def list_array(values: np.ndarray[Any, Any]) -> pa.FixedSizeListArray:
    """[rows, width] as a column of fixed-size lists, not copied where it is contiguous."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def id_array(ids: np.ndarray[Any, np.dtype[np.uint8]]) -> pa.Array:
    """uint8 [rows, 16] as a column of ids."""
    ids = np.ascontiguousarray(ids)
    return pa.FixedSizeBinaryArray.from_buffers(ID, len(ids), [None, pa.py_buffer(ids)])


def ids_of(column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A column of ids as uint8 [rows, 16]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], ID)
    buffer = array.buffers()[1]
    if buffer is None or not len(array):
        return np.zeros((0, 16), np.uint8)
    whole = np.frombuffer(buffer, np.uint8).reshape(-1, 16)
    return whole[array.offset : array.offset + len(array)]
