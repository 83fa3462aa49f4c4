"""Cosines that do not depend on blocks or order, against exact fractions and a full sort."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from pipeline.errors import DataError
from pipeline.evaluate.neighbours import exact
from pipeline.evaluate.neighbours.exact import Frame, best, cosines, ranking
from pipeline.evaluate.neighbours.nearest import SameImages, nearest


def vectors(n, dim=24, seed=0, spread=1.0):
    """Around one direction, as features are; with a small spread as an untrained network's."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(99).standard_normal(dim)
    return (middle + spread * rng.standard_normal((n, dim))).astype(np.float32)


def true_cosines(queries, reference):
    q, r = (x.astype(np.longdouble) for x in (queries, reference))
    q, r = (x / np.sqrt((x * x).sum(1, keepdims=True)) for x in (q, r))
    return q @ r.T


def test_products_are_exact_sums():
    reference, queries = vectors(40), vectors(5, seed=1)
    frame = Frame.of(reference)
    known, asked = frame.placed(reference), frame.placed(queries)
    ranked = ranking(asked, known)
    for i in range(5):
        for j in range(40):
            u, v = ([Fraction(float(x)) for x in p.offsets[n]] for p, n in ((asked, i), (known, j)))
            product = sum(a * b for a, b in zip(u, v, strict=True))
            assert float(product) == product  # doubles hold it whole
            assert float(ranked[i, j]) == float(product) - float(known.half[j])


@pytest.mark.parametrize("spread", [1.0, 1e-2, 4e-5])
def test_cosines_are_right_to_a_millionth_of_their_spread(spread):
    reference, queries = vectors(500, spread=spread), vectors(30, seed=1, spread=spread)
    frame = Frame.of(reference)
    asked = frame.placed(queries)
    ranked = ranking(asked, frame.placed(reference))
    expected = true_cosines(queries, reference)
    below = np.asarray(ranked.numpy() + (1 - asked.half.numpy())[:, None], np.longdouble) - expected
    assert np.abs(below).max() < 1e-6 * expected.std() + 6e-16
    np.testing.assert_allclose(
        cosines(ranked, asked.own).numpy(), expected.astype(float), atol=6e-8
    )
    _, rows = best(asked, frame.placed(reference), 20)
    order = np.argsort(-expected, axis=1)[:, :20]
    assert (rows.numpy() == order).mean() > 0.99
    chance = torch.nn.functional.normalize(torch.from_numpy(queries))
    single = chance @ torch.nn.functional.normalize(torch.from_numpy(reference)).T
    if spread < 1e-4:  # single precision alone loses them
        assert (single.topk(20).indices.numpy() == order).mean() < 0.5


@pytest.mark.parametrize("kind", ["plain", "equal", "collapsed", "one_direction", "few_values"])
def test_the_best_are_the_first_of_a_full_sort(kind, monkeypatch):
    reference, queries = vectors(700), vectors(20, seed=1)
    if kind == "equal":  # each row many times
        reference = reference[np.random.default_rng(2).integers(0, 9, 700)]
    if kind == "collapsed":
        reference[:] = reference[0]
        queries[:10] = reference[0]
    if kind == "one_direction":
        reference = reference[:1] * np.linspace(1, 2, 700, dtype=np.float32)[:, None]
    if kind == "few_values":
        reference, queries = np.rint(reference / 2), np.rint(queries / 2)
    frame = Frame.of(reference)
    known, asked = frame.placed(reference), frame.placed(queries)
    ranked = ranking(asked, known)
    apart = (torch.arange(20), torch.arange(20) * 3)
    ranked[apart] = -torch.inf
    order = torch.from_numpy(np.lexsort((np.tile(np.arange(700), (20, 1)), -ranked.numpy())))
    for at_once in (1, 1 << 24):
        monkeypatch.setattr(exact, "RANKED_AT_ONCE", at_once)
        for k in (1, 30, 700):
            values, rows = best(asked, known, k, apart)
            assert torch.equal(rows, order[:, :k])
            assert torch.equal(values, ranked.gather(1, order[:, :k]))


def test_single_precision_is_within_its_margin():
    for spread in (1.0, 4e-5):
        frame = Frame.of(reference := vectors(3000, 64, spread=spread))
        known, asked = frame.placed(reference), frame.placed(vectors(50, 64, 1, spread))
        fast, margin = exact._fast(asked, known)
        wrong = (fast.double() - ranking(asked, known)).abs().amax(1)
        assert bool((wrong < margin).all()) and bool((wrong > 1e-4 * margin).any())


def test_zero_vectors_have_cosine_zero_and_queries_of_them_take_the_first_rows():
    reference, queries = vectors(30), vectors(4, seed=1)
    reference[7], queries[2] = 0, 0
    similarities, rows = nearest(torch.from_numpy(reference), torch.from_numpy(queries), 30)
    assert rows[2].tolist() == list(range(30)) and similarities[2].tolist() == [0.0] * 30
    place = (rows == 7).nonzero()[:, 1][[0, 1, 3]]
    assert similarities[[0, 1, 3], place].abs().max() < 1e-7
    one, ids = torch.zeros(3, 5), np.eye(3, 16, dtype=np.uint8)
    assert nearest(one, one, 2, SameImages.of(ids, ids))[1].tolist() == [[1, 2], [0, 2], [0, 1]]


def test_an_origin_is_taken_off_first():
    reference, queries = vectors(50).astype(float), vectors(4, seed=1).astype(float)
    mean = reference.mean(0)
    frame = Frame.of(reference, mean)
    asked = frame.placed(queries)
    ours = cosines(ranking(asked, frame.placed(reference)), asked.own)
    expected = true_cosines(queries - mean, reference - mean).astype(float)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-7)


def test_rows_and_blocks_do_not_change_a_bit():
    reference, queries = vectors(300), vectors(50, seed=1)
    frame = Frame.of(reference)
    known, asked = frame.placed(reference), frame.placed(queries)
    whole = ranking(asked, known)
    for rows in (slice(0, 1), slice(3, 40), slice(100, 300)):
        again = frame.placed(reference[rows])
        assert torch.equal(again.offsets, known.offsets[rows])
        assert torch.equal(ranking(asked[7:9], again), whole[7:9, rows])


def test_values_that_are_no_numbers_are_refused():
    reference = vectors(30)
    reference[17, 3] = np.nan
    with pytest.raises(DataError, match=r"1 rows of 30; the first is row 117"):
        Frame.of(vectors(30)).placed(reference, 100)


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_a_cpu():
    for spread in (1.0, 4e-5):
        frame = Frame.of(reference := vectors(5000, 384, spread=spread))
        reference[2000:2300] = reference[:300]
        known, asked = frame.placed(reference), frame.placed(vectors(200, 384, 1, spread))
        there = (asked.to("cuda"), known.to("cuda"))
        assert torch.equal(ranking(*there).cpu(), ranking(asked, known))
        on_cpu, on_gpu = best(asked, known, 200), best(*there, 200)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu, on_gpu, strict=True))
