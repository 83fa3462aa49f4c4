"""What is asked: files, ids, folders, parquet of images or vectors, each as vectors in batches.

An image whose bytes are in the set has its vector already. Any other is embedded by the model that
the set names, once it is sure that this is the same model with the same preprocessing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.embed.embedders import Embedder
from pipeline.embed.vectors import VectorSet, open_vectors
from pipeline.errors import DataError, StorageError, one_line
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import MAX_PIXELS, decode_image
from pipeline.images.kinds import is_table, named_as_image
from pipeline.images.value_range import FULL, from_json
from pipeline.search.model import model_of
from pipeline.search.search import Search
from pipeline.shards.columns import BAD_IMAGE_SCHEMA, image_id
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shard_set import open_parquet
from pipeline.shards.shards import open_shards
from pipeline.storage.places import absolute_uri, file_info, list_files, list_parquet, resolve_uri
from pipeline.storage.transfer import read_bytes
from pipeline.uri import public

FIELD = "search.query"
Array = np.ndarray[Any, Any]
BATCH = 256  # images that are in memory at once
NAMED = 5  # ids that a sentence lists
# what must be the same for vectors to be compared: of the facts, and in words
SAME = (
    ("digest", "model"),
    ("image_size", "image size"),
    ("mean", "mean"),
    ("std", "standard deviation"),
)
SHORTEST = 4  # letters of the beginning of an id


@dataclass(frozen=True)
class Reading:
    """How images are read, as the recipe says it."""

    image_column: str = "image"
    max_pixels: int = MAX_PIXELS
    batch_size: int = 64
    threads: int = 1
    model: str = ""  # where the set's model is by now; "": where the set says it was


@dataclass(frozen=True)
class Query:
    """One image that is asked for.

    Attributes:
        name: path, id or row, as answers call it.
        row: of the set, where it is in it; else -1.
        encoded: its bytes; b"" where it is a vector or a row.
        pixels: the image as the model takes it; None where its vector is known.
        vector: [D] of any length; None until it is known.
    """

    name: str
    row: int = -1
    encoded: bytes = field(default=b"", repr=False)
    pixels: Any = field(default=None, repr=False)
    vector: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class BadQuery:
    """A file of a folder that cannot be asked for."""

    source: str
    reason: str
    detail: str
    image_id: str | None = None


class Asker:
    """Turns what is asked into batches of queries with vectors.

    Args:
        vectors: the set.
        ids: of its images, str [N].
        search: among them.
        reading: how images are read.

    Attributes:
        bad: files of folders and parquet that are no usable images, in order.
    """

    def __init__(
        self, vectors: VectorSet, ids: Array, search: Search, reading: Reading | None = None
    ) -> None:
        self.vectors, self.ids, self.search = vectors, ids, search
        self.reading = reading or Reading()
        self.bad: list[BadQuery] = []
        order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[order], order

    def batches(self, texts: Sequence[str]) -> Iterator[list[Query]]:
        """All queries, in order, with their vectors.

        Raises:
            PipelineError: something is not there, is ambiguous, or cannot be read.
        """
        waiting: list[Query] = []
        for text in texts:
            for query in self._of(text):
                waiting.append(query)
                if len(waiting) == BATCH:
                    yield self._with_vectors(waiting)
                    waiting = []
        if waiting:
            yield self._with_vectors(waiting)

    # ---- What a text means.

    def _of(self, text: str) -> Iterator[Query]:
        place = absolute_uri(text)
        kind = _kind(text)
        if kind == pafs.FileType.NotFound:
            yield self._id(text)
            return
        fs, path = resolve_uri(place)
        if kind == pafs.FileType.Directory:
            yield from self._folder(text, place, fs, path)
        elif is_table(path):
            yield from self._table(text, place)
        else:
            yield self._image(text, _bytes(text, fs, path), alone=True)

    def _id(self, text: str) -> Query:
        rows = np.arange(0)
        if len(text) >= SHORTEST:
            ids, order = self._sorted_ids
            first = int(np.searchsorted(ids, text))
            end = first
            while end < len(ids) and str(ids[end]).startswith(text):
                end += 1
            rows = order[first:end]
        if not len(rows):
            raise DataError(
                f"{FIELD}={public(text)}: there is no such file, and no image of the set has an id "
                "that begins so",
                f"give an image file, a folder, a parquet file, or an image id of "
                f"{public(self.vectors.uri)} (at least its first {SHORTEST} letters)",
            )
        if len(rows) > 1:
            names = ", ".join(str(self.ids[row]) for row in rows[:NAMED])
            more = f" and {len(rows) - NAMED:,} more" if len(rows) > NAMED else ""
            raise DataError(
                f"{FIELD}={text}: {len(rows):,} images have ids that begin so: {names}{more}",
                "give more letters of the id",
            )
        return Query(str(self.ids[rows[0]]), int(rows[0]))

    def _folder(self, text: str, place: str, fs: pafs.FileSystem, path: str) -> Iterator[Query]:
        infos = sorted(list_files(fs, path), key=lambda info: str(info.path))
        names = [str(info.path)[len(path) :].lstrip("/") for info in infos]
        if any(name in ("_vectors.json", "vectors/_vectors.json") for name in names):
            yield from self._vector_set(text)
        elif any(is_table(name) for name in names):
            yield from self._table(text, place)
        else:
            images = [name for name in names if named_as_image(name)]
            if not images:
                raise DataError(
                    f"{FIELD}={public(text)}: the folder holds no images",
                    "give a folder of images, of parquet files, or of vectors",
                )
            for name in images:
                shown = f"{text.rstrip('/')}/{name}"
                yield from self._usable(shown, _bytes(shown, fs, f"{path}/{name}"))

    def _table(self, text: str, place: str) -> Iterator[Query]:
        """Rows of parquet: vectors where it has a column of them, else images."""
        fs, path = resolve_uri(place)
        infos = list_parquet(fs, path, place, FIELD)
        schema = open_parquet(fs, infos[0].path).schema_arrow
        if self.search.column in schema.names and _is_list(schema.field(self.search.column).type):
            for info in infos:
                yield from self._rows(text, open_parquet(fs, info.path))
            return
        shards = open_shards(place, self.reading.image_column, "", FIELD, labels=False)
        for number, file in enumerate(shards.files):
            for group in range(len(file.row_groups)):
                rows = read_row_group(shards, number, group)
                for row, name in enumerate(rows.hex_ids):
                    yield from self._usable(name, rows.image(row))

    def _rows(self, text: str, file: Any) -> Iterator[Query]:
        named = "image_id" in file.schema_arrow.names
        row = 0
        for batch in file.iter_batches(BATCH, columns=[self.search.column, *["image_id"] * named]):
            values = batch.column(self.search.column)
            ids = batch.column("image_id").to_pylist() if named else []
            flat = np.asarray(values.flatten(), np.float32)
            if len(flat) != len(batch) * self.vectors.dim:
                raise DataError(
                    f"{FIELD}={public(text)}: its {self.search.column} has {len(flat):,} values in "
                    f"{len(batch):,} rows, expected {self.vectors.dim} in each",
                    "embed these images with the model of the set",
                )
            for vector in flat.reshape(len(batch), -1):
                name = str(ids[row % BATCH]) if named else f"row {row}"
                yield Query(name, self._row_of(name) if named else -1, vector=vector)
                row += 1

    def _vector_set(self, text: str) -> Iterator[Query]:
        """Another table of vectors, which must be of the same model."""
        asked = open_vectors(text, FIELD)
        for name, words in SAME:
            if asked.facts[name] != self.vectors.facts[name]:
                raise DataError(
                    f"{FIELD}={public(text)}: these vectors are of another {words} "
                    f"({asked.facts['model']}, {asked.facts[name]}) than those that are searched "
                    f"({self.vectors.facts['model']}, {self.vectors.facts[name]})",
                    "embed both with the same model",
                )
        for block, ids in asked.blocks(BATCH, self.search.column):
            for vector, name in zip(block, ids, strict=True):
                yield Query(str(name), self._row_of(str(name)), vector=vector)

    # ---- Images.

    def _image(self, name: str, encoded: bytes, alone: bool = False) -> Query:
        """An image with its row, or else with its vector still to be made.

        Raises:
            DataError: it is no usable image, and was asked for alone.
            BadImage: likewise, among others.
        """
        row = self._row_of(image_id(encoded))
        if row >= 0:
            return Query(name, row, encoded)
        try:
            return Query(name, -1, encoded, self._prepared(encoded))
        except BadImage as error:
            if not alone:
                raise
            raise DataError(
                f"{FIELD}={public(name)} is no usable image: {error.reason}", error.detail
            ) from error

    def _usable(self, name: str, encoded: bytes) -> Iterator[Query]:
        try:
            yield self._image(name, encoded)
        except BadImage as error:
            ids = image_id(encoded) if encoded else None
            self.bad.append(BadQuery(name, error.reason, error.detail, ids))

    def _prepared(self, encoded: bytes) -> Any:
        values = from_json(self.vectors.facts.get("value_range")) or FULL
        pixels = decode_image(encoded, self.embedder.channels, self.reading.max_pixels, values)
        return self.embedder.prepare(pixels)

    def _with_vectors(self, queries: list[Query]) -> list[Query]:
        """Rows of the set get its vectors, images are embedded."""
        known = [n for n, one in enumerate(queries) if one.vector is None and one.row >= 0]
        images = [n for n, one in enumerate(queries) if one.pixels is not None]
        vectors = {n: one.vector for n, one in enumerate(queries)}
        if known:
            rows = np.array([queries[n].row for n in known])
            vectors |= dict(zip(known, self.search.vectors_at(rows), strict=True))
        if images:
            outputs = self.embedder.outputs(
                [queries[n].pixels for n in images], (self.search.column,)
            )
            vectors |= dict(zip(images, outputs[self.search.column], strict=True))
        return [Query(q.name, q.row, q.encoded, None, vectors[n]) for n, q in enumerate(queries)]

    @cached_property
    def embedder(self) -> Embedder:
        """The model that made the vectors.

        Raises:
            DataError: it is not where it was, or is another by now.
        """
        reading = self.reading
        return model_of(self.vectors, reading.model, reading.batch_size, reading.threads)

    def _row_of(self, name: str) -> int:
        """The row of an image in the set; -1 where it is not in it."""
        ids, order = self._sorted_ids
        at = int(np.searchsorted(ids, name))
        return int(order[at]) if at < len(ids) and ids[at] == name else -1


def asked_for(query: str) -> list[str]:
    """The texts of `search.query`: several with commas between them, or a file with commas.

    Raises:
        DataError: nothing is asked.
    """
    text = query.strip()
    whole = bool(text) and _kind(text) != pafs.FileType.NotFound
    texts = [text] if whole else [part.strip() for part in text.split(",") if part.strip()]
    if not texts:
        raise DataError(
            "nothing is asked: search.query is empty",
            "query=photo.jpg, an image id, a folder of images, or a parquet file",
        )
    return texts


def bad_table(bad: Sequence[BadQuery]) -> pa.Table:
    """What cannot be asked for, as every stage lists bad images."""
    return pa.Table.from_pylist(
        [{**asdict(one), "stage": "search"} for one in bad], BAD_IMAGE_SCHEMA
    )


def _kind(text: str) -> pafs.FileType:
    """Whether a text names a file, a folder, or nothing that is there.

    Raises:
        StorageError: the storage failed, or refused.
    """
    try:
        return file_info(*resolve_uri(absolute_uri(text))).type
    except StorageError:
        raise
    except (OSError, ValueError):  # a name that is too long, or has a NUL: many ids with commas
        return pafs.FileType.NotFound


def _bytes(text: str, fs: pafs.FileSystem, path: str) -> bytes:
    try:
        return read_bytes(fs, path)
    except OSError as error:
        raise DataError(f"{FIELD}={public(text)} cannot be read: {one_line(error)}") from error


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )
