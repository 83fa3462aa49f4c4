"""Which images are trained on and which are scored: rows of shards with ids and labels.

Shapes: n rows, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import DataError
from pipeline.evaluate.classifiers.split import held_out
from pipeline.shards.classes import UNKNOWN, Classes, label_ids, listed
from pipeline.shards.overlap import shared_classes
from pipeline.shards.row_group import read_group
from pipeline.shards.shard_set import ShardSet
from pipeline.views.draws import uniforms

Array = np.ndarray[Any, Any]
FRACTION_STREAM = 2  # of `uniforms`, beside those of crops and colours
NO_CLASS = -2  # a label that no head can answer: its class has no image to train on


@dataclass(frozen=True)
class Rows:
    """Rows of one set, by where they lie.

    Attributes:
        files: int32 [n], numbers of files.
        groups: int32 [n], row groups in them.
        rows: int32 [n], rows in these.
        ids: uint8 [n, 16].
        labels: int64 [n].
    """

    files: Array
    groups: Array
    rows: Array
    ids: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, chosen: Array) -> Rows:
        """Some of them, by a mask or by numbers."""
        parts = (self.files, self.groups, self.rows, self.ids, self.labels)
        return Rows(*(part[chosen] for part in parts))

    def part(self, number: int, parts: int) -> Rows:
        """One of several parts of equal size, of rows that lie together."""
        return self.where(np.array_split(np.arange(len(self)), parts)[number])

    def labelled(self, labels: Array) -> Rows:
        """The same with other labels."""
        return Rows(self.files, self.groups, self.rows, self.ids, labels)


@dataclass(frozen=True)
class Split:
    """What is trained on and what is scored.

    Attributes:
        training: rows with labels 0 to K - 1.
        queries: rows with such labels, or NO_CLASS.
        queries_of: the set of the queries: the training one, where a part of it is held out.
        class_names: K.
        remarks: what is to be said: what was left out, and why.
    """

    training: Rows
    queries: Rows
    queries_of: ShardSet
    class_names: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def digest(self) -> str:
        """16 hex digits of the ids and labels that are trained on, and of the class names."""
        hashed = blake2b("\0".join(self.class_names).encode(), digest_size=8)
        for part in (self.training.ids, self.training.labels):
            hashed.update(np.ascontiguousarray(part).tobytes())
        return hashed.hexdigest()

    def majority(self, ids: Array) -> float:
        """Share of queries that are of the most frequent class of the training.

        Args:
            ids: uint8 [n, 16], of the queries that count.
        """
        scored = np.isin(_names(self.queries.ids), _names(ids))
        most = np.bincount(self.training.labels).argmax()
        return float((self.queries.labels[scored] == most).mean())


def split_of(
    images: tuple[str, ShardSet], queries: tuple[str, ShardSet] | None, fraction: float, seed: int
) -> Split:
    """Chooses the rows; reads ids and labels of both sets.

    Args:
        images: what the set is called, and the set that is trained on.
        queries: the same of the set that is scored; None: a fifth of each class is held out.
        fraction: share of the labels of each class that is used.
        seed: of the fraction.

    Raises:
        DataError: there are not two classes with images, or the two sets share none.
    """
    sets = [images, *([queries] if queries else [])]
    classes = shared_classes(sets)
    rows, *others = (rows_of(*one, classes) for one in sets)
    known = rows.where(rows.labels != UNKNOWN)
    remarks = []
    if len(known) < len(rows):
        remarks.append(f"{len(rows) - len(known):,} images without a label are left out")
    if others:
        asked = others[0].where(others[0].labels != UNKNOWN)
        if unlabelled := len(others[0]) - len(asked):
            remarks.append(f"{unlabelled:,} images of {queries[0]} have no label")  # type: ignore[index]
        again = np.isin(_names(known.ids), _names(asked.ids))
        if again.any():
            remarks.append(f"{again.sum():,} images are in both sets and are not trained on")
        training = known.where(~again)
    else:
        out = held_out(known.labels, known.ids)
        asked, training = known.where(out), known.where(~out)
    if fraction < 1:
        training = training.where(fraction_of(training.labels, training.ids, fraction, seed))
    present = np.unique(training.labels)
    names = tuple(classes.names[i] if classes.names else str(i) for i in present.tolist())
    if len(present) < 2:
        raise DataError(
            f"{images[0]} has labelled images of {len(present)} class{'es' * (len(present) != 1)}"
            + f" ({listed(names)})" * bool(names),
            "put its images into one folder for each class, or name the label column with "
            "data.label_column=…",
        )
    asked = asked.labelled(_numbered(asked.labels, present))
    if not (asked.labels >= 0).any():
        raise DataError(
            f"no class of {sets[-1][0]} has an image in {images[0]} ({listed(names)})",
            "their names must be the same; no query could be classified right",
        )
    if missing := int((asked.labels == NO_CLASS).sum()):
        remarks.append(
            f"{missing:,} of {len(asked):,} queries are of classes without a training image and "
            "count as wrong"
        )
    training = training.labelled(_numbered(training.labels, present))
    return Split(training, asked, sets[-1][1], names, tuple(remarks))


def fraction_of(labels: Array, ids: Array, fraction: float, seed: int) -> Array:
    """Which images a share of the labels is: of each class, at least one, by a hash of the ids.

    A smaller share is a part of a larger one. Neither the order of the rows nor other images
    of other classes change it.

    Args:
        labels: int64 [n].
        ids: uint8 [n, 16].
        fraction: share of each class.
        seed: another one draws others.

    Returns:
        bool [n].
    """
    drawn = uniforms(seed, 0, ids, 1, FRACTION_STREAM)[:, 0]
    order = np.lexsort((drawn, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(first, counts)
    kept = place < np.repeat(np.maximum(1, np.rint(fraction * counts)), counts)
    chosen = np.zeros(len(labels), bool)
    chosen[order[kept]] = True
    return chosen


def rows_of(what: str, shards: ShardSet, classes: Classes) -> Rows:
    """All rows of a set, labels as ids of `classes`. The images of a set that is not packed are
    read, as their ids are made of them.

    Raises:
        DataError: a file cannot be read, or a label has no name.
    """
    parts = [
        (file, group, *_ids_and_labels(shards, file, group))
        for file, entry in enumerate(shards.files)
        for group, count in enumerate(entry.row_groups)
        if count
    ]
    counts = [len(labels) for *_, labels in parts]
    labels = np.concatenate([labels for *_, labels in parts]) if parts else np.zeros(0, np.int64)
    return Rows(
        np.repeat(np.asarray([file for file, *_ in parts], np.int32), counts),
        np.repeat(np.asarray([group for _, group, *_ in parts], np.int32), counts),
        np.concatenate([np.zeros(0, np.int32), *(np.arange(n, dtype=np.int32) for n in counts)]),
        np.concatenate([np.zeros((0, 16), np.uint8), *(ids for *_, ids, _ in parts)]),
        # a set may have names and not one label; its names are then not in `classes`
        classes.mapped(labels, shards.class_names if shards.has_labels else (), what),
    )


def _ids_and_labels(shards: ShardSet, file: int, group: int) -> tuple[Array, Array]:
    columns = shards.columns
    if not shards.packed:
        whole = read_group(columns, shards.files[file].path, group)
        return whole.image_ids, whole.labels
    with shards.parquet(file) as parquet:
        names = ["image_id", *[columns.label] * columns.labels]
        table: pa.Table = parquet.read_row_group(group, columns=names)
    text = "".join(table.column("image_id").to_pylist())
    ids = np.frombuffer(bytearray.fromhex(text), np.uint8).reshape(-1, 16)
    if not columns.labels:
        return ids, np.full(len(ids), UNKNOWN, np.int64)
    labels = label_ids(table.column(columns.label), columns.names).fill_null(UNKNOWN)
    return ids, labels.to_numpy()


def _numbered(labels: Array, present: Array) -> Array:
    """Labels as numbers among the classes that are there; NO_CLASS for others."""
    at = np.searchsorted(present, labels)
    known = present[np.minimum(at, len(present) - 1)] == labels
    return np.where(known, at, NO_CLASS)


def _names(ids: Array) -> Array:
    return np.ascontiguousarray(ids).view("S16").ravel()


def group_starts(rows: Rows) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows of each row group; they lie together."""
    changes = np.flatnonzero(np.diff(rows.files) | np.diff(rows.groups)) + 1
    yield from zip([0, *changes.tolist()], [*changes.tolist(), len(rows)], strict=True)
