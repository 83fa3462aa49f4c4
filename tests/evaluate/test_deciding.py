"""Scores that choose the best checkpoint: each name that a recipe may give is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.config.embedding import DECIDING, VOTERS
from pipeline.errors import DataError
from pipeline.evaluate.deciding import RANK_ME, deciding_score, training_scores
from pipeline.evaluate.features import LabelledFeatures

CLASSES, EACH = 3, 12


def rows(spread: float, seed: int = 0) -> LabelledFeatures:
    """Features around one axis for each class; the wider they spread, the less they say."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * EACH) % CLASSES
    features = torch.eye(8)[labels] + spread * torch.randn(len(labels), 8, generator=g)
    ids = np.random.default_rng(seed).integers(0, 256, (len(labels), 16), dtype=np.uint8)
    return LabelledFeatures(features, labels, ids)


@pytest.mark.parametrize("name", [*DECIDING, *(f"knn{k}_top1" for k in VOTERS)])
def test_every_name_of_a_recipe_is_computed_and_higher_is_better(name: str) -> None:
    good, bad = (deciding_score(name, x, x) for x in (rows(0.05), rows(9.0)))
    if name == RANK_ME:  # three axes against noise in all eight: it knows nothing of classes
        assert 1 < good < bad <= 8
    else:
        assert good == pytest.approx(1.0)
        assert bad < 0.9
        assert deciding_score(name, rows(0.05), rows(0.05, seed=1)) == pytest.approx(1.0)


def test_the_score_that_decides_is_the_one_of_its_name() -> None:
    reference = rows(0.5)
    scores = training_scores(reference, reference, 5, "few_shot1_top1")
    assert scores.decided_by == "few_shot1_top1" and scores.note == ""
    assert list(scores.values) == ["knn5_top1", RANK_ME, "few_shot1_top1"]
    x = torch.nn.functional.normalize(reference.features.double(), dim=1)
    similar = x @ x.T
    similar.fill_diagonal_(-torch.inf)
    weights, nearest = similar.topk(5)
    hits = 0
    for i in range(len(x)):
        votes = [0.0] * CLASSES
        for weight, j in zip(weights[i].tolist(), nearest[i].tolist(), strict=True):
            votes[int(reference.labels[j])] += np.exp(weight / 0.07)
        hits += int(np.argmax(votes) == int(reference.labels[i]))
    assert scores.values["knn5_top1"] == pytest.approx(hits / len(x))


def test_two_sets_of_one_class_say_nothing() -> None:
    """Each answer would be right, whatever the features are."""
    votes, asked = rows(9.0), rows(9.0, seed=1)
    votes.labels, asked.labels = torch.full_like(votes.labels, 4), torch.full_like(asked.labels, 4)
    asked.labels[0] = -1
    scores = training_scores(votes, asked, 5, "logistic_top1")
    assert list(scores.values) == [RANK_ME] and not scores.decided_by and scores.guarded is None
    assert "all labelled images of both sets are of one class" in scores.note
    asked.labels[0] = 3  # another class, though nobody votes for it
    assert "knn5_top1" in training_scores(votes, asked, 5).values


def test_two_sets_without_labels_are_refused() -> None:
    plain = rows(0.5)
    plain.labels = torch.full_like(plain.labels, -1)
    with pytest.raises(DataError):
        training_scores(rows(0.5), plain, 5)
