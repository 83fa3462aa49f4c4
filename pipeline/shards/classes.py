"""Classes are names. A label id counts in its own set's list of names and in no other.

Whoever compares or joins labels of several sets (packing, curated shards, k-NN) takes the ids
through one list: `Classes`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError

Labels = np.ndarray[Any, np.dtype[np.int64]]

UNKNOWN = -1  # the label of an image without a class
SHOWN = 5  # names in a sentence


def canonical(names: Iterable[Any]) -> tuple[str, ...]:
    """Class names in the one Unicode form in which they are compared (NFC)."""
    return tuple(unicodedata.normalize("NFC", str(name)) for name in names)


def listed(names: Sequence[str]) -> str:
    """Some names for a sentence: `ant, bee, cat and 97 more`."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def names_against_numbers(named: str, names: Sequence[str], numbered: str) -> DataError:
    """That two sets cannot be compared: nobody knows which number means which name.

    Args:
        named: the set whose classes have names, as the recipe names it.
        names: these names, where they are known.
        numbered: the set whose labels are bare numbers.
    """
    return DataError(
        f"the classes of {named} have names{f' ({listed(names)})' if names else ''}, the labels of "
        f"{numbered} are numbers without names: which number is which class is not known",
        hint="give both sets names (folders, a label column of text, or class names in the parquet "
        "files), or both numbers; data.labels=none leaves out labels of the training images",
    )


@dataclass(frozen=True)
class Classes:
    """One list of class names for several sets.

    Attributes:
        names: of the classes; () where no set has names: ids then mean the same in all sets.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, lists: Iterable[Sequence[str]]) -> Classes:
        """The list of all sets: one list stays as it is, of several the sorted union is taken.

        Args:
            lists: the class names of each set, () where it has none.
        """
        several = dict.fromkeys(names for names in map(canonical, lists) if names)
        if len(several) <= 1:
            return cls(next(iter(several), ()))
        return cls(tuple(sorted({name for names in several for name in names})))

    @cached_property
    def index(self) -> dict[str, int]:
        """The id of each name."""
        return {name: i for i, name in reversed(list(enumerate(self.names)))}

    def ids(self, names: Sequence[str]) -> Labels:
        """The id here of each name of a set's own list."""
        return np.asarray([self.index[name] for name in canonical(names)], np.int64)

    def mapped(self, labels: Labels, names: Sequence[str], where: str) -> Labels:
        """Labels of a set as ids of this list; those without a class stay so.

        Args:
            labels: ids in the set's own list, below 0 where unknown.
            names: that list; () where the set has none.
            where: the set, for the sentence.

        Raises:
            DataError: a label has no name in the set's own list.
        """
        if not names:
            return np.maximum(labels, UNKNOWN)
        largest = int(labels.max(initial=UNKNOWN))
        if largest >= len(names):
            raise DataError(
                f"a label of {where} is {largest}, but only {len(names)} classes have names",
                hint="correct the file, or pack it without labels: data.labels=none",
            )
        known = labels >= 0
        ids = np.full(len(labels), UNKNOWN, np.int64)
        ids[known] = self.ids(names)[labels[known]]
        return ids


# ---- A label column of any kind: whole numbers are class ids, text and booleans are class names.


LARGEST = pa.scalar(2**63 - 1, pa.uint64())  # a number above it is no class id


def label_kind(kind: pa.DataType) -> Literal["ids", "names"] | None:
    """What a column of this type says about classes; None where it cannot be a label.

    Categories (dictionary columns) are what their values are.
    """
    if pa.types.is_dictionary(kind):
        return label_kind(kind.value_type)
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return "ids"
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return "names" if text or pa.types.is_string_view(kind) or pa.types.is_boolean(kind) else None


def label_names(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The class name of each row of a column of names; null where it is null or empty."""
    names = _decoded(column).cast(pa.string())
    distinct = names.unique().drop_null()
    # Not by pc.utf8_normalize, whose NFC leaves letters and accents apart.
    known = [name or None for name in canonical(distinct.to_pylist())]
    return pc.take(pa.array(known, pa.string()), pc.index_in(names, distinct))


def label_ids(column: pa.ChunkedArray, names: tuple[str, ...] = ()) -> pa.ChunkedArray:
    """The class id of each row, int64; null where it has none.

    Hub data sets mark images without a class by -1.

    Args:
        column: of either kind.
        names: of the classes; what is not among them has no id. Only for a column of names.
    """
    if label_kind(column.type) == "names":
        return pc.index_in(label_names(column), pa.array(names, pa.string())).cast(pa.int64())
    numbers = _decoded(column)
    if pa.types.is_uint64(numbers.type):
        numbers = pc.if_else(pc.less_equal(numbers, LARGEST), numbers, None)
    numbers = numbers.cast(pa.int64())
    return pc.if_else(pc.greater_equal(numbers, 0), numbers, None)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
