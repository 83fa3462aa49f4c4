"""Copy detection, against plain loops, scikit-learn, and copies that are planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.neighbours import copies as module
from pipeline.evaluate.neighbours.copies import copy_scores
from pipeline.evaluate.score import Score

NAMES = ("blur", "crop", "grey")


def planted(
    noise: float, count: int = 40, width: int = 6, seed: int = 0
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """A database, its ids, and three copies of each of its first 25 rows, with noise on them."""
    generator = torch.Generator().manual_seed(seed)
    database = torch.randn(count, width, generator=generator)
    ids = np.random.default_rng(seed).integers(0, 256, (count, 16)).astype(np.uint8)
    changed = torch.randn(25, len(NAMES), width, generator=generator)
    return database, ids, database[:25, None] + noise * changed


def scores(database: torch.Tensor, ids: Any, copies: torch.Tensor) -> dict[str, Score]:
    both = copy_scores(database, ids, copies, ids[: len(copies)], NAMES)
    return {score.name: score for score, _ in both}


def test_a_copy_like_its_image_is_always_found() -> None:
    database, ids, copies = planted(0.0)
    found = copy_scores(database, ids, copies, ids[:25], NAMES)
    assert [score.value for score, _ in found] == [1.0, 1.0]
    assert found[0][1]["attacks"] == {"blur": 1.0, "crop": 1.0, "grey": 1.0}
    assert found[0][1]["copies"] == 75 and found[0][1]["database"] == 40


def test_a_model_that_says_the_same_of_all_finds_none() -> None:
    database, ids, copies = planted(0.0)
    same = scores(torch.ones_like(database), ids, torch.ones_like(copies))
    assert same["copies_recall1"].value <= 1 / 25  # one image is nearest to all
    assert same["copies_map"].value <= 1 / 25


def test_copies_of_others_are_never_right() -> None:
    database, ids, copies = planted(0.0)
    swapped = copies.roll(1, 0)
    wrong = scores(database, ids, swapped)
    assert wrong["copies_recall1"].value == 0 and wrong["copies_map"].value < 0.2


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_scores_are_those_of_a_loop_and_of_scikit_learn(noise: float) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    database, ids, copies = planted(noise)
    ours = scores(database, ids, copies)
    truth, similarity, first = [], [], []
    for i in range(25):
        for copy in copies[i]:
            cosines = torch.nn.functional.cosine_similarity(database.double(), copy.double()[None])
            best = cosines.argsort(descending=True)[: module.CANDIDATES].tolist()
            first.append(best[0] == i)
            truth += [row == i for row in best]
            similarity += cosines[best].float().tolist()
    recall = sum(truth) / 75  # of right pairs that are candidates at all
    expected = metrics.average_precision_score(truth, similarity) * recall
    assert ours["copies_recall1"].value == pytest.approx(np.mean(first), abs=1e-6)
    assert ours["copies_map"].value == pytest.approx(expected, abs=1e-6)


def test_few_steps_are_close_to_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    database, ids, copies = planted(1.0)
    exact = scores(database, ids, copies)["copies_map"].value
    monkeypatch.setattr(module, "STEPS", 16)
    few = scores(database, ids, copies)["copies_map"]
    assert few.terms.shape == (25, 33)
    assert exact - 0.05 < few.value < exact  # a step counts as its end, where precision is lowest


def test_equal_similarities_count_together() -> None:
    """As precision at a threshold does: what is equal is either all taken or not at all."""
    similarities = np.full((1, 1, 4), 0.5, np.float32)
    right = np.array([[[True, False, False, False]]])
    terms = module._precision_terms(similarities, right)
    assert (
        Score("copies_map", terms, np.zeros((1, 16), np.uint8), "average_precision").value == 0.25
    )


def test_an_interval_holds_the_value_of_more_images() -> None:
    database, ids, copies = planted(0.9)
    few = scores(database, ids, copies)["copies_map"]
    many = [scores(*planted(0.9, seed=seed))["copies_map"].value for seed in range(1, 21)]
    low, high = few.interval().low, few.interval().high
    assert low < np.mean(many) < high and high - low > 0.02


def test_mistakes_are_sentences() -> None:
    database, ids, copies = planted(0.1)
    with pytest.raises(
        DataError, match="25 images that copies were made of are not in the database"
    ):
        copy_scores(database, ids, copies, 255 - ids[:25], NAMES)
    with pytest.raises(DataError, match="there are no copies to be found"):
        copy_scores(database, ids, copies[:0], ids[:0], NAMES)
