"""k-means against scikit-learn, ten-line loops and itself in another order."""

from __future__ import annotations

import numpy as np
import pytest
from planted_vectors import ids_of_numbers, separated
from sklearn.cluster import KMeans as Theirs

from pipeline.curate.choose import kmeans
from pipeline.curate.choose.kmeans import KMeans, Sums, fit_local
from pipeline.curate.rows.draws_by_id import draw, race
from pipeline.curate.rows.exact import Centres, unit_half
from pipeline.curate.rows.first_of_each import firsts, id_words, not_after


def random_half(rng, n, d):
    return unit_half(rng.standard_normal((n, d)))


def test_nearest_is_the_exact_maximum():
    rng = np.random.default_rng(0)
    vectors, centres = random_half(rng, 300, 24), random_half(rng, 70, 24)
    centres[41] = centres[7]  # equal ones: the lower number wins
    centres[50] = centres[20]
    vectors[:3] = centres[[41, 50, 7]]
    labels, similarity = Centres(centres, "").nearest_one(vectors)
    exact = vectors.astype(np.float64) @ centres.astype(np.float64).T
    np.testing.assert_array_equal(labels, exact.argmax(1))
    np.testing.assert_array_equal(similarity, exact.max(1))
    assert set(labels[:3]) <= {7, 20}


def test_nearest_among_centroids_that_single_precision_cannot_tell_apart():
    rng = np.random.default_rng(1)
    base = unit_half(rng.standard_normal(512))
    tiny = np.argsort(np.abs(base.astype(np.float64)))[:40]  # elements that hardly count
    centres, vectors = np.repeat(base[None], 40, 0), random_half(rng, 50, 512)
    centres[np.arange(40), tiny] = np.nextafter(base[tiny], np.float16(1))
    vectors = unit_half(base + 0.1 * vectors)
    exact = vectors.astype(np.float64) @ centres.astype(np.float64).T
    fast = vectors.astype(np.float32) @ centres.astype(np.float32).T
    assert (fast.argmax(1) != exact.argmax(1)).any(), "not a hard case"
    labels, similarity = Centres(centres, "").nearest_one(vectors)
    np.testing.assert_array_equal(labels, exact.argmax(1))
    np.testing.assert_array_equal(similarity, exact.max(1))


def test_zero_vectors_belong_to_the_first_centroid():
    centres = random_half(np.random.default_rng(2), 9, 8)
    labels, similarity = Centres(centres, "").nearest_one(np.zeros((4, 8), np.float16))
    assert labels.tolist() == [0] * 4 and similarity.tolist() == [0.0] * 4


def test_equals_scikit_learn_from_the_same_start():
    vectors, truth = separated(600, 7)
    ids = ids_of_numbers(range(600))
    start = unit_half(vectors[[np.flatnonzero(truth == c)[0] for c in range(7)]])
    theirs = Theirs(7, init=start.astype(np.float64), n_init=1, max_iter=20).fit(
        vectors.astype(np.float64)
    )
    centroids = start
    for turn in range(20):
        sums = Sums.zero(7, 16)
        sums.add(ids, vectors, Centres(centroids, ""), 0, turn)
        centroids = kmeans.means(sums.sums, sums.counts, centroids)
    labels, _ = Centres(centroids, "").nearest_one(vectors)
    np.testing.assert_array_equal(labels, theirs.labels_)
    np.testing.assert_array_equal(centroids, unit_half(theirs.cluster_centers_))


def test_same_centroids_in_any_row_order():
    rng = np.random.default_rng(3)
    vectors, ids = random_half(rng, 500, 12), ids_of_numbers(range(500))
    order = rng.permutation(500)
    one = fit_local(ids, vectors, KMeans(40, 5, 6))
    two = fit_local(ids[order], vectors[order], KMeans(40, 5, 6))
    np.testing.assert_array_equal(one.centroids, two.centroids)
    assert one.similarity == two.similarity and one.similarity[-1] > one.similarity[0]
    other = fit_local(ids, vectors, KMeans(40, 6, 6))
    assert not np.array_equal(one.centroids, other.centroids)


@pytest.mark.long
def test_products_by_torch_give_the_same_centroids():
    rng = np.random.default_rng(9)
    vectors, ids = random_half(rng, 400, 12), ids_of_numbers(range(400))
    here, there = (fit_local(ids, vectors, KMeans(30, 5, 4), on) for on in ("", "cpu"))
    np.testing.assert_array_equal(here.centroids, there.centroids)
    assert here.similarity == there.similarity


def test_partial_sums_are_exact_however_rows_are_split():
    rng = np.random.default_rng(4)
    vectors, ids = random_half(rng, 400, 20), ids_of_numbers(range(400))
    centroids = Centres(vectors[:10], "")
    whole, parts = Sums.zero(10, 20), Sums.zero(10, 20)
    whole.add(ids, vectors, centroids, 1, 2)
    order = rng.permutation(400)
    for part in np.array_split(order, 7):
        parts.add(ids[part], vectors[part], centroids, 1, 2)
    np.testing.assert_array_equal(whole.sums, parts.sums)
    np.testing.assert_array_equal(whole.spare.ids, parts.spare.ids)
    assert whole.similarity == parts.similarity
    labels = (vectors.astype(np.float64) @ vectors[:10].astype(np.float64).T).argmax(1)
    for cluster in range(10):
        members = vectors[labels == cluster].astype(np.float64)
        np.testing.assert_array_equal(whole.sums[cluster], members.sum(0))


def test_squared_distance_seeds_find_rare_concepts():
    """One concept of 1,000 rows and nineteen of 5: uniform seeds miss most of the nineteen."""
    rng = np.random.default_rng(5)
    centres = np.linalg.qr(rng.standard_normal((32, 32)))[0][:20]
    truth = np.repeat(np.arange(20), [1000] + [5] * 19)
    vectors = unit_half(centres[truth] + 0.005 * rng.standard_normal((len(truth), 32)))
    rare, uniform = [], []
    for seed in range(5):
        ids = ids_of_numbers(range(len(truth)), salt=bytes([seed]))
        fit = fit_local(ids, vectors, KMeans(20, seed, 0))
        labels, _ = Centres(fit.centroids, "").nearest_one(vectors)
        rare.append(len({tuple(truth[labels == c][:1]) for c in range(20)} - {()}))
        uniform.append(len(set(truth[rng.choice(len(truth), 20, replace=False)])))
    assert min(rare) >= 17 and max(uniform) <= 8, (rare, uniform)


def test_race_draws_in_proportion():
    """Three thousand races of weights 1 to 4: the first to arrive wins in proportion."""
    ids = ids_of_numbers(range(4))
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    wins = np.bincount(
        [race(7, turn, ids, weights, 16).argmin() for turn in range(3_000)], minlength=4
    )
    assert np.abs(wins / 3_000 - weights / 10).max() < 0.03
    assert np.isinf(race(7, 0, ids, np.zeros(4), 16)).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_fewer_rows_than_clusters(rows):
    vectors = random_half(np.random.default_rng(6), rows, 8)
    fit = fit_local(ids_of_numbers(range(rows)), vectors, KMeans(9, 0, 3))
    assert len(fit.centroids) == rows
    if rows:
        assert sorted(Centres(fit.centroids, "").nearest_one(vectors)[0]) == list(range(rows))


def test_equal_rows_make_one_cluster():
    vectors = np.repeat(random_half(np.random.default_rng(7), 1, 8), 50, 0)
    fit = fit_local(ids_of_numbers(range(50)), vectors, KMeans(9, 0, 3))
    np.testing.assert_array_equal(fit.centroids, vectors[:1])


def test_empty_clusters_get_rows_that_are_far():
    vectors, _ = separated(200, 4)
    ids = ids_of_numbers(range(200))
    start = np.repeat(unit_half(vectors[:1]), 4, 0)  # three of four are empty
    sums = Sums.zero(4, 16)
    sums.add(ids, vectors, Centres(start, ""), 0, 0)
    assert sums.counts.tolist() == [200, 0, 0, 0]
    after = kmeans.refill(kmeans.means(sums.sums, sums.counts, start), sums.counts, sums.spare)
    assert len(np.unique(after, axis=0)) == 4
    assert all((vectors == row).all(1).any() for row in after[1:])
    assert kmeans.goes_on(sums.counts, sums.spare)


def test_firsts_is_a_loop():
    rng = np.random.default_rng(8)
    groups, keys = rng.integers(0, 6, 300), rng.integers(0, 4, 300) / 4.0
    ids, rows = ids_of_numbers(rng.integers(0, 40, 300)), rng.permutation(300)
    quota = np.array([0, 1, 5, 1000, 2, 3])
    got = sorted(firsts(groups, keys, ids, rows, quota))
    expected = []
    for group in range(6):
        members = [i for i in range(300) if groups[i] == group]
        members.sort(key=lambda i: (keys[i], ids[i].tobytes(), rows[i]))
        expected += members[: quota[group]]
    assert got == sorted(expected)
    limit = np.full(300, 150)
    told = not_after(keys, ids, rows, keys[limit], ids[limit], rows[limit])
    mine = (keys[150], ids[150].tobytes(), rows[150])
    assert told.tolist() == [(keys[i], ids[i].tobytes(), rows[i]) <= mine for i in range(300)]


def test_id_words_compare_like_bytes():
    ids = ids_of_numbers(range(50))
    high, low = id_words(ids)
    by_words = np.lexsort((low, high)).tolist()
    assert by_words == sorted(range(50), key=lambda i: ids[i].tobytes())
    assert draw(1, 0, ids, 18).max() < 1
