"""Scores, answers and shares of the vote from neighbours that were looked for once."""

import math

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours import knn
from pipeline.evaluate.neighbours.knn import knn_scores, predictions
from pipeline.evaluate.neighbours.nearest import Neighbours, SameImages, nearest


def ids_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16)).astype(np.uint8)


def clusters(n, classes=7, width=6, seed=0):
    """Features of which about two thirds are classified right by their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(n, width, generator=generator), labels


def among(reference, queries, k, **options):
    return Neighbours(*nearest(reference, queries, k, **options))


def by_loop(similarities, labels, k, temperature):
    """Class that wins and its share, of one query's neighbours, best first."""
    votes = {}
    for similarity, label in list(zip(similarities, labels, strict=True))[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp((similarity - 1) / temperature)
    if not votes:
        return -1, 0.0
    best = min(votes, key=lambda label: (-votes[label], label))
    return best, votes[best] / sum(votes.values())


def test_golden_hits_of_every_k_from_one_search(shared):
    golden = torch.load(shared / "golden/eval/knn.pt", weights_only=True)
    labels, truth, ks = golden["train_labels"], golden["test_labels"], golden["nb_knn"]
    neighbours = among(golden["train_features"], golden["test_features"], max(ks))
    queries = LabelledFeatures(golden["test_features"], truth, ids_of(len(truth)))
    scores = knn_scores(neighbours, labels, queries, ks, golden["T"])
    assert [score.name for score in scores] == [f"knn{k}_top1" for k in sorted(ks)]
    for score, k in zip(scores, sorted(ks), strict=True):
        assert score.value == pytest.approx(golden["top1"][k], abs=1e-6)
        right = (golden["probas"][k].argmax(1) == truth).double().numpy()
        np.testing.assert_array_equal(score.terms[:, 0], right)


def test_answers_and_shares_equal_a_loop():
    features, labels = clusters(300)
    labels += 10**9  # class numbers may be huge: nothing is as wide as there are classes
    asked, _ = clusters(80, seed=1)
    neighbours = among(features, asked, 30)
    for k in (1, 5, 30):
        answer, share = predictions(neighbours, labels, k, 0.2)
        for i in range(len(asked)):
            expected = by_loop(
                neighbours.similarities[i].double().tolist(),
                labels[neighbours.rows[i]].tolist(),
                k,
                0.2,
            )
            assert (int(answer[i]), float(share[i])) == (expected[0], pytest.approx(expected[1]))


def test_agrees_with_scikit_learn_leave_one_out():
    neighbors = pytest.importorskip("sklearn.neighbors")
    features, labels = clusters(220)
    ids = ids_of(220)
    neighbours = among(features, features, 200, same=SameImages.of(ids, ids))
    scores = knn_scores(neighbours, labels, LabelledFeatures(features, labels, ids))
    assert [s.name for s in scores] == [f"knn{k}_top1" for k in (10, 20, 100, 200)]
    for score, k in zip(scores, knn.KS, strict=True):
        hits = []
        for i in range(len(features)):
            others = np.arange(len(features)) != i
            model = neighbors.KNeighborsClassifier(
                k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
            )
            model.fit(features[others].numpy(), labels[others].numpy())
            hits.append(model.predict(features[i : i + 1].numpy())[0] == int(labels[i]))
        np.testing.assert_array_equal(score.terms[:, 0], hits)
    assert 0.3 < scores[1].value < 0.95


def votes_of_20(neighbours, labels, widest):
    """Votes [Q, 40] of 20 neighbours, weighted by a softmax over the `widest` nearest."""
    weights = (neighbours.similarities[:, :widest] / 0.07).softmax(1)[:, :20]
    chosen = torch.nn.functional.one_hot(labels[neighbours.rows[:, :20]], 40)
    return (weights[:, :, None] * chosen).sum(1)


def test_weights_over_the_largest_k_or_over_each_k_alone_give_one_answer():
    """A run's `knn20_top1` stays what it was when k = 200 is asked for too."""
    features, labels = clusters(1000, classes=40)
    asked, truth = clusters(400, classes=40, seed=1)
    neighbours = among(features, asked, 200)
    of_all, alone = (votes_of_20(neighbours, labels, widest) for widest in (200, 20))
    factor = (alone / of_all).nan_to_num(0).amax(1, keepdim=True)
    torch.testing.assert_close(of_all * factor, alone)
    assert not torch.allclose(of_all, alone)
    answer, _ = predictions(neighbours, labels, 20)
    assert torch.equal(answer, alone.argmax(1)) and torch.equal(answer, of_all.argmax(1))
    score = knn_scores(neighbours, labels, LabelledFeatures(asked, truth, ids_of(400)), (20, 200))[
        0
    ]
    reference, queries = LabelledFeatures(features, labels), LabelledFeatures(asked, truth)
    assert knn.knn_classify(reference, queries, 20) == {20: score.value}


def test_of_equal_votes_the_lowest_class_wins_and_blocks_do_not_matter(monkeypatch):
    neighbours = Neighbours(torch.full((4, 4), 0.5), torch.tensor([[3, 1, 2, 0]]).repeat(4, 1))
    labels = torch.tensor([9, 4, 9, 4])
    for at_once in (1, 4, 1 << 21):
        monkeypatch.setattr(knn, "VOTES_AT_ONCE", at_once)
        answer, share = predictions(neighbours, labels, 4)
        assert answer.tolist() == [4] * 4 and share.tolist() == [0.5] * 4


def test_unlabelled_queries_do_not_count_and_a_query_without_neighbours_is_wrong():
    neighbours = Neighbours(
        torch.tensor([[0.9, 0.8], [-torch.inf, -torch.inf], [0.7, -torch.inf], [0.9, 0.1]]),
        torch.tensor([[0, 1], [-1, -1], [1, -1], [0, 1]]),
    )
    labels, ids = torch.tensor([3, 5]), ids_of(4)
    queries = LabelledFeatures(torch.zeros(4, 1), torch.tensor([3, 3, 5, -1]), ids)
    answer, share = predictions(neighbours, labels, 2)
    assert answer.tolist() == [3, -1, 5, 3] and share[1:3].tolist() == [0.0, 1.0]
    (score,) = knn_scores(neighbours, labels, queries, [2])
    assert score.terms.tolist() == [[1, 1], [0, 1], [1, 1]]
    np.testing.assert_array_equal(score.ids, ids[:3])


def test_fewer_images_than_neighbours_and_one_class():
    features, _ = clusters(6)
    labels, ids = torch.full((6,), 2), ids_of(6)
    neighbours = among(features, features, 200, same=SameImages.of(ids, ids))
    assert (neighbours.rows >= 0).sum(1).tolist() == [5] * 6
    scores = knn_scores(neighbours, labels, LabelledFeatures(features, labels, ids))
    assert [score.value for score in scores] == [1.0] * 4
    none = predictions(Neighbours(torch.zeros(0, 3), torch.zeros(0, 3).long()), labels)
    assert [len(x) for x in none] == [0, 0]


def test_mistakes_are_sentences():
    features, labels = clusters(50)
    queries, ids = LabelledFeatures(features, labels, ids_of(50)), ids_of(50)
    neighbours = among(features, features, 10)
    with pytest.raises(DataError, match="vote of 20 neighbours was asked for, and only 10"):
        knn_scores(neighbours, labels, queries, (5, 20))
    with pytest.raises(DataError, match="have no label, so they have no class to vote for"):
        knn_scores(neighbours, labels - 3, queries, (5,))
    with pytest.raises(DataError, match="none of the 50 queries has a label"):
        knn_scores(neighbours, labels, LabelledFeatures(features, labels - 99, ids), (5,))
    with pytest.raises(DataError, match="the queries have no ids"):
        knn_scores(neighbours, labels, LabelledFeatures(features, labels), (5,))
