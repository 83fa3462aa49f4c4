"""Vectors out of columns of lists: each row by itself, against lists of Python."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.search.lists import vectors_in

ROWS = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float64()), pa.large_list(pa.int32()), pa.list_(pa.float16(), 3)],
    ids=str,
)
def test_any_lists_and_slices_of_them(kind: pa.DataType) -> None:
    rows = [list(map(np.float16 if "half" in str(kind) else float, row)) for row in ROWS]
    column = pa.array(rows, kind)
    np.testing.assert_array_equal(vectors_in(column, 3, 0, "x"), ROWS)
    np.testing.assert_array_equal(vectors_in(column.slice(1, 1), 3, 1, "x"), ROWS[1:2])
    assert vectors_in(column.slice(3), 3, 3, "x").shape == (0, 3)


def test_rows_that_are_no_vectors_are_named() -> None:
    lists, fixed = pa.list_(pa.float32()), pa.list_(pa.float32(), 3)
    for rows, kind, words in (
        ([[0] * 3, [0] * 2, [0] * 4], lists, "2 values in row 11, expected 3 in each"),
        ([[0] * 3, None], fixed, "no vector in row 11, expected 3"),
        ([None, [0] * 3], lists, "no vector in row 10, expected 3"),
        ([[0] * 3, [0, None, 0]], fixed, "a null in the vector of row 11"),
        ([["a"]], pa.list_(pa.string()), "lists of string, expected numbers"),
    ):
        with pytest.raises(DataError) as error:
            vectors_in(pa.array(rows, kind), 3, 10, "x")
        assert words in str(error.value)
