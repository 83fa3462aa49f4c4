"""Which sets an evaluation is of: two, one whose images classify each other, or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load
from pipeline.errors import DataError
from pipeline.evaluate.sets import evaluation_sets, remarks
from pipeline.shards.shards import ShardSet
from tests.data import encoded, stored

IMAGE = encoded(np.zeros((8, 8, 3), np.uint8))


def labelled(folder: Path, labels: list[int] | None) -> ShardSet:
    columns = {} if labels is None else {"label": labels}
    images = [IMAGE] * len(labels or [0, 0, 0])
    return stored({"image": images} | columns, folder / "part.parquet", 4)


def test_two_sets_one_or_none(tmp_path: Path) -> None:
    training = labelled(tmp_path / "training", [0, 1, 0])
    other = labelled(tmp_path / "other", [1, 0])
    plain = labelled(tmp_path / "plain", None)

    def sets(shards: ShardSet, *fields: str) -> list[str] | None:
        pair = evaluation_sets(load(fields), shards)
        return pair and [one[1].uri if one else "" for one in pair]

    assert sets(training) == [training.uri, ""]
    assert sets(plain) is None
    queries = f"evaluate.queries={other.uri}"
    assert sets(training, queries) == [training.uri, other.uri]
    assert sets(plain, f"evaluate.reference={other.uri}") == [other.uri, ""]
    assert sets(training, f"evaluate.reference={plain.uri}") is None
    assert remarks(load([]), training) == remarks(load([]), plain) == []
    assert any("are also in the reference" in x for x in remarks(load([queries]), training))


def test_a_score_that_needs_labels_is_refused_where_there_are_none(tmp_path: Path) -> None:
    plain = labelled(tmp_path / "plain", None)
    with pytest.raises(DataError) as error:
        evaluation_sets(load(["evaluate.decide_by=logistic_top1"]), plain)
    assert "evaluate.decide_by=logistic_top1 needs labels" in error.value.what
    assert error.value.hint and "evaluate.decide_by=rank_me" in error.value.hint
    assert evaluation_sets(load(["evaluate.decide_by=rank_me"]), plain) is None
    training = labelled(tmp_path / "training", [0, 1, 0])
    assert evaluation_sets(load(["evaluate.decide_by=logistic_top1"]), training)
