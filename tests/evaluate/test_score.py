"""Intervals: how often they hold the truth, and that they are never surer than the images allow."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate.score import STATISTICS, Score, difference

TIMES = 300


def ids_of(n):
    return np.arange(16 * n).astype(np.uint8).reshape(n, 16)


def covered(truth, intervals):
    return np.mean([one.low - 1e-9 <= truth <= one.high + 1e-9 for one in intervals])


@pytest.mark.parametrize("accuracy", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("images", [10, 50, 500])
def test_an_interval_of_an_accuracy_holds_it_95_times_of_100(accuracy, images):
    """A plain bootstrap holds 0.98 of 50 images 60 times, for most draws are right throughout."""
    rng = np.random.default_rng([images, int(100 * accuracy)])
    drawn = (rng.random((TIMES, images)) < accuracy).astype(float)
    intervals = [Score.of_hits("s", hits, ids_of(images)).interval(500) for hits in drawn]
    assert covered(accuracy, intervals) > 0.91  # 0.95 less three deviations


@pytest.mark.long
@pytest.mark.parametrize("pair", [(0.85, 0.8), (0.98, 0.5), (0.1, 0.1)])
@pytest.mark.parametrize("images", [10, 50, 500])
def test_an_interval_of_a_difference_holds_it(pair, images):
    """Of two models that are right about the same images more often than by chance."""
    rng = np.random.default_rng([images, int(100 * pair[0])])
    intervals = []
    for _ in range(TIMES):
        hard = rng.random(images)
        one, other = (
            Score.of_hits("s", np.where(rng.random(images) < 0.5, hard, rng.random(images)) < p,
                          ids_of(images)) for p in pair
        )  # fmt: skip
        intervals.append(difference(one, other, 500))
    assert covered(pair[0] - pair[1], intervals) > 0.91  # 0.95 less three deviations


def test_means_of_shares_and_of_average_precisions():
    rng = np.random.default_rng(0)
    for draw in (lambda: rng.beta(0.5, 1.5, 200), lambda: rng.binomial(4, 0.25, 60) / 4):
        scores = [Score.of_hits("s", draw(), ids_of(200)) for _ in range(TIMES)]
        assert 0.91 < covered(0.25, [score.interval(500) for score in scores]) < 0.985


@pytest.mark.parametrize("images", [1, 3, 50])
def test_images_that_are_all_right_prove_no_accuracy_of_one(images):
    right = Score.of_hits("s", np.ones(images), ids_of(images))
    wrong = Score.of_hits("s", np.zeros(images), ids_of(images))
    interval = right.interval()
    assert interval.value == interval.high == 1 and interval.low <= 1 - 1 / images
    gain = difference(right, wrong)
    assert (gain.value, gain.high) == (1, 1) and gain.low <= 1 - 1 / images
    assert (gain.low > 0) == (images == 50)  # three images say nothing yet


def test_of_many_images_it_is_the_plain_bootstrap():
    rng = np.random.default_rng(0)
    hits = rng.random(20_000) < 0.7
    interval = Score.of_hits("s", hits, ids_of(20_000)).interval()
    sd = np.sqrt(0.7 * 0.3 / 20_000)
    assert interval.margin == pytest.approx(1.96 * sd, rel=0.08)


def test_what_is_no_share_is_drawn_as_it_is():
    same = Score("rmse", np.tile([4.0, 2.0], (5, 1)), ids_of(5), "root_mean")
    assert same.interval().low == same.interval().high == pytest.approx(np.sqrt(2))


def test_images_without_a_known_pixel_leave_an_interval():
    """One of two has none: a quarter of the draws are of that one alone, and say nothing."""
    terms = np.array([[8.0, 2.0], [0.0, 0.0]])
    for statistic in ("mean", "root_mean"):
        interval = Score("depth", terms, ids_of(2), statistic).interval()
        assert interval.low == interval.high == interval.value
        assert np.isnan(Score("depth", 0 * terms, ids_of(2), statistic).interval().low)


def test_a_mean_iou_and_its_draws_equal_a_loop():
    rng = np.random.default_rng(0)
    truth, answer = rng.integers(0, 4, (2, 6, 50))
    answer[:2] = truth[:2]
    terms = np.array([
        [*(((t == c) & (a == c)).sum() for c in range(5)), *((t == c).sum() for c in range(5)),
         *((a == c).sum() for c in range(5))] for t, a in zip(truth, answer, strict=True)
    ], float)  # fmt: skip
    iou = [
        ((truth == c) & (answer == c)).sum() / ((truth == c) | (answer == c)).sum()
        for c in range(4)  # the fifth class is nowhere
    ]
    score = Score("miou", terms, ids_of(6), "mean_iou")
    assert score.value == pytest.approx(np.mean(iou), abs=1e-12)
    assert STATISTICS["mean_iou"](np.zeros(15)) == 0
