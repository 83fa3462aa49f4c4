"""Two labelled sets against planted truth: which images and classes they share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.shards import overlap
from pipeline.shards.overlap import overlap_of
from pipeline.shards.shards import ShardSet
from tests.data import hub_table, own_table, stored

NAMES = ["ant", "bee", "cat"]


def hub(folder: Path, images: list[bytes], label, names=()) -> ShardSet:
    """Parquet as hubs store it, two rows a group."""
    return stored(hub_table(images, label, names), folder / "a.parquet", 2)


def packed(folder: Path, images: list[bytes], label: list[int | None], names) -> ShardSet:
    """A shard of ours, without its manifest."""
    return stored(own_table(images, label, names), folder / "a.parquet", 3)


def test_images_and_classes_of_two_sets(tmp_path):
    rng = np.random.default_rng(0)
    images = [bytes(rng.integers(0, 256, 50).astype(np.uint8)) for _ in range(30)]
    labels = rng.integers(0, 3, 30)
    # reference: rows 0 to 19 without cat; queries: 14 to 29 in another order, one without a label
    asked = [NAMES[i] for i in labels[14:].tolist()]
    votes = [i if i < 2 else None for i in labels[:20].tolist()]
    both = [i for i in range(14, 20) if labels[i] < 2 and i != 15]
    cats = [i for i in range(14, 30) if labels[i] == 2 and i != 15]
    assert both and cats
    text = [None if i == 1 else name for i, name in enumerate(asked)]
    backwards = [-1 if name is None else NAMES[::-1].index(name) for name in text]
    queries = {
        "text": hub(tmp_path / "qt", images[14:], text),
        "ids": hub(tmp_path / "qi", images[14:], backwards, NAMES[::-1]),
    }
    references = {
        "ours": packed(tmp_path / "ro", images[:20], votes, NAMES),
        "hub": hub(tmp_path / "rh", images[:20], votes, NAMES),
    }
    for what, reference in references.items():
        for how, query in queries.items():
            compared = overlap_of(("r", reference), ("q", query))
            assert (compared.queries, compared.known) == (15, len(both)), (what, how)
            assert (compared.lacking, compared.unanswerable) == (("cat",), len(cats)), (what, how)
            said = compared.sentences()
            assert f"{len(both)} of 15 queries are also in the reference" in said[0]
            assert f"no image of cat: {len(cats)} of 15 queries" in said[1]
            assert len(said) == 2


def test_nothing_is_said_where_nothing_is_to_be_said(tmp_path):
    reference = hub(tmp_path / "r", [b"a", b"b"], ["ant", "bee"])
    queries = hub(tmp_path / "q", [b"c"], ["bee"])
    assert overlap_of(("r", reference), ("q", queries)).sentences() == []


def test_numbers_on_both_sides_are_compared_and_said(tmp_path):
    reference, queries = hub(tmp_path / "r", [b"a", b"b"], [3, 5]), hub(tmp_path / "q", [b"c"], [5])
    (said,) = overlap_of(("r", reference), ("q", queries)).sentences()
    assert "equal numbers are taken for the same class" in said


def test_what_cannot_be_compared_is_refused(tmp_path):
    named = hub(tmp_path / "named", [b"a", b"b"], ["ant", "bee"])
    numbers = hub(tmp_path / "numbers", [b"c"], [0])
    others = hub(tmp_path / "others", [b"d"], ["Ant"])
    for r, q in ((named, numbers), (numbers, named)):
        with pytest.raises(
            DataError, match=r"have names \(ant, bee\), the labels of . are numbers"
        ):
            overlap_of(("r", r), ("q", q))
    with pytest.raises(DataError, match=r"no class of q \(Ant\) has an image in r \(ant, bee\)"):
        overlap_of(("r", named), ("q", others))
    beyond = hub(tmp_path / "beyond", [b"e"], [7], ["ant", "bee"])
    with pytest.raises(DataError, match="a label of q is 7, but only 2 classes have names"):
        overlap_of(("r", named), ("q", beyond))


def test_what_is_too_large_to_hash_beforehand_is_said(tmp_path, monkeypatch):
    reference = hub(tmp_path / "r", [b"a", b"b"], ["ant", "bee"])
    queries = hub(tmp_path / "q", [b"b", b"c"], ["bee", "cat"])
    monkeypatch.setattr(overlap, "HASHED_BYTES", 10)
    compared = overlap_of(("r", reference), ("q", queries))
    assert compared.known is None and compared.lacking == ("cat",)
    assert "too large" in compared.sentences()[0]
