"""Which images are trained on and which are scored, on planted sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import DataError
from pipeline.finetune.rows import NO_CLASS, fraction_of, split_of
from tests.data import encoded, hub_table, own_table, stored
from tests.finetune.small import NAMES, pixels, shards


def names(ids: np.ndarray) -> set[bytes]:
    return {bytes(one) for one in ids}


def test_a_fraction_is_of_each_class_and_part_of_a_larger_one() -> None:
    draw = np.random.default_rng(0)
    labels = draw.choice(4, 1000, p=[0.5, 0.3, 0.195, 0.005])
    labels[:1] = 3
    ids = draw.integers(0, 256, (1000, 16), np.uint8)
    small, large = (fraction_of(labels, ids, share, 5) for share in (0.01, 0.1))
    for share, chosen in ((0.01, small), (0.1, large)):
        for label in range(4):
            count = (labels == label).sum()
            assert chosen[labels == label].sum() == max(1, round(share * count)), label
    assert (large | ~small).all()
    assert not np.array_equal(small, fraction_of(labels, ids, 0.01, 6))
    order = draw.permutation(1000)
    assert np.array_equal(fraction_of(labels[order], ids[order], 0.1, 5), large[order])


def test_queries_are_mapped_by_name_and_never_trained_on(tmp_path: Path) -> None:
    labels = [0, 1, 0, 1, None, 1, 0, 1]
    train = shards(tmp_path / "train", 8, label=labels, names=("red", "blue"))
    asked = [encoded(pixels(number)) for number in (0, 1, 20, 21, 22, 23)]
    table = own_table(asked, [1, 0, 2, 0, 1, None], ("blue", "red", "unheard"))
    queries = stored(table, tmp_path / "q" / "b.parquet", 4)
    split = split_of(("data.shards", train), ("evaluate.queries", queries), 1.0, 0)
    assert split.class_names == NAMES
    # images 0 and 1 are in both sets, 4 has no label
    assert len(split.training) == 5
    assert names(split.training.ids).isdisjoint(names(split.queries.ids))
    of_training = dict(zip(map(bytes, split.training.ids), split.training.labels, strict=True))
    assert sorted(of_training.values()) == [0, 0, 0, 1, 1]
    # red, blue, unheard, blue, red; the last one has no label
    assert split.queries.labels.tolist() == [1, 0, NO_CLASS, 0, 1]
    assert split.majority(split.queries.ids) == pytest.approx(2 / 5)
    assert [remark.partition(" ")[0] for remark in split.remarks] == ["1", "1", "2", "1"]
    assert "count as wrong" in split.remarks[-1]


def test_without_queries_a_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    split = split_of(("data.shards", shards(tmp_path, 40)), None, 1.0, 0)
    assert np.bincount(split.queries.labels).tolist() == [4, 4]
    assert np.bincount(split.training.labels).tolist() == [16, 16]
    assert names(split.training.ids).isdisjoint(names(split.queries.ids))
    few = split_of(("data.shards", shards(tmp_path, 40)), None, 0.1, 0)
    assert names(few.queries.ids) == names(split.queries.ids)  # whatever the fraction
    assert np.bincount(few.training.labels).tolist() == [2, 2]
    again = split_of(("data.shards", shards(tmp_path / "again", 40)), None, 0.1, 0)
    assert few.digest == again.digest != split.digest  # by which a checkpoint knows its images


def test_files_of_others_get_the_same_rows(tmp_path: Path) -> None:
    images = [encoded(pixels(number)) for number in range(10)]
    labels = [number % 2 for number in range(10)]
    ours = stored(own_table(images, labels, NAMES), tmp_path / "a" / "a.parquet", 4)
    theirs = stored(hub_table(images, labels, NAMES), tmp_path / "b" / "b.parquet", 4)
    one, other = (split_of(("data.shards", s), None, 1.0, 0) for s in (ours, theirs))
    assert not theirs.packed
    assert np.array_equal(one.training.ids, other.training.ids)
    assert np.array_equal(one.training.labels, other.training.labels)
    assert np.array_equal(one.training.rows, other.training.rows)


def test_sets_that_no_classifier_can_learn_from_are_refused(tmp_path: Path) -> None:
    one_class = shards(tmp_path / "one", 6, label=[1] * 6)
    with pytest.raises(DataError, match=r"labelled images of 1 class \(red\)"):
        split_of(("data.shards", one_class), None, 1.0, 0)
    with pytest.raises(DataError, match="labelled images of 0 classes"):
        split_of(("data.shards", shards(tmp_path / "none", 6, label=[None] * 6)), None, 1.0, 0)
    others = stored(
        own_table([encoded(pixels(90))], [0], ("green",)), tmp_path / "q" / "q.parquet", 4
    )
    with pytest.raises(DataError, match=r"no class of evaluate\.queries has an image"):
        split_of(("data.shards", shards(tmp_path / "two")), ("evaluate.queries", others), 1.0, 0)
