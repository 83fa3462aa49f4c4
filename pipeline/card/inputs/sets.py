"""The sets that an evaluation scores on: images in shards, or vectors that are there already."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.card.card import SetFacts
from pipeline.embed.vectors import VectorSet, is_vectors, open_vectors
from pipeline.errors import DataError
from pipeline.evaluate.labels import Kind, Labels, check_labels
from pipeline.shards.classes import Classes, listed, names_against_numbers
from pipeline.shards.overlap import Overlap, overlap_of
from pipeline.shards.shard_set import ShardFile
from pipeline.shards.shards import ShardSet, open_shards
from pipeline.uri import public

FIRST = ", first "  # in the digest of a sample


@dataclass(frozen=True)
class EvaluationSet:
    """One set of an evaluation; holds no open file.

    Attributes:
        field: of the config that names it.
        name: as the user gave it.
        shards: its images; None where vectors were given.
        vectors: those that were given; None where there are images.
        whole: images before a sample was taken; 0: no sample was.
    """

    field: str
    name: str
    shards: ShardSet | None = None
    vectors: VectorSet | None = None
    whole: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of its labels; empty where they are numbers."""
        if self.vectors is not None:
            return tuple(self.vectors.facts.get("class_names", ()))
        return self.shards.class_names if self.shards else ()

    def first(self, limit: int) -> EvaluationSet:
        """A sample of about so many images at least, where there are more.

        Packed shards are ordered by a hash of the images' bytes, so their first row groups are a
        sample like any other, and the same one for all models. Sets of others stay whole.
        """
        if self.shards is None or not self.shards.packed or self.shards.rows <= limit:
            return self
        files: list[ShardFile] = []
        rows = 0
        for file in self.shards.files:
            groups = []
            for group in file.row_groups:
                if rows < limit:
                    groups.append(group)
                    rows += group
            if groups:
                files.append(replace(file, rows=sum(groups), row_groups=tuple(groups)))
        digest = f"{self.shards.digest}{FIRST}{rows}"
        shards = replace(self.shards, files=tuple(files), rows=rows, digest=digest)
        return replace(self, shards=shards, whole=self.shards.rows)

    @property
    def rows(self) -> int:
        """Images of it, before any is found to be bad."""
        return (self.vectors or self.shards).rows  # type: ignore[union-attr]

    @property
    def digest(self) -> str:
        """Changes with its images, or with its vectors."""
        return self.vectors.key if self.vectors is not None else self.shards.digest  # type: ignore[union-attr]

    @property
    def digest_of_all(self) -> str:
        """That of the set of which this is a sample, if it is one."""
        return self.digest.partition(FIRST)[0]

    @property
    def labels(self) -> Labels:
        """What is known of its labels."""
        place = f"{self.field}={public(self.name)}"
        if self.shards is not None:
            return replace(Labels.of(self.field, self.shards), place=place)
        kind: Kind = "names" if self.class_names else "numbers"
        known = self.vectors is not None and bool((self.vectors.labels() >= 0).any())
        return Labels(place, kind if known else "none", self.class_names)

    def facts(self, images: int, labelled: int) -> SetFacts:
        """As the card has them.

        Args:
            images: that are scored.
            labelled: of these.
        """
        return SetFacts(public(self.name), self.digest, images, labelled, self.class_names)


@dataclass(frozen=True)
class Sets:
    """What is scored on.

    Attributes:
        reference: votes, and trains what is trained.
        queries: is asked; None: the reference is, each image by the others.
    """

    reference: EvaluationSet
    queries: EvaluationSet | None = None

    @property
    def each(self) -> dict[str, EvaluationSet]:
        """The sets by what they are for."""
        asked = {} if self.queries is None else {"queries": self.queries}
        return {"reference": self.reference, **asked}

    @property
    def from_vectors(self) -> bool:
        """Whether vectors were given, so that no image is opened."""
        return self.reference.vectors is not None

    @cached_property
    def labelled(self) -> bool:
        """Whether there are labels to score with."""
        return self.reference.labels.kind != "none"

    @cached_property
    def classes(self) -> Classes:
        """One list of classes for both sets.

        Raises:
            DataError: one set has names and the other numbers.
        """
        names = {one.labels.place: one.class_names for one in self.each.values()}
        named = [place for place in names if names[place]]
        numbered = [place for place in names if not names[place]]
        if named and numbered:
            raise names_against_numbers(named[0], names[named[0]], numbered[0])
        return Classes.of(names[place] for place in named)

    @cached_property
    def overlap(self) -> Overlap | None:
        """What two labelled sets share and lack; reads their ids and labels.

        Raises:
            DataError: no class is in both.
        """
        if self.queries is None or not self.labelled:
            return None
        if self.reference.shards is not None and self.queries.shards is not None:
            return overlap_of(
                (self.reference.field, self.reference.shards),
                (self.queries.field, self.queries.shards),
            )
        return self._overlap_of_vectors()

    def _overlap_of_vectors(self) -> Overlap:
        columns = {}
        for what, one in self.each.items():
            assert one.vectors is not None
            labels = self.classes.mapped(one.vectors.labels(), one.class_names, one.field)
            columns[what] = labels, one.vectors.ids()
        (votes, ids), (asked, queried) = columns["reference"], columns["queries"]
        known = int(np.isin(queried[asked >= 0], ids[votes >= 0]).sum())
        overlap = Overlap.of(self.classes, np.unique(votes[votes >= 0]), asked, known)
        if overlap.queries and overlap.unanswerable == overlap.queries:
            raise DataError(
                f"no class of {self.each['queries'].labels.place} ({listed(overlap.lacking)}) has "
                f"an image in {self.reference.labels.place}",
                "their names must be the same; no query could be classified right",
            )
        return overlap


def open_set(field: str, uri: str, columns: tuple[str, str], name: str = "") -> EvaluationSet:
    """The set at a place: vectors where there are finished ones, else shards.

    Args:
        field: of the config that names it.
        uri: the place.
        columns: of images and of labels, in files that are not packed.
        name: as the user gave it; "": the place.

    Raises:
        DataError: neither is there.
    """
    if is_vectors(uri):
        return EvaluationSet(field, name or uri, vectors=open_vectors(uri, field))
    return EvaluationSet(field, name or uri, open_shards(uri, *columns, field))


def check_sets(reference: EvaluationSet, queries: EvaluationSet | None) -> Sets:
    """The two sets together.

    Raises:
        DataError: they cannot be compared: by their labels, or by what made their vectors.
    """
    if queries is None:
        return Sets(reference)
    _check_vectors(reference, queries)
    check_labels(queries.labels, reference.labels)
    return Sets(reference, queries)


def _check_vectors(reference: EvaluationSet, queries: EvaluationSet) -> None:
    """Refuses vectors beside images, and vectors of two models or of two ways to prepare images."""
    one, other = reference.vectors, queries.vectors
    if one is None and other is None:
        return
    if one is None or other is None:
        vectors, images = (reference, queries) if other is None else (queries, reference)
        raise DataError(
            f"{vectors.labels.place} holds vectors, {images.labels.place} holds images",
            "give vectors of both, written by jobs/embed.py with one model, or images of both",
        )
    unlike = [name for name in ALIKE if one.facts.get(name) != other.facts.get(name)]
    if unlike:
        said = "; ".join(f"{n}: {one.facts.get(n)} and {other.facts.get(n)}" for n in unlike)
        raise DataError(
            f"the vectors of {reference.labels.place} and {queries.labels.place} were not made "
            f"alike, so they cannot be compared ({said})",
            "embed both sets with the same model and settings: jobs/embed.py model=…",
        )


# What must be equal for two tables of vectors to be compared: `EmbedderSpec.settings` and values.
ALIKE = ("kind", "digest", "dim", "image_size", "mean", "std", "precision", "value_range")
