"""How two labelled sets meet: images that are in both, classes that one of them lacks.

The queries of an evaluation are held against the set that votes. Ids are hashes of the bytes, so
both are known before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.shards.classes import Classes, Labels, label_ids, listed, names_against_numbers
from pipeline.shards.columns import image_id, is_ours
from pipeline.shards.row_group import image_array
from pipeline.shards.shard_set import ShardSet

COMPARED_ROWS = 20_000_000  # ids of shards that pack wrote: a second a million
HASHED_BYTES = 2**30  # of other files, whose ids are computed from all their bytes


@dataclass(frozen=True)
class Overlap:
    """What the queries share with the reference, and what they do not.

    Attributes:
        queries: labelled ones.
        known: of them, in the reference too, byte for byte; None where that was not compared.
        lacking: classes of queries of which the reference has no image.
        unanswerable: queries of these classes.
        numbered: no set has class names.
    """

    queries: int
    known: int | None
    lacking: tuple[str, ...]
    unanswerable: int
    numbered: bool

    @classmethod
    def of(cls, classes: Classes, votes: Labels, asked: Labels, known: int | None) -> Overlap:
        """From labels that were brought to one list.

        Args:
            classes: that list.
            votes: labels that occur in the reference, each once or more often.
            asked: the label of each query.
            known: see above.
        """
        asked = asked[asked >= 0]
        missing = np.setdiff1d(asked, votes)
        names = [classes.names[i] if classes.names else str(i) for i in missing.tolist()]
        unanswerable = int(np.isin(asked, missing).sum())
        return cls(len(asked), known, tuple(names), unanswerable, not classes.names)

    def sentences(self) -> list[str]:
        """What is to be said of it; empty where nothing is."""
        sentences = []
        if self.known:
            sentences.append(
                f"{self.known:,} of {self.queries:,} queries are also in the reference, byte for "
                "byte: none of them votes for itself"
            )
        if self.known is None:
            sentences.append(
                "the reference is too large to look for the queries in it beforehand; an image "
                "that is in both does not vote for itself"
            )
        if self.lacking:
            sentences.append(
                f"the reference has no image of {listed(self.lacking)}: {self.unanswerable:,} of "
                f"{self.queries:,} queries are of these classes and count as wrong"
            )
        if self.numbered:
            sentences.append(
                "classes have no names: equal numbers are taken for the same class in both sets"
            )
        return sentences


def shared_classes(sets: Sequence[tuple[str, ShardSet]]) -> Classes:
    """The list of classes in which the labels of sets are compared.

    Args:
        sets: with what each is called, such as the field that names it.

    Raises:
        DataError: labels have names in one set and are numbers in another, so nobody knows which
            number means which name.
    """
    labelled = [(what, shards.class_names) for what, shards in sets if shards.has_labels]
    named = [(what, names) for what, names in labelled if names]
    numbered = [what for what, names in labelled if not names]
    if named and numbered:
        raise names_against_numbers(*named[0], numbered[0])
    return Classes.of(names for _, names in named)


def overlap_of(reference: tuple[str, ShardSet], queries: tuple[str, ShardSet]) -> Overlap:
    """Compares two labelled sets, from their columns of ids and labels.

    Args:
        reference: what it is called, and the set that votes.
        queries: the same of the set that is classified.

    Raises:
        DataError: as `shared_classes` and `Classes.mapped` say, or no class is in both.
    """
    classes = shared_classes([reference, queries])
    ids: list[str] = []
    asked = [np.zeros(0, np.int64)]
    comparable = _comparable(reference[1]) and _comparable(queries[1])
    for names, labels in _columns(*queries, classes, comparable):
        ids += [name for name, label in zip(names, labels.tolist(), strict=False) if label >= 0]
        asked.append(labels)
    votes = np.zeros(0, np.int64)
    queried, known = pa.array(ids, pa.string()), set[str]()
    for names, labels in _columns(*reference, classes, comparable):
        votes = np.union1d(votes, labels[labels >= 0])
        labelled = pa.array(names, pa.string()).filter(pa.array(labels[: len(names)] >= 0))
        known.update(labelled.filter(pc.is_in(labelled, value_set=queried)).to_pylist())
    overlap = Overlap.of(
        classes,
        votes,
        np.concatenate(asked),
        sum(name in known for name in ids) if comparable else None,
    )
    if overlap.queries and overlap.unanswerable == overlap.queries:
        raise DataError(
            f"no class of {queries[0]} ({listed(overlap.lacking)}) has an image in {reference[0]}"
            + (f" ({listed(_names_of(classes, votes))})" if len(votes) else ""),
            hint="their names must be the same; no query could be classified right",
        )
    return overlap


def labels_of(shards: ShardSet) -> Labels:
    """The labels of all rows of a set, int64 [N], -1 where unknown; reads that column alone."""
    classes = Classes.of([shards.class_names])
    parts = [labels for _, labels in _columns("", shards, classes, with_ids=False)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def shared_images(one: ShardSet, other: ShardSet) -> int | None:
    """How many images of one set are in the other too, byte for byte, from their columns of ids;
    None where one of them is too large to compare.
    """
    if not (_comparable(one) and _comparable(other)):
        return None
    asked: list[str] = []
    for names, _ in _columns("", one, Classes.of([one.class_names]), with_ids=True):
        asked += names
    ids, known = pa.array(asked, pa.string()), set[str]()
    for names, _ in _columns("", other, Classes.of([other.class_names]), with_ids=True):
        there = pa.array(names, pa.string())
        known.update(there.filter(pc.is_in(there, value_set=ids)).to_pylist())
    return sum(name in known for name in asked)


def _names_of(classes: Classes, labels: Labels) -> list[str]:
    return [classes.names[i] if classes.names else str(i) for i in labels.tolist()]


def _comparable(shards: ShardSet) -> bool:
    if shards.packed:
        return shards.rows <= COMPARED_ROWS
    return sum(file.bytes for file in shards.files) <= HASHED_BYTES


def _columns(
    what: str, shards: ShardSet, classes: Classes, with_ids: bool
) -> Iterator[tuple[Sequence[str], Labels]]:
    """Ids (none where they are not asked for) and labels, part by part."""
    columns = shards.columns
    for index in range(len(shards.files)):
        with shards.parquet(index) as parquet:
            schema = parquet.schema_arrow
            ids = "image_id" if is_ours(schema) else columns.image
            labels = [columns.label] * (columns.labels and columns.label in schema.names)
            read = [ids] * with_ids + labels
            rows = 65_536 if is_ours(schema) or not with_ids else 64  # images are large
            for batch in parquet.iter_batches(rows, columns=read) if read else ():
                table = pa.Table.from_batches([batch])
                names: Sequence[str] = ()
                if with_ids and is_ours(schema):
                    names = table.column(ids).to_pylist()
                elif with_ids:
                    names = [image_id(x.as_py() or b"") for x in image_array(table.column(ids))]
                ids_of_rows = np.full(len(table), -1, np.int64)
                if labels:
                    ids_of_rows = (
                        label_ids(table.column(labels[0]), columns.names).fill_null(-1).to_numpy()
                    )
                yield names, classes.mapped(ids_of_rows, shards.class_names, what)
