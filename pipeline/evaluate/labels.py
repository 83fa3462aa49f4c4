"""What is known of the labels of a set, and whether two sets can be compared by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import DataError
from pipeline.shards.classes import names_against_numbers
from pipeline.shards.shards import ShardSet
from pipeline.uri import public

Kind = Literal["names", "numbers", "none", "unknown"]


@dataclass(frozen=True)
class Labels:
    """The labels of a set that votes or is asked.

    Attributes:
        place: the set as the recipe names it, e.g. `evaluate.queries=photos/val`.
        kind: "unknown" where that shows only when the set is packed.
        names: of the classes, where they are known.
    """

    place: str
    kind: Kind
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, field: str, shards: ShardSet) -> Labels:
        """Those of a set that is packed, or parquet as hubs store it."""
        place = f"{field}={public(shards.uri)}"
        if not shards.has_labels:
            return cls(place, "none")
        return cls(place, "names" if shards.class_names else "numbers", shards.class_names)


def check_labels(queries: Labels, reference: Labels) -> None:
    """Refuses two sets that no k-NN can compare.

    Raises:
        DataError: one has no labels, or the classes of one have names and those of the other none.
    """
    if queries.kind == "none":
        raise DataError(
            f"{queries.place} has no labels, so no prediction can be checked",
            "put its images into one folder for each class, name the label column with "
            "data.label_column=…, or leave evaluate.queries empty",
        )
    if reference.kind == "none":
        raise DataError(
            f"evaluate.queries is set, but {reference.place} has no labels to vote with",
            "name a labelled set with evaluate.reference=…, or leave evaluate.queries empty",
        )
    if {queries.kind, reference.kind} == {"names", "numbers"}:
        named, other = (queries, reference) if queries.kind == "names" else (reference, queries)
        raise names_against_numbers(named.place, named.names, other.place)


def check_deciding(score: str, reference: Labels) -> None:
    """Refuses a score that needs labels where there are none.

    Args:
        score: `evaluate.decide_by`.
        reference: the set that votes.

    Raises:
        DataError: it has no labels.
    """
    if reference.kind == "none" and score not in ("", "rank_me"):
        raise DataError(
            f"evaluate.decide_by={score} needs labels, but {reference.place} has none",
            "name a labelled set with evaluate.reference=…, or set evaluate.decide_by=rank_me",
        )


def check_keep(keep: Labels) -> None:
    """Refuses images of `guard.keep` without labels.

    Raises:
        DataError: they have none.
    """
    if keep.kind == "none":
        raise DataError(
            f"{keep.place} has no labels, so nobody can say what is forgotten on it",
            "put its images into one folder for each class, name the label column with "
            "data.label_column=…, or leave guard.keep empty",
        )
    if keep.kind == "names" and len(keep.names) < 2:
        raise DataError(
            f"all images of {keep.place} are of one class, so nothing shows what is forgotten",
            "name images of two classes or more, or leave guard.keep empty",
        )
