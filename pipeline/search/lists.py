"""Vectors out of a column of lists, as any program may have written it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold vectors."""
    return bool(
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )


def vectors_in(column: pa.Array, dim: int, first: int, what: str) -> np.ndarray[Any, Any]:
    """The rows of a column of lists.

    Args:
        column: n lists of numbers, fixed in length or not.
        dim: D, the length that each must have.
        first: number of the first row, for the message.
        what: what the column is, for the message.

    Returns:
        float32 [n, D].

    Raises:
        DataError: a row has no vector, another length, or values that are no numbers. Each row is
            looked at: two of D - 1 and D + 1 values have as many together as two of D.
    """
    hint = "embed these images with the model of the set"
    kind = column.type.value_type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{what} has lists of {kind}, expected numbers", hint)
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
    if (other := np.flatnonzero(lengths != dim)).size:
        row, length = int(other[0]), int(lengths[other[0]])
        has = "no vector" if length < 0 else f"{length:,} values"
        raise DataError(f"{what} has {has} in row {first + row}, expected {dim} in each", hint)
    values = column.flatten()  # without what lies under a null row, and none is one here
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // dim
        raise DataError(f"{what} has a null in the vector of row {first + row}", hint)
    return np.asarray(values, np.float32).reshape(len(column), dim)
