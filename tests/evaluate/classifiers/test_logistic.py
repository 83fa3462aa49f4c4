"""Logistic regression against scikit-learn's, and what it makes of odd sets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.errors import DataError
from pipeline.evaluate.classifiers.logistic import Problem, logistic_scores
from pipeline.evaluate.classifiers.split import held_out
from pipeline.evaluate.features import LabelledFeatures


def features(x: np.ndarray, y: np.ndarray, seed: int = 0) -> LabelledFeatures:
    ids = np.random.default_rng(seed).integers(0, 256, (len(x), 16), np.uint8)
    labels = torch.from_numpy(np.asarray(y, np.int64))
    return LabelledFeatures(torch.from_numpy(np.asarray(x, np.float32)), labels, ids)


def clusters(count: int, classes: int = 3, seed: int = 0) -> LabelledFeatures:
    """Classes that lie far apart, so that any classifier that works is right."""
    y = np.arange(count) % classes
    x = 9 * np.eye(classes, 8)[y] + np.random.default_rng(seed).normal(size=(count, 8))
    return features(x, y, seed)


def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data, data.target


def standard_digits() -> tuple[np.ndarray, np.ndarray]:
    x, y = digits()
    return StandardScaler().fit_transform(x), y


@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 100.0])
def test_a_fit_is_that_of_scikit_learn(c: float) -> None:
    x, y = (part[:600] for part in standard_digits())
    theirs = LogisticRegression(C=c, tol=1e-7, max_iter=5000).fit(x, y)
    fit = Problem.of(torch.from_numpy(x).float(), torch.from_numpy(y), 10).fit(c)
    logits = torch.from_numpy(x) @ fit.weights[:-1] + fit.weights[-1]
    probabilities = logits.softmax(1).numpy()
    assert fit.converged
    np.testing.assert_allclose(probabilities, theirs.predict_proba(x), atol=2e-3)
    losses = [
        -np.log(p[np.arange(600), y]).mean() + np.square(w).sum() / (2 * c * 600)
        for p, w in (
            (probabilities, fit.weights[:-1].numpy()),
            (theirs.predict_proba(x), theirs.coef_),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_fit_does_not_depend_on_where_it_begins() -> None:
    x, y = standard_digits()
    problem = Problem.of(torch.from_numpy(x).float(), torch.from_numpy(y), 10)
    elsewhere = torch.randn(65, 10, generator=torch.Generator().manual_seed(0)).double()
    # A number added to all intercepts changes no probability.
    a, b = (
        (problem.x.double() @ fit.weights[:-1] + fit.weights[-1]).softmax(1)
        for fit in (problem.fit(0.1), problem.fit(0.1, elsewhere))
    )
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def best_of_scikit_learn(
    train: tuple[np.ndarray, np.ndarray], asked: tuple[np.ndarray, np.ndarray], cs: list[float]
) -> list[float]:
    """The accuracy of each C."""
    scaler = StandardScaler().fit(train[0])
    accuracies = []
    for c in cs:
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-6)
        model.fit(scaler.transform(train[0]), train[1])
        accuracies.append(model.score(scaler.transform(asked[0]), asked[1]))
    return accuracies


@pytest.mark.long
def test_digits_end_to_end_within_a_third_of_a_point() -> None:
    x, y = digits()
    order = np.random.default_rng(0).permutation(len(x))
    train, asked = order[:900], order[900:]
    score, details = logistic_scores(
        features(x[train], y[train], 1), features(x[asked], y[asked], 2), 10
    )
    c = details["c"]
    same_c, *others = best_of_scikit_learn(
        (x[train], y[train]), (x[asked], y[asked]), [c, 1e-2, 1e-1, 1]
    )
    assert score.value == pytest.approx(same_c, abs=0.003)
    assert score.value > max(others) - 0.015  # chosen without a look at those that are asked
    assert details["trained_on"] + details["chosen_on"] == 900 and details["asked"] == 897
    assert f"{c:.3g}" in details["by_c"] and details["converged"]
    again, _ = logistic_scores(features(x[train], y[train], 1), features(x[asked], y[asked], 2), 10)
    assert np.array_equal(again.terms, score.terms)


@pytest.mark.slow
def test_pixels_of_cifar_within_a_third_of_a_point(shared: Path) -> None:
    x, y = cifar(shared)
    train, asked = (x[:4000], y[:4000]), (x[4000:6000], y[4000:6000])
    score, details = logistic_scores(features(*train, 1), features(*asked, 2), 10)
    theirs = best_of_scikit_learn(train, asked, [details["c"]])
    assert score.value == pytest.approx(theirs[0], abs=0.003)
    assert 0.25 < score.value < 0.45


def cifar(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n, 192] of the test images of CIFAR-10, averaged to 8 x 8, and labels; mixed."""
    table = pq.read_table(next((shared / "data" / "cifar10").glob("test-*.parquet")))
    order = np.random.default_rng(0).permutation(len(table))[:6000]
    table = table.take(order)
    images = [Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist()]
    pixels = np.stack([np.asarray(image.reduce(4).convert("RGB")) for image in images])
    return pixels.reshape(len(pixels), -1), np.asarray(table["label"])


def test_without_queries_a_fifth_is_asked_and_the_same_fifth_for_every_model() -> None:
    one = clusters(100)
    score, details = logistic_scores(one, None, 3)
    out = held_out(one.labels, one.ids)
    assert np.array_equal(score.ids, one.ids[out])
    assert score.value == 1.0
    assert details["trained_on"] + details["chosen_on"] + details["asked"] == 100


def test_shuffled_labels_teach_nothing() -> None:
    one = clusters(600, 3)
    one.labels = one.labels[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    score, _ = logistic_scores(one, None, 3)
    assert score.value < 0.48  # chance is a third; 120 images are asked


def test_scale_and_shift_of_the_vectors_do_not_count() -> None:
    """An untrained network gives vectors that differ by a part in a thousand."""
    x, y = digits()
    plain = logistic_scores(features(x, y), None, 10)[0]
    moved = logistic_scores(features(1000 + 0.1 * x, y), None, 10)[0]
    assert moved.value == pytest.approx(plain.value, abs=0.006)


def test_an_image_that_is_asked_does_not_train() -> None:
    """All reference images with label 1 of the wrong kind are also asked: nothing else says so."""
    reference, queries = clusters(90, 3, 1), clusters(30, 3, 2)
    copies = clusters(30, 3, 2)
    copies.labels = (copies.labels + 1) % 3  # what they would teach is wrong
    many = LabelledFeatures(
        torch.cat([reference.features, *[copies.features] * 9]),
        torch.cat([reference.labels, *[copies.labels] * 9]),
        np.concatenate([reference.ids, *[copies.ids] * 9]),
    )
    score, details = logistic_scores(many, queries, 3)
    assert score.value == 1.0
    assert details["asked_too"] == 270 and details["trained_on"] + details["chosen_on"] == 90


def test_rows_without_labels_are_counted_and_not_used() -> None:
    reference, queries = clusters(90, 3, 1), clusters(30, 3, 2)
    reference.labels[:30] = -1
    reference.features[:30] = 1e6
    queries.labels[3:5] = -1
    score, details = logistic_scores(reference, queries, 3)
    assert details["unlabelled"] == 32 and details["asked"] == 28 == len(score.terms)
    assert score.value == 1.0


def test_a_class_without_images_is_wrong_and_one_of_one_image_trains() -> None:
    reference, queries = clusters(90, 3, 1), clusters(30, 3, 2)
    few = reference.labels != 2
    few[2] = True  # one image of class 2
    one = LabelledFeatures(reference.features[few], reference.labels[few], reference.ids[few])
    score, details = logistic_scores(one, queries, 3)
    assert details["classes_of_one"] == 1 and details["unanswerable"] == 0
    assert score.value > 0.9  # one image is enough where classes lie apart
    few[2] = False
    none = LabelledFeatures(reference.features[few], reference.labels[few], reference.ids[few])
    score, details = logistic_scores(none, queries, 3)
    assert details["classes"] == 2 and details["unanswerable"] == 10
    assert score.value == pytest.approx(20 / 30)


def test_one_class_and_one_image_a_class() -> None:
    one = clusters(20, 1)
    score, details = logistic_scores(one, clusters(9, 3, 2), 3)
    assert details["only_class"] == 0 and score.value == pytest.approx(3 / 9)
    score, details = logistic_scores(clusters(3, 3, 4), clusters(30, 3, 2), 3)
    assert details["chosen_on"] == 0 and details["c"] == 1 and score.value > 0.6


def test_what_cannot_be_scored_is_named() -> None:
    one = clusters(9)
    with pytest.raises(DataError, match="0 labelled images are left to train"):
        logistic_scores(one, one, 3)
    with pytest.raises(DataError, match="no image ids"):
        logistic_scores(LabelledFeatures(one.features, one.labels), None, 3)
    with pytest.raises(DataError, match="0 to ask"):
        logistic_scores(clusters(3, 3), None, 3)
