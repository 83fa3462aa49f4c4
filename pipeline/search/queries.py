"""What is asked: files, ids, folders, parquet of images or vectors, each as vectors in batches.

An image whose bytes are in the set has its vector already. Any other is embedded by the model that
the set names, once it is sure that this is the same model with the same preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.embed.embedders import Embedder
from pipeline.embed.vectors import MARK, PART_KEY, VectorSet, open_vectors
from pipeline.errors import DataError, StorageError, one_line
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import MAX_PIXELS, decode_image
from pipeline.images.kinds import is_archive, is_table
from pipeline.images.value_range import FULL, from_json
from pipeline.pack import sources as pack
from pipeline.pack.items import Item, read_task
from pipeline.pack.listing import Refused, list_source
from pipeline.pack.patterns import is_pattern, split_list
from pipeline.pack.sources import plan_tasks
from pipeline.search.lists import is_list, vectors_in
from pipeline.search.model import model_of
from pipeline.search.rows import Rows
from pipeline.search.search import Search
from pipeline.shards.columns import BAD_IMAGE_SCHEMA, METADATA_KEY, image_id
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.places import absolute_uri, exists, file_info, list_files, resolve_uri
from pipeline.storage.transfer import read_bytes
from pipeline.uri import public

FIELD = "search.query"
BATCH = 256  # images that are in memory at once
NAMED = 5  # ids that a sentence lists
# what must be the same for vectors to be compared: of the facts, and in words
MUST_AGREE = (
    ("digest", "model"),
    ("image_size", "image size"),
    ("mean", "mean"),
    ("std", "standard deviation"),
    ("value_range", "value range"),
)
SHORTEST = 4  # letters of the beginning of an id


@dataclass(frozen=True)
class Reading:
    """How images are read, as the recipe says it."""

    image_column: str = "image"
    max_pixels: int = MAX_PIXELS
    max_image_bytes: int = 64 * 2**20
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


class Asker:
    """Turns what is asked into batches of queries with vectors.

    Args:
        vectors: the set.
        rows: what it says of its rows.
        search: among them.
        reading: how images are read.

    Attributes:
        bad: files of folders and parquet that are no usable images, in order.
    """

    def __init__(
        self, vectors: VectorSet, rows: Rows, search: Search, reading: Reading | None = None
    ) -> None:
        self.vectors, self.rows, self.search = vectors, rows, search
        self.reading = reading or Reading()
        self.bad: list[Refused] = []

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
        if kind == pafs.FileType.NotFound and not is_pattern(text):
            yield self._id(text)
            return
        fs, path = resolve_uri(place)
        if kind == pafs.FileType.Directory and _has_vectors(fs, path):
            yield from self._vector_set(text)
        elif kind == pafs.FileType.Directory and _has_parts(fs, path):
            open_vectors(text, FIELD)  # says that they are not finished
        elif kind == pafs.FileType.File and is_table(path) and self._holds_vectors(place):
            yield from self._rows(text, open_parquet(fs, path))
        elif kind == pafs.FileType.File and not is_table(path) and not is_archive(path):
            yield self._image(text, _bytes(text, fs, path), alone=True)
        else:
            yield from self._pile(text, place, kind)

    def _id(self, text: str) -> Query:
        rows = self.rows.with_beginning(text.lower()) if len(text) >= SHORTEST else np.arange(0)
        if not len(rows):
            raise DataError(
                f"{FIELD}={public(text)}: there is no such file, and no image of the set has an id "
                "that begins so",
                f"give an image file, a folder, a parquet file, or an image id of "
                f"{public(self.vectors.uri)} (at least its first {SHORTEST} letters)",
            )
        names = list(dict.fromkeys(self.rows.id_of(int(row)) for row in rows))
        if len(names) > 1:  # byte-identical images have one id, and are asked for as one
            more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
            raise DataError(
                f"{FIELD}={text}: {len(names):,} images have ids that begin so: "
                f"{', '.join(names[:NAMED])}{more}",
                "give more letters of the id",
            )
        return Query(names[0], int(rows[0]))

    def _pile(self, text: str, place: str, kind: pafs.FileType) -> Iterator[Query]:
        """The images of a source, as packing reads it: folders, patterns, archives, parquet."""
        reading = pack.Reading(
            self.reading.image_column, "", self.reading.max_image_bytes, labels=False
        )
        listing = list_source(place, field=FIELD)
        plan = plan_tasks(place, listing, reading, fit=False)
        self.bad += plan.refused
        before = f"{text.rstrip('/')}/" if kind == pafs.FileType.Directory else ""
        fs, _ = resolve_uri(listing.uri)
        for task in plan.tasks:
            for items, _ in read_task(fs, listing.root, task, reading):
                for item in items:
                    if isinstance(item, Refused):
                        self.bad.append(item)
                    elif isinstance(item, Item):
                        yield from self._usable(before + item.source, item.encoded)

    def _holds_vectors(self, place: str) -> bool:
        """Whether a parquet file has the vectors that are searched, not images."""
        fs, path = resolve_uri(place)
        with open_parquet(fs, path) as file:
            schema = file.schema_arrow
        name = self.search.column
        return name in schema.names and is_list(schema.field(name).type)

    def _rows(self, text: str, file: Any) -> Iterator[Query]:
        facts = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        if "digest" in facts:  # a part of a table of ours; others do not say whose they are
            self._same(text, facts)
        named = "image_id" in file.schema_arrow.names
        row = 0
        for batch in file.iter_batches(BATCH, columns=[self.search.column, *["image_id"] * named]):
            values = batch.column(self.search.column)
            names = [f"row {row + n}" for n in range(len(batch))]
            if named:
                ids = batch.column("image_id").to_pylist()
                names = [str(one or name) for one, name in zip(ids, names, strict=True)]
            what = f"{FIELD}={public(text)}: its {self.search.column}"
            lists = vectors_in(values, self.vectors.dim, row, what)
            for name, vector in zip(names, lists, strict=True):
                yield Query(name, self.rows.row_of(name), vector=vector)
            row += len(batch)

    def _vector_set(self, text: str) -> Iterator[Query]:
        """Another table of vectors, which must be of the same model."""
        asked = open_vectors(text, FIELD)
        self._same(text, asked.facts)
        for block, ids in asked.blocks(BATCH, self.search.column):
            for vector, name in zip(block, ids, strict=True):
                yield Query(str(name), self.rows.row_of(str(name)), vector=vector)

    def _same(self, text: str, theirs: Mapping[str, Any]) -> None:
        """Refuses vectors that cannot be compared with those of the set.

        Raises:
            DataError: they are of another model, or of images prepared in another way.
        """
        ours = self.vectors.facts
        for name, words in MUST_AGREE:
            if theirs.get(name) != ours.get(name):
                raise DataError(
                    f"{FIELD}={public(text)}: these vectors are of another {words} "
                    f"({theirs.get('model')}, {theirs.get(name)}) than those that are searched "
                    f"({ours.get('model')}, {ours.get(name)})",
                    "embed both with the same model, image size and data.range",
                )

    # ---- Images.

    def _image(self, name: str, encoded: bytes, alone: bool = False) -> Query:
        """An image with its row, or else with its vector still to be made.

        Raises:
            DataError: it is no usable image, and was asked for alone.
            BadImage: likewise, among others.
        """
        row = self.rows.row_of(image_id(encoded))
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
            self.bad.append(Refused(name, error.reason, error.detail, ids))

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
        return model_of(self.vectors, self.reading.model, self.reading.threads)


def asked_for(query: str) -> list[str]:
    """The parts of `search.query`: several with commas between them, or a file with commas.

    Raises:
        DataError: nothing is asked.
    """
    text = query.strip()
    whole = bool(text) and _kind(text) != pafs.FileType.NotFound
    texts = [text] if whole else split_list(text)
    if not texts:
        raise DataError(
            "nothing is asked: search.query is empty",
            "query=photo.jpg, an image id, a folder of images, or a parquet file",
        )
    return texts


def bad_table(bad: Sequence[Refused]) -> pa.Table:
    """What cannot be asked for, as every stage lists bad images."""
    return pa.Table.from_pylist(
        [{**asdict(one), "stage": "search"} for one in bad], BAD_IMAGE_SCHEMA
    )


def _has_vectors(fs: pafs.FileSystem, path: str) -> bool:
    return any(exists(fs, f"{path}/{mark}") for mark in (MARK, f"vectors/{MARK}"))


def _has_parts(fs: pafs.FileSystem, path: str) -> bool:
    """Whether a folder holds vectors of ours; embedding may have stopped at any of them."""
    for folder in (path, f"{path}/vectors"):
        for info in list_files(fs, folder, recursive=False):
            if info.base_name.startswith("part-") and is_table(info.path):
                with open_parquet(fs, info.path) as file:
                    return PART_KEY in (file.schema_arrow.metadata or {})
    return False


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
