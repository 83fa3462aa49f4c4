"""Vectors on disk: a folder of parquet parts that any program reads, and what they are of.

A folder `vectors/` holds `part-00000.parquet` and so on, and `_vectors.json`, written last.
Both have the same facts; in the parts they stand in the schema's metadata under `raydino`.

Shapes: n images, D width, P patches, b blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.embed.forward import dtype_of, shape_of
from pipeline.embed.ids import Ids, id_bytes
from pipeline.embed.image_reader import ImageReader
from pipeline.embed.moved import beside
from pipeline.errors import DataError
from pipeline.shards.columns import METADATA_KEY
from pipeline.shards.shard_set import ShardSet, open_parquet
from pipeline.shards.shards import open_shards
from pipeline.storage.places import absolute_uri, exists, resolve_uri
from pipeline.storage.transfer import read_json, read_mark
from pipeline.uri import public

if TYPE_CHECKING:
    from pipeline.evaluate.features import LabelledFeatures

MARK = "_vectors.json"
VERSION = 1
NEEDED = {"parts", "key", "dim", "outputs", "blocks", "grid", "channels", "shards"}  # of any table
PART_KEY = b"raydino.part"  # of one part: its unit and its bad images
_FILES = 16  # that are read at once

Facts = dict[str, Any]
Array = np.ndarray[Any, Any]


def part_name(number: int) -> str:
    """The file of a unit of work."""
    return f"part-{number:05}.parquet"


def schema_of(facts: Mapping[str, Any]) -> pa.Schema:
    """The columns of a part: fixed-size lists, as pandas, torch, faiss, DuckDB and Lance take them.

    Args:
        facts: `outputs`, `dim`, `blocks`, `grid` and `dtype` count.
    """

    def kind(output: str) -> pa.DataType:
        half = facts["dtype"] == "float16" or dtype_of(output) == np.float16
        return pa.list_(pa.float16() if half else pa.float32(), math.prod(shape_in(facts, output)))

    fields = [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("label", pa.int64()),  # null where unknown
        pa.field("row", pa.int64(), nullable=False),  # of the image in its shards
        *(pa.field(name, kind(name), nullable=False) for name in facts["outputs"]),
    ]
    return pa.schema(fields, {METADATA_KEY: json.dumps(facts, ensure_ascii=False).encode()})


def shape_in(facts: Mapping[str, Any], output: str) -> tuple[int, ...]:
    """The shape of an output of one image in a table, see `forward.shape_of`."""
    return shape_of(output, facts["dim"], facts["grid"], facts["blocks"], facts["channels"])


def list_column(vectors: Array, kind: pa.DataType) -> pa.FixedSizeListArray:
    """An array [n, ...] as a column of lists of the type.

    Raises:
        DataError: values are too large for it.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(vectors.reshape(-1).astype(kind.value_type.to_pandas_dtype()))
    if not np.isfinite(values).all():
        raise DataError("vectors have values too large for float16", "set embed.dtype=float32")
    return pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), type=kind)


@dataclass(frozen=True)
class VectorSet:
    """A finished table of vectors; holds no open file, safe to send to a task.

    Attributes:
        uri: of the folder.
        parts: name and rows of each file, in order.
        facts: model, digest, image size, mean, std, class names, and the shards they are of.
    """

    uri: str
    parts: tuple[tuple[str, int], ...]
    facts: Facts

    def __hash__(self) -> int:
        return hash((self.uri, self.key))

    @property
    def key(self) -> str:
        """Changes with the model, the images and all settings that the vectors depend on."""
        return str(self.facts["key"])

    @property
    def rows(self) -> int:
        """n, the images in it."""
        return sum(rows for _, rows in self.parts)

    @property
    def dim(self) -> int:
        """D of its `cls`."""
        return int(self.facts["dim"])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Its columns of vectors."""
        return tuple(self.facts["outputs"])

    def ids(self) -> Array:
        """Image ids, str [n], 32 hex digits each."""
        return id_bytes(self._column("image_id")).astype("U32")

    def labels(self) -> Array:
        """Labels int64 [n]; -1 where unknown."""
        return np.array(self._column("label").fill_null(-1).to_numpy(), np.int64)

    def sources(self) -> Array:
        """Where each image is from, str [n] as objects."""
        return np.asarray(self._column("source").to_pylist(), object)

    def places(self) -> Array:
        """The row of each image in its shards, int64 [n]."""
        return np.array(self._column("row").to_numpy(), np.int64)

    def read(self, output: str = "cls", rows: slice | None = None) -> Array:
        """Vectors of all images, or of a slice of them.

        Returns:
            float32 [n, D] of `cls`, `mean`, `pixels` and `colours`, float32 [n, b, D] of `blocks`,
            float16 [n, P, D] of `patches`.

        Raises:
            DataError: they were not asked for when the images were embedded.
        """
        self._check(output)
        parts = [part for part, _ in self._parts([output], rows or slice(None))]
        return np.concatenate([self._array(part, output) for part in parts] or [self._none(output)])

    def blocks(self, rows: int = 65_536, output: str = "cls") -> Iterator[tuple[Array, Array]]:
        """Vectors as `read` gives them, at most so many at a time, each with the ids of its images.

        Blocks never cross a part.
        """
        self._check(output)
        for part, _ in self._parts([output, "image_id"], slice(None)):
            for at in range(0, len(part), rows):
                block = part.slice(at, rows)
                ids = np.asarray(block.column("image_id").to_numpy(), "U32")
                yield self._array(block, output), ids

    def shards(self) -> ShardSet:
        """The images that the vectors are of: where they were, or beside the vectors, if the folder
        of the run was moved.

        Raises:
            DataError: they are not there, or are others by now.
        """
        about = self.facts["shards"]
        columns = (about["image_column"], about["label_column"], "vectors", about["labels"])
        refused: list[DataError] = []
        for place in (about["uri"], *beside(self.uri, about["uri"])):
            try:
                shards = open_shards(place, *columns)
            except DataError as error:
                refused.append(error)
                continue
            if shards.digest == about["digest"]:
                return shards
            refused.append(
                DataError(
                    f"the images in {public(place)} have changed since they were embedded",
                    "embed them again with the same command",
                )
            )
        raise refused[0]  # of the place that the table names

    def images(self) -> ImageReader:
        """A reader of the encoded images by their ids.

        Raises:
            DataError: as `shards`.
        """
        shards, table = self.shards(), self.columns("image_id", "row")
        places = np.array(table["row"].to_numpy(), np.int64)
        return ImageReader(shards, Ids(id_bytes(table["image_id"])), places)

    def columns(self, *names: str) -> pa.Table:
        """Some columns of all images, in one pass through the files, several at once."""

        def read(part: tuple[str, int]) -> list[pa.Table]:
            parts = replace(self, parts=(part,))._parts(names, slice(None))
            return [table.select(list(names)) for table, _ in parts]

        with ThreadPoolExecutor(_FILES) as pool:
            tables = [table for tables in pool.map(read, self.parts) for table in tables]
        return pa.concat_tables(tables or [schema_of(self.facts).empty_table().select(list(names))])

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.columns(name)[name]

    def _parts(self, columns: Sequence[str], rows: slice) -> Iterator[tuple[pa.Table, int]]:
        """The asked-for rows of each part, with the number of the first."""
        start, stop, _ = rows.indices(self.rows)
        fs, folder = resolve_uri(self.uri)
        first = 0
        for name, count in self.parts:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                with open_parquet(fs, f"{folder}/{name}", piecewise=True, verify=True) as parquet:
                    self._check_part(name, count, parquet)
                    table = self._read_part(name, parquet, columns)
                yield table.slice(low, high - low), first + low
            first += count

    def _read_part(self, name: str, parquet: pq.ParquetFile, columns: Sequence[str]) -> pa.Table:
        try:
            return parquet.read(columns=list(columns))
        except OSError as error:
            if "crc" not in str(error).lower():
                raise
            raise DataError(
                f"{public(self.uri)}/{name} is damaged: its values are not those that were written",
                "delete that file and embed the images again with the same command",
            ) from error

    def _check_part(self, name: str, count: int, parquet: pq.ParquetFile) -> None:
        """Refuses a part that took the place of the one which this table was opened with."""
        about = json.loads((parquet.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        if about.get("key") != self.key:
            raise DataError(
                f"{public(self.uri)}/{name} is of other vectors (of {about.get('model')}) than "
                f"this table ({self.facts['model']}) had when it was opened",
                "a job makes it anew: wait until that is done and open it again",
            )
        if parquet.metadata.num_rows != count:
            raise DataError(
                f"{public(self.uri)}/{name} has {parquet.metadata.num_rows} rows, {count} were "
                "written",
                "embed the images again with the same command",
            )

    def _check(self, output: str) -> None:
        if output not in self.outputs:
            raise DataError(
                f"{public(self.uri)} holds {', '.join(self.outputs)}, no {output}",
                f"embed the images with embed.outputs=[{','.join((*self.outputs, output))}]",
            )

    def _array(self, table: pa.Table, output: str) -> Array:
        chunks = [chunk.flatten() for chunk in table.column(output).chunks]
        flat = np.concatenate([np.asarray(chunk) for chunk in chunks]) if chunks else np.zeros(0)
        shape = shape_in(self.facts, output)
        return flat.astype(dtype_of(output), copy=False).reshape(len(table), *shape)

    def _none(self, output: str) -> Array:
        return np.zeros((0, *shape_in(self.facts, output)), dtype_of(output))


def open_vectors(uri: str, field: str = "vectors") -> VectorSet:
    """The vectors in a folder.

    Args:
        uri: a path or URI, of the folder or of a run that has one.
        field: of the config that named the place.

    Raises:
        DataError: there are none, or embedding was not finished.
    """
    place = absolute_uri(str(uri))
    fs, path = resolve_uri(place)
    facts = read_json(fs, f"{path}/{MARK}")
    if facts is None and (facts := read_json(fs, f"{path}/vectors/{MARK}")) is not None:
        place, path = f"{place.rstrip('/')}/vectors", f"{path}/vectors"
    if facts is None:
        raise DataError(
            f"{field}={public(uri)}: there are no finished vectors, for there is no {MARK}",
            "make them: python jobs/embed.py model=runs/<name> data.source=photos/; the same "
            "command goes on where one was stopped",
        )
    ours = isinstance(facts, dict) and facts.get("version") == VERSION
    if not ours or not facts.keys() >= NEEDED:
        raise DataError(
            f"{field}={public(uri)}: {MARK} is none of this version", "embed the images again"
        )
    parts = tuple((str(name), int(rows)) for name, rows in facts.pop("parts"))
    return VectorSet(place, parts, facts)


def is_vectors(uri: str) -> bool:
    """Whether a folder, or the run whose folder it is, holds finished vectors."""
    fs, path = resolve_uri(absolute_uri(str(uri)))
    marks = [f"{path}/{MARK}", f"{path}/vectors/{MARK}"]
    return any(exists(fs, mark) and bool(read_mark(fs, mark)) for mark in marks)


def labelled(vectors: VectorSet) -> LabelledFeatures:
    """The CLS vectors of a set in memory, with labels and ids, as an evaluation takes them."""
    import torch

    from pipeline.evaluate.features import LabelledFeatures

    table = vectors.columns("image_id", "label")
    labels = torch.from_numpy(np.array(table["label"].fill_null(-1).to_numpy(), np.int64))
    ids = Ids(id_bytes(table["image_id"])).digests()
    return LabelledFeatures(torch.from_numpy(vectors.read()), labels, ids)
