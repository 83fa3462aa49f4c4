"""Scores of vectors that stay in their table equal those of the same vectors in memory."""

import numpy as np
import pytest
import torch

from pipeline.card.inputs import stored
from pipeline.card.inputs.stored import Stored, column_of, mean_of
from pipeline.embed.vectors import VectorSet
from pipeline.evaluate.classifiers.few_shot import few_shot_scores
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours.retrieval import retrieval_scores
from tests.card.test_nearest import DIM, table_of


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 300)
    vectors = np.eye(4, DIM)[labels] + 0.7 * rng.standard_normal((300, DIM))
    vectors = vectors.astype(np.float32)
    ids = rng.integers(0, 256, (300, 16)).astype(np.uint8)
    return table_of(tmp_path / "v", vectors, labels, ids, parts=7), vectors, labels, ids


def test_rows_in_any_order_with_and_without_the_centre(case):
    table, vectors, _, _ = case
    centre = mean_of(table, "cls")
    np.testing.assert_allclose(centre, vectors.astype(np.float64).mean(0), atol=1e-12)
    rows = torch.from_numpy(np.random.default_rng(1).integers(0, 300, 90))
    whole = Stored(table, "cls")
    assert (len(whole), whole.shape, whole.device.type) == (300, (300, DIM), "cpu")
    np.testing.assert_array_equal(whole[rows], vectors[rows])
    np.testing.assert_allclose(Stored(table, "cls", centre)[rows], (vectors - centre)[rows], 1e-5)
    assert whole[rows[:0]].shape == (0, DIM)


def test_every_score_equals_that_of_a_tensor(case, monkeypatch):
    table, vectors, labels, ids = case
    small = column_of(table, "cls")
    assert torch.equal(small, torch.from_numpy(vectors))
    monkeypatch.setattr(stored, "KEPT_BYTES", 1000)
    read = []
    whole = VectorSet.read

    def counted(*arguments):
        read.append(whole(*arguments))
        return read[-1]

    monkeypatch.setattr(VectorSet, "read", counted)
    large = column_of(table, "cls")
    assert isinstance(large, Stored)
    one, other = (LabelledFeatures(x, torch.from_numpy(labels), ids) for x in (small, large))
    for scores in (
        retrieval_scores,
        few_shot_scores,
        lambda rows, queries: [logistic_scores(rows, queries, 4)],
    ):
        for (score, details), (again, also) in zip(
            scores(one, None), scores(other, None), strict=True
        ):
            np.testing.assert_allclose(score.terms, again.terms, atol=1e-9)
            assert details.keys() == also.keys()
            assert score.value > 0.35
    assert read and max(map(len, read)) < 50  # a part has 43 rows
