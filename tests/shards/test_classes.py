"""Labels of several sets in one list of names."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.shards.classes import Classes, label_ids, label_kind, label_names, listed

COMPOSED, DECOMPOSED = "\u00e9toile", "e\u0301toile"


def test_of_several_lists_the_sorted_union_is_taken_and_one_list_stays():
    assert Classes.of([["dog", "cat"], (), ["dog", "cat"]]).names == ("dog", "cat")
    assert Classes.of([]).names == Classes.of([(), ()]).names == ()
    several = Classes.of([["dog", "cat"], ["cat", "ant"], [DECOMPOSED], [COMPOSED]])
    assert several.names == ("ant", "cat", "dog", COMPOSED)


def test_labels_are_mapped_by_name():
    lists = [["dog", DECOMPOSED, "cat"], [COMPOSED, "ant", "dog"]]
    classes = Classes.of(lists)
    for names in lists:
        labels = np.asarray([2, -1, 0, 1, -7])
        mapped = classes.mapped(labels, names, "x")
        composed = [name.replace(DECOMPOSED, COMPOSED) for name in names]
        assert [classes.names[i] for i in mapped[[0, 2, 3]]] == [composed[i] for i in (2, 0, 1)]
        assert mapped[1] == mapped[4] == -1
    with pytest.raises(DataError, match="a label of x is 3, but only 3 classes"):
        classes.mapped(np.asarray([0, 3]), lists[0], "x")
    assert Classes.of([()]).mapped(np.asarray([9, -3]), (), "x").tolist() == [9, -1]


def test_a_name_that_is_twice_in_a_list_is_one_class():
    names = ["cat", "dog", "cat", "dog"]
    assert Classes.of([names]).ids(names).tolist() == [0, 1, 0, 1]
    assert Classes.of([[COMPOSED, DECOMPOSED]]).ids([COMPOSED, DECOMPOSED]).tolist() == [0, 0]


def test_a_sentence_shows_some_names():
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed([f"n{i}" for i in range(1005)]) == "n0, n1, n2, n3, n4 and 1,000 more"


def test_kinds_of_label_columns():
    names = {"text": pa.string(), "large": pa.large_string(), "view": pa.string_view()}
    names |= {"bool": pa.bool_(), "category": pa.dictionary(pa.int8(), pa.string())}
    ids = {"int": pa.int8(), "big": pa.uint64(), "null": pa.null()}
    ids |= {"category of numbers": pa.dictionary(pa.int8(), pa.int64())}
    refused = {"float": pa.float64(), "list": pa.list_(pa.int64()), "binary": pa.binary()}
    refused |= {"struct": pa.struct([("a", pa.int64())]), "time": pa.timestamp("s")}
    refused |= {"decimal": pa.decimal128(5, 2), "date": pa.date32()}
    refused |= {"category of floats": pa.dictionary(pa.int8(), pa.float32())}
    for kind, columns in (("names", names), ("ids", ids), (None, refused)):
        for what, column in columns.items():
            assert label_kind(column) == kind, what


def test_values_of_label_columns():
    text = [COMPOSED, "b", None, "", "b"]
    expected = [COMPOSED, "b", None, None, "b"]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        column = pa.chunked_array([pa.array([DECOMPOSED, *text[1:]], kind)])
        assert label_names(column).to_pylist() == expected, kind
        assert label_ids(column, ("b", COMPOSED)).to_pylist() == [1, 0, None, None, 0], kind
    parts = [pa.array(part).dictionary_encode() for part in (["b", "a"], ["c", "b"])]
    assert label_ids(pa.chunked_array(parts), ("a", "b", "c")).to_pylist() == [1, 0, 2, 1]
    truth = pa.chunked_array([pa.array([True, None, False])])
    assert label_names(truth).to_pylist() == ["true", None, "false"]
    large = pa.chunked_array([pa.array([2**63 + 5, 2**63 - 1, None, 0], pa.uint64())])
    assert label_ids(large).to_pylist() == [None, 2**63 - 1, None, 0]
    numbers = pa.chunked_array([pa.array([30, -1, None, 10]).dictionary_encode()])
    assert label_ids(numbers).to_pylist() == [30, None, None, 10]
