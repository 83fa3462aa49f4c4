import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures
from pipeline.evaluate.neighbours import knn, nearest


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
    ours = classify(reference, labels, queries, truth, 5, ks, golden["T"])
    assert ours == pytest.approx(golden["top1"], abs=1e-6)
    similarities, rows = nearest.nearest(reference, queries, max(ks))
    votes = knn.knn_votes(similarities, labels[rows], 5, ks, golden["T"])
    for k in ks:
        torch.testing.assert_close(votes[k], golden["probas"][k], atol=2e-6, rtol=1e-5)


def test_votes_equal_a_loop():
    reference, labels, queries, _ = data()
    similarities, rows = nearest.nearest(reference, queries, 10)
    votes = knn.knn_votes(similarities, labels[rows], 4, [3, 10], 0.1)
    for k in (3, 10):
        for i, query in enumerate(queries.double()):
            expected = by_loop(reference, labels, query, 4, k, 0.1, 10)
            torch.testing.assert_close(votes[k][i], torch.tensor(expected), atol=1e-5, rtol=0)


def test_agrees_with_scikit_learn_and_does_not_depend_on_the_chunks(monkeypatch):
    neighbors = pytest.importorskip("sklearn.neighbors")
    reference, labels, queries, truth = data(300, 80)
    model = neighbors.KNeighborsClassifier(
        9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    model.fit(reference.numpy(), labels.numpy())
    expected = model.score(queries.numpy(), truth.numpy())
    assert classify(reference, labels, queries, truth, 4, 9) == {9: pytest.approx(expected)}
    whole = nearest.nearest(reference, queries, 9)
    monkeypatch.setattr(nearest, "SIMILARITIES_AT_ONCE", 700)  # two queries at a time
    parts = nearest.nearest(reference, queries, 9)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])
    assert classify(reference, labels, queries, truth, 4, 9) == {9: pytest.approx(expected)}


def test_leave_one_out_never_finds_itself(monkeypatch):
    reference, *_ = data()
    monkeypatch.setattr(nearest, "SIMILARITIES_AT_ONCE", 60 * 7)
    _, rows = nearest.nearest(reference, reference, 59, leave_one_out=True)
    for i, others in enumerate(rows.tolist()):
        assert sorted(others) == [j for j in range(60) if j != i]
    # Every image twice with a wrong label on the copy: only itself would be right.
    twice = torch.cat((torch.eye(6), torch.eye(6)))
    wrong = torch.cat((torch.arange(6), (torch.arange(6) + 1) % 6))
    alone = classify(twice, wrong, twice, wrong, 6, 1, leave_one_out=True)
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
        top1 = classify(reference, labels, queries, truth, 4, 7, ids=(known, asked))
        assert top1 == {7: pytest.approx(correct / 11)}
    same = nearest.SameImages.of(known, asked)
    pairs = [(i, j) for i in range(12) for j in range(40) if (known[j] == asked[i]).all()]
    assert sorted(zip(same.queries.tolist(), same.rows.tolist(), strict=True)) == pairs


def test_a_query_that_nobody_is_left_to_vote_for_is_wrong():
    one, label, ids = (
        torch.ones(1, 3),
        torch.zeros(1, dtype=torch.int64),
        np.ones((1, 16), np.uint8),
    )
    assert classify(one, label, one, label, 1, 5) == {5: 1.0}
    assert classify(one, label, one, label, 1, 5, ids=(ids, ids)) == {5: 0.0}


def test_fewer_images_than_neighbours_and_unknown_labels():
    reference, labels, queries, truth = data(5, 6)
    assert set(classify(reference, labels, queries, truth, 4, (3, 20))) == {3, 20}
    expected = classify(reference[:3], labels[:3], queries[2:], truth[2:], 4, 20)
    unknown, asked = labels.clone(), truth.clone()
    unknown[3:], asked[:2] = -1, -1
    assert classify(reference, unknown, queries, asked, 4, 20) == expected


def test_mistakes_are_sentences():
    reference, labels, queries, truth = data(5, 6)
    with pytest.raises(DataError, match="0 labelled reference images and 6 labelled queries"):
        classify(reference, labels - 9, queries, truth, 4)
    with pytest.raises(DataError, match="width 8, queries 7"):
        nearest.nearest(reference, queries[:, 1:], 2)
    with pytest.raises(DataError, match="2 nearest of 0 images"):
        nearest.nearest(reference[:1], reference[:1], 2, leave_one_out=True)
    with pytest.raises(DataError, match="leave_one_out needs the reference as queries: 6 for 5"):
        nearest.nearest(reference, queries, 2, leave_one_out=True)


def test_raw_pixels_tell_bright_patterns_apart_and_not_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    ids = np.random.default_rng(1).integers(0, 256, (120, 16)).astype(np.uint8)
    noise = rng.integers(0, 256, (120, 40, 40, 3)).astype(np.uint8)
    patterns = noise.copy()
    for label in range(3):  # one bright channel each
        patterns[labels == label, ..., label] |= 128
    sets = {
        name: [
            [SimpleNamespace(images=x[part], labels=labels[part], ids=ids[part])]
            for part in (slice(0, 90), slice(90, None))
        ]
        for name, x in (("noise", noise), ("patterns", patterns))
    }
    assert knn.raw_pixels(*sets["patterns"], k=5) == 1.0
    assert knn.raw_pixels(*sets["noise"], k=5) < 0.7
