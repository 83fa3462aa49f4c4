"""A label column of any kind: whole numbers are class ids, text and booleans are class names."""

from __future__ import annotations

from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.classes import canonical

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
