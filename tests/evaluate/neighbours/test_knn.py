import math

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours import knn, nearest
from pipeline.evaluate.neighbours.nearest import SameImages


def by_loop(reference, labels, query, classes, k, temperature, widest):
    """The vote for one query, written out."""
    similarity = [float(torch.dot(r / r.norm(), query / query.norm())) for r in reference.double()]
    order = sorted(range(len(similarity)), key=lambda i: -similarity[i])
    weight = [math.exp(similarity[i] / temperature) for i in order[:widest]]
    votes = [0.0] * classes
    for i, w in list(zip(order, weight, strict=False))[:k]:
        votes[int(labels[i])] += w / sum(weight)
    return votes


def data(n=60, q=17, width=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(0, classes, (n + q,), generator=generator)
    x = centres[labels] + torch.randn(n + q, width, generator=generator)
    return x[:n], labels[:n], x[n:], labels[n:]


def ids_of(count):
    return np.random.default_rng(3).integers(0, 256, (count, 16)).astype(np.uint8)


def classify(reference, labels, queries, truth, *others, ids=(None, None), **options):
    voters, asked = (
        LabelledFeatures(reference, labels, ids[0]),
        LabelledFeatures(queries, truth, ids[1]),
    )
    return knn.knn_classify(voters, asked, *others, **options)


def test_equals_the_reference(shared):
    golden = torch.load(shared / "golden/eval/knn.pt", weights_only=True)
    reference, labels = golden["train_features"], golden["train_labels"]
    queries, truth = golden["test_features"], golden["test_labels"]
    ks = golden["nb_knn"]
    ours = classify(reference, labels, queries, truth, ks, golden["T"])
    assert ours == pytest.approx(golden["top1"], abs=1e-6)
    neighbours = nearest.Neighbours(*nearest.nearest(reference, queries, max(ks)))
    answer, share = knn.predictions(neighbours, labels, max(ks), golden["T"])
    expected = golden["probas"][max(ks)].max(1)
    assert torch.equal(answer, expected.indices)
    torch.testing.assert_close(share.float(), expected.values, atol=2e-6, rtol=1e-5)


def test_agrees_with_scikit_learn_and_does_not_depend_on_the_chunks(monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors")
    reference, labels, queries, truth = data(300, 80)
    model = neighbors.KNeighborsClassifier(
        9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    model.fit(reference.numpy(), labels.numpy())
    expected = model.score(queries.numpy(), truth.numpy())
    assert classify(reference, labels, queries, truth, 9) == {9: pytest.approx(expected)}
    whole = nearest.nearest(reference, queries, 9)
    monkeypatch.setattr(nearest, "SIMILARITIES_AT_ONCE", 700)  # two queries at a time
    parts = nearest.nearest(reference, queries, 9)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    assert classify(reference, labels, queries, truth, 9) == {9: pytest.approx(expected)}


def test_leave_one_out_never_finds_itself(monkeypatch):
    reference, *_ = data()
    monkeypatch.setattr(nearest, "SIMILARITIES_AT_ONCE", 60 * 7)
    _, rows = nearest.nearest(reference, reference, 59, SameImages.of(ids_of(60), ids_of(60)))
    for i, others in enumerate(rows.tolist()):
        assert sorted(others) == [j for j in range(60) if j != i]
    # Every image twice with a wrong label on the copy: only itself would be right.
    twice = torch.cat((torch.eye(6), torch.eye(6)))
    wrong = torch.cat((torch.arange(6), (torch.arange(6) + 1) % 6))
    alone = classify(twice, wrong, twice, wrong, 1, ids=(ids_of(12), ids_of(12)))
    assert alone == {1: 0.0}


def test_no_image_votes_for_one_with_its_own_id(monkeypatch):
    rng = np.random.default_rng(0)
    reference, labels, queries, truth = data(40, 12)
    ids = rng.integers(0, 256, (46, 16)).astype(np.uint8)
    known, asked = np.concatenate((ids[:38], ids[:2])), np.concatenate((ids[:6], ids[40:]))
    asked[2] = known[5]  # two queries with one id
    labels[3], truth[4] = -1, -1  # of these, one does not vote and one is not asked
    correct = 0
    for i in range(12):
        others = [j for j in range(40) if labels[j] >= 0 and (known[j] != asked[i]).any()]
        votes = by_loop(reference[others], labels[others], queries[i].double(), 4, 7, 0.07, 7)
        correct += int(truth[i] >= 0 and np.argmax(votes) == truth[i])
    for at_once in (1 << 26, 100):  # two queries at a time
        monkeypatch.setattr(nearest, "SIMILARITIES_AT_ONCE", at_once)
        top1 = classify(reference, labels, queries, truth, 7, ids=(known, asked))
        assert top1 == {7: pytest.approx(correct / 11)}
    same = SameImages.of(known, asked)
    pairs = [(i, j) for i in range(12) for j in range(40) if (known[j] == asked[i]).all()]
    assert sorted(zip(same.queries.tolist(), same.rows.tolist(), strict=True)) == pairs


def test_a_query_that_nobody_is_left_to_vote_for_is_wrong():
    one, label, ids = (
        torch.ones(1, 3),
        torch.zeros(1, dtype=torch.int64),
        np.ones((1, 16), np.uint8),
    )
    assert classify(one, label, one, label, 5) == {5: 1.0}
    assert classify(one, label, one, label, 5, ids=(ids, ids)) == {5: 0.0}


def test_fewer_images_than_neighbours_and_unknown_labels():
    reference, labels, queries, truth = data(5, 6)
    assert set(classify(reference, labels, queries, truth, (3, 20))) == {3, 20}
    expected = classify(reference[:3], labels[:3], queries[2:], truth[2:], 20)
    unknown, asked = labels.clone(), truth.clone()
    unknown[3:], asked[:2] = -1, -1
    assert classify(reference, unknown, queries, asked, 20) == expected


def test_mistakes_are_sentences():
    reference, labels, queries, truth = data(5, 6)
    with pytest.raises(DataError, match="0 labelled reference images and 6 labelled queries"):
        classify(reference, labels - 9, queries, truth)
    with pytest.raises(DataError, match="width 8, queries 7"):
        nearest.nearest(reference, queries[:, 1:], 2)
    with pytest.raises(DataError, match="2 nearest of 0 images"):
        nearest.nearest(reference[:0], reference, 2)
