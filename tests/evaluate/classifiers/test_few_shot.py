"""Nearest class means from a few images, against a loop and scikit-learn."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.classifiers import few_shot
from pipeline.evaluate.classifiers.few_shot import few_shot_scores
from pipeline.evaluate.classifiers.logistic import logistic_scores
from pipeline.evaluate.classifiers.split import held_out
from pipeline.evaluate.features import LabelledFeatures
from tests.evaluate.reading import Read


def images(n, classes=6, dim=10, seed=0, noise=1.0, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(77).standard_normal((classes, dim))
    features = 5 + spread * (centres[labels] + noise * rng.standard_normal((n, dim)))
    ids = rng.integers(0, 256, (n, 16)).astype(np.uint8)
    return LabelledFeatures(
        torch.from_numpy(features).float(), torch.from_numpy(labels).long(), ids
    )


def units(features, centre):
    moved = features.numpy().astype(float) - centre
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)


def test_all_images_of_a_class_equal_scikit_learns_nearest_centroid():
    """With as many shots as there are images nothing is left to chance."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    reference, queries = images(80), images(50, seed=1)
    scores = few_shot_scores(reference, queries, shots=(1000,), draws=2)
    centre = reference.features.numpy().astype(float).mean(0)
    model = neighbors.NearestCentroid().fit(
        units(reference.features, centre), reference.labels.numpy()
    )
    hits = model.predict(units(queries.features, centre)) == queries.labels.numpy()
    (score, details) = scores[0]
    np.testing.assert_array_equal(score.terms[:, 0], hits)
    np.testing.assert_array_equal(score.ids, queries.ids)
    assert score.name == "few_shot1000_top1" and details["spread"] == 0.0
    assert details["classes_with_fewer"] == details["classes"] == 6
    assert details["learnt_from"] == 80 and 0.5 < score.value < 1


def test_each_draw_equals_a_loop(monkeypatch):
    """One image a class is the nearest of the drawn images."""
    reference, queries = images(60), images(30, seed=1)
    drawn = []
    ranks = few_shot._ranks

    def watched(names, classes, key):
        drawn.append(ranks(names, classes, key))
        return drawn[-1]

    monkeypatch.setattr(few_shot, "_ranks", watched)
    (score, details), (five, _) = few_shot_scores(reference, queries, shots=(1, 5), draws=3)
    centre = reference.features.numpy().astype(float).mean(0)
    known, asked = units(reference.features, centre), units(queries.features, centre)
    hits = np.zeros((3, 30))
    for draw, rank in enumerate(drawn):
        for c in range(6):  # 0, 1, 2 … once in each class
            of_class = np.sort(rank[reference.labels.numpy() == c])
            assert of_class.tolist() == list(range(len(of_class)))
        first = np.flatnonzero(rank == 0)
        for i in range(30):
            distance = [np.linalg.norm(asked[i] - known[row]) for row in first]
            answer = int(reference.labels[first[int(np.argmin(distance))]])
            hits[draw, i] = answer == int(queries.labels[i])
    np.testing.assert_allclose(score.terms[:, 0], hits.mean(0))
    assert details["draws"] == pytest.approx(hits.mean(1).tolist())
    assert details["spread"] == pytest.approx(hits.mean(1).std(ddof=1))
    assert len({rank.tobytes() for rank in drawn}) == 3
    monkeypatch.setattr(few_shot, "AT_ONCE", 25)
    again = few_shot_scores(reference, queries, shots=(1, 5), draws=3)
    np.testing.assert_array_equal(again[0][0].terms, score.terms)
    np.testing.assert_array_equal(again[1][0].terms, five.terms)


def test_one_set_asks_what_it_holds_out():
    every = images(300)
    scores = few_shot_scores(every)
    out = held_out(every.labels, every.ids)
    assert [score.name for score, _ in scores] == [f"few_shot{n}_top1" for n in (1, 5, 10)]
    for score, details in scores:
        np.testing.assert_array_equal(score.ids, every.ids[out])
        assert details["asked"] == out.sum() and len(details["draws"]) == 5
    values = [score.value for score, _ in scores]
    assert values[0] < values[2] and values[0] > 1.5 / 6


def test_asked_images_are_not_learnt_from_and_missing_classes_are_wrong():
    reference, queries = images(60), images(40, seed=1)
    queries.features[:20], queries.ids[:20] = reference.features[:20], reference.ids[:20]
    queries.labels[:20] = reference.labels[:20]
    reference.labels[30:35] = -1
    queries.labels[20:24] = 99
    score, details = few_shot_scores(reference, queries, shots=(1000,), draws=1)[0]
    assert details["learnt_from"] == 35
    assert details["unanswerable"] == 4 and score.terms[20:24, 0].sum() == 0
    with pytest.raises(DataError, match="0 labelled images to learn from and 55 others"):
        few_shot_scores(reference, reference)
    with pytest.raises(DataError, match="no ids"):
        few_shot_scores(LabelledFeatures(reference.features, reference.labels))


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    every, queries = images(200), images(50, seed=1)
    order = np.random.default_rng(0).permutation(200)
    moved = LabelledFeatures(every.features[order], every.labels[order], every.ids[order])
    first = [score.terms.tolist() for score, _ in few_shot_scores(every, queries)]
    assert first == [score.terms.tolist() for score, _ in few_shot_scores(moved, queries)]
    assert first != [score.terms.tolist() for score, _ in few_shot_scores(every, queries, seed=1)]


def test_features_that_differ_little_are_told_apart():
    """As those of an untrained backbone: 4e-5 of their length."""
    plain = few_shot_scores(images(300), images(100, seed=1))[2][0].value
    close = few_shot_scores(images(300, spread=4e-5), images(100, seed=1, spread=4e-5))[2][0]
    assert close.value == pytest.approx(plain, abs=0.05) and plain > 0.6


def test_what_is_asked_says_nothing_to_what_is_learnt():
    """The vectors of images that are asked are not in the mean, nor in a class, of one set or two:
    whatever they are, other answers stay as they are."""
    every, queries = images(200), images(40, seed=1)
    out = torch.from_numpy(held_out(every.labels, every.ids))
    queries.ids[:20] = every.ids[:20]
    for reference, asked, rows in ((every, None, out), (every, queries, torch.arange(200) < 20)):
        before = few_shot_scores(reference, asked)
        strange = LabelledFeatures(every.features.clone(), every.labels, every.ids)
        strange.features[rows.nonzero()[0]] = 1e6
        after = few_shot_scores(strange, asked)
        skipped = 1 if asked is None else 0  # its own answer
        for (one, _), (other, _) in zip(before, after, strict=True):
            assert (one.terms != other.terms).any(1).sum() <= skipped


def test_a_large_reference_is_gone_through_in_blocks(monkeypatch):
    every, queries = images(200), images(40, seed=1)
    wanted = few_shot_scores(every, queries)
    read = Read(every.features)
    monkeypatch.setattr(few_shot, "AT_ONCE", 200)
    monkeypatch.setattr(few_shot, "MEANS_AT_ONCE", 150)  # those of two draws
    scores = few_shot_scores(LabelledFeatures(read, every.labels, every.ids), queries)
    for (one, details), (other, also) in zip(wanted, scores, strict=True):
        np.testing.assert_array_equal(one.terms, other.terms)
        assert details == also
    assert max(read.rows) == 20


def test_one_class_and_equal_images():
    every = images(20)
    every.labels[:] = 3
    assert [score.value for score, _ in few_shot_scores(every)] == [1.0] * 3
    every = images(40)
    every.features[:] = 1.0  # collapsed: the lowest class wins
    lowest = [(score.ids, score.terms[:, 0]) for score, _ in few_shot_scores(every)]
    for ids, hits in lowest:
        asked = [int(every.labels[(every.ids == i).all(1)][0]) for i in ids]
        np.testing.assert_array_equal(hits, np.asarray(asked) == 0)


@pytest.mark.parametrize("score", [few_shot_scores, lambda *sets: logistic_scores(*sets, 6)])
def test_vectors_that_are_no_numbers_have_no_score(score):
    every, queries = images(200), images(40, seed=1)
    queries.features[7, 3] = torch.inf
    with pytest.raises(DataError, match="no finite numbers, 1 rows"):
        score(every, queries)
    every.features[3, 3] = torch.nan
    with pytest.raises(DataError, match="no finite numbers, 1 rows"):
        score(every, None)
