"""Average precision and recall of full rankings, against scikit-learn and a loop."""

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours import retrieval
from pipeline.evaluate.neighbours.retrieval import retrieval_scores
from tests.evaluate.reading import Read

LIMITS = ("AT_ONCE", "OWN_AT_ONCE", "BLOCK_VALUES", "KEPT_BYTES")


def images(n, classes=5, dim=6, seed=0, kinds=0):
    """Clusters; with `kinds` only so many different vectors, so that many are equally similar."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(77).standard_normal((classes, dim))
    features = centres[labels] + rng.standard_normal((n, dim))
    if kinds:
        features = features[rng.integers(0, kinds, n)]
    ids = rng.integers(0, 256, (n, 16)).astype(np.uint8)
    return LabelledFeatures(
        torch.from_numpy(features).float(), torch.from_numpy(labels).long(), ids
    )


def by_id(scores):
    """Value of each image by name and id."""
    return {
        score.name: {
            row.tobytes(): value for row, value in zip(score.ids, score.terms[:, 0], strict=True)
        }
        for score, _ in scores
    }


def by_loop(reference, queries, recall_at):
    """Each query's ranking written out, with scikit-learn's average precision."""
    average_precision = pytest.importorskip("sklearn.metrics").average_precision_score
    wanted = {f"retrieval_{x}": {} for x in ("map", *(f"recall{k}" for k in recall_at))}
    names = [x.tobytes() for x in reference.ids]
    for feature, label, asked in zip(queries.features, queries.labels, queries.ids, strict=True):
        if label < 0:
            continue
        rows = [
            j for j in range(len(names)) if names[j] != asked.tobytes() and reference.labels[j] >= 0
        ]
        similarity = torch.cosine_similarity(
            reference.features[rows].double(), feature.double()[None]
        )
        similarity = (similarity * 1e9).round().numpy()  # equal vectors differ in the last digit
        relevant = (reference.labels[rows] == label).numpy()
        ap = average_precision(relevant, similarity) if relevant.any() else 0.0
        wanted["retrieval_map"][asked.tobytes()] = ap
        best = similarity[relevant].max() if relevant.any() else -np.inf
        before = ((similarity >= best) & ~relevant).sum()
        for k in recall_at:
            hit = bool(relevant.any()) and before < k
            wanted[f"retrieval_recall{k}"][asked.tobytes()] = float(hit)
    return wanted


def assert_equal(scores, wanted):
    ours = by_id(scores)
    assert ours.keys() == wanted.keys()
    for name, values in wanted.items():
        assert ours[name].keys() == values.keys()
        for image, value in values.items():
            assert ours[name][image] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("kinds", [0, 9])
def test_two_sets_equal_scikit_learn(kinds, monkeypatch):
    reference, queries = images(150, kinds=kinds), images(40, seed=1)
    queries.features[:20] = reference.features[:20]
    queries.ids[:6] = reference.ids[:6]  # these do not retrieve themselves
    reference.labels[10:20] = -1
    queries.labels[30:33], queries.labels[33] = -1, 17  # of 17 the reference has none
    wanted = by_loop(reference, queries, (1, 5, 10))
    for numbers in ((1 << 23, 1 << 25, 1 << 24, 1 << 30), (300, 99, 64, 1 << 30), (1, 1, 1, 0)):
        for name, number in zip(LIMITS, numbers, strict=True):
            monkeypatch.setattr(retrieval, name, number)
        scores = retrieval_scores(reference, queries)
        assert_equal(scores, wanted)
    details = {"queries": 37, "of": 37, "reference": 140, "without_any": 1}
    assert all(given == details for _, given in scores)
    assert 0.2 < scores[0][0].value < 0.95


def test_one_set_is_asked_against_all_its_other_images():
    every = images(90)
    every.ids[5] = every.ids[6]  # one image twice: neither retrieves the other
    scores = retrieval_scores(every, recall_at=(1, 3))
    ours, wanted = by_id(scores), by_loop(every, every, (1, 3))
    for name in wanted:
        twin = every.ids[5].tobytes()  # two rows with one id
        for image in wanted[name].keys() - {twin}:
            assert ours[name][image] == pytest.approx(wanted[name][image], abs=1e-6)


def test_a_perfect_ranking_and_the_worst_one():
    features = torch.eye(4).repeat_interleave(5, 0)
    labels, ids = torch.arange(4).repeat_interleave(5), images(20).ids
    perfect = retrieval_scores(LabelledFeatures(features, labels, ids))
    assert [score.value for score, _ in perfect] == [1.0] * 4
    # All alike: precision is that of the class everywhere, and no first place is deserved.
    alike = retrieval_scores(LabelledFeatures(torch.ones(20, 4), labels, ids))
    assert [score.value for score, _ in alike] == [pytest.approx(4 / 19), 0.0, 0.0, 0.0]
    one_class = retrieval_scores(LabelledFeatures(features, torch.zeros(20).long(), ids))
    assert [score.value for score, _ in one_class] == [1.0] * 4
    alone = retrieval_scores(LabelledFeatures(features, torch.arange(20), ids))
    assert [score.value for score, _ in alone] == [0.0] * 4
    assert alone[0][1]["without_any"] == 20


def test_many_queries_are_sampled_by_their_ids():
    every = images(200)
    some = retrieval_scores(every, limit=30)
    assert some[0][1] == {"queries": 30, "of": 200, "reference": 200, "without_any": 0}
    whole = by_id(retrieval_scores(every))
    for name, values in by_id(some).items():
        assert values.items() <= whole[name].items()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    moved = LabelledFeatures(every.features[order], every.labels[order], every.ids[order.numpy()])
    assert by_id(retrieval_scores(moved, limit=30)) == by_id(some)
    assert by_id(retrieval_scores(every, limit=30, seed=1)).items() != by_id(some).items()


@pytest.mark.parametrize("classes", [2, 30])
def test_a_large_reference_is_never_in_memory_whole(classes, monkeypatch):
    """Read like a tensor, in blocks of 50 rows; of two classes few queries are counted at once."""
    every = images(400, classes=classes)
    read = Read(every.features)
    wanted = by_id(retrieval_scores(every, limit=20))
    monkeypatch.setattr(retrieval, "KEPT_BYTES", 0)
    monkeypatch.setattr(retrieval, "MIDDLE_ROWS", 50)
    monkeypatch.setattr(retrieval, "BLOCK_VALUES", 50 * 6)
    monkeypatch.setattr(retrieval, "OWN_AT_ONCE", 900)
    scores = retrieval_scores(LabelledFeatures(read, every.labels, every.ids), limit=20)
    for name, values in by_id(scores).items():
        assert values == pytest.approx(wanted[name], abs=1e-6)
    assert max(read.rows) == 50
    passes = sum(read.rows) / 400
    assert passes < (2.5 if classes == 30 else 25)


def test_mistakes_are_sentences():
    every = images(20)
    unlabelled = LabelledFeatures(every.features, torch.full((20,), -1), every.ids)
    with pytest.raises(DataError, match="20 labelled reference images and 0 labelled queries"):
        retrieval_scores(every, unlabelled)
    with pytest.raises(DataError, match="no ids"):
        retrieval_scores(LabelledFeatures(every.features, every.labels))
    with pytest.raises(DataError, match="width 6, queries 4"):
        retrieval_scores(every, images(5, dim=4))
