"""A score with what each image adds to it: so that it has an interval, and models can be compared.

Each score is a function of sums over images: hits and images for an accuracy, pixels of each class
for a mean IoU, squared errors and pixels for an RMSE. So it can be computed again for any weights
of the images. That is all that a bootstrap needs (Efron and Tibshirani 1993, chapter 13), and all
that it takes to compare two models on the same images.

Where all images are alike a plain bootstrap has no width: of 50 right answers it would say that the
accuracy is 1. So of shares of images, imaginary images are drawn too, half of one for each way to
be all right and all wrong (Agresti and Min 2005 for pairs; of one model it is Jeffreys' prior).

Shapes: n images, m terms of an image, B draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

DRAWS = 2000  # a 95 % interval then moves by about 2 % of its width from seed to seed
LEVEL = 0.95
WEIGHTS_AT_ONCE = 1 << 24  # 128 MiB of weights of images
FEW_KINDS = 64  # different terms of images
IMAGINARY = 0.5  # images of each kind of _EXTREMES

Array = npt.NDArray[np.float64]


def mean(sums: Array) -> Array:
    """Of sums [..., 2] of values and of how many they are; NaN where they are none."""
    values, count = sums[..., 0], sums[..., 1]
    return np.divide(values, count, out=np.full_like(values, np.nan), where=count > 0)


def root_mean(sums: Array) -> Array:
    """Square root of the mean of squares [..., 2], e.g. an RMSE over pixels."""
    return np.sqrt(mean(sums))


def mean_iou(sums: Array) -> Array:
    """Mean intersection over union, of pixels [..., 3 * K]: of each class the right ones, then
    those of its truth, then those of the answers. (A confusion would be K * K of them.)

    Classes that are neither in the truth nor answered do not count.
    """
    both, truth, answered = np.split(sums, 3, axis=-1)
    either = truth + answered - both
    iou = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return np.asarray(iou.sum(-1) / np.maximum(1, (either > 0).sum(-1)))


def average_precision(sums: Array) -> Array:
    """Area under precision over recall of pairs by falling similarity, of sums [..., 2 K + 1].

    K steps of similarity: right pairs in each, wrong pairs in each, and how many there are to
    find. Right pairs that are in no step were not found.
    """
    steps = sums.shape[-1] // 2
    right, wrong = sums[..., :steps], sums[..., steps : 2 * steps]
    so_far = right.cumsum(-1)
    all_so_far = so_far + wrong.cumsum(-1)
    precision = np.divide(so_far, all_so_far, out=np.zeros_like(so_far), where=all_so_far > 0)
    return np.asarray((right * precision).sum(-1) / sums[..., -1])


STATISTICS: dict[str, Callable[[Array], Array]] = {
    "mean": mean,
    "root_mean": root_mean,
    "mean_iou": mean_iou,
    "average_precision": average_precision,
}


@dataclass(frozen=True)
class Interval:
    """A value between the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """Half of the interval's width: what stands after the plus-minus sign."""
        return (self.high - self.low) / 2

    @property
    def holds_0(self) -> bool:
        """Whether 0 is within it, its ends included."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Score:
    """One score of one model on one set of images.

    Attributes:
        name: as on the card and, after `eval/`, in MLflow: `knn20_top1`.
        terms: [n, m], what each image adds.
        ids: uint8 [n, 16], the images; two models are compared where they are the same.
        statistic: of STATISTICS, makes the value of the sums of the terms.
    """

    name: str
    terms: Array
    ids: npt.NDArray[np.uint8]
    statistic: str = "mean"

    @classmethod
    def of_hits(
        cls, name: str, hits: npt.NDArray[np.bool_] | Array, ids: npt.NDArray[np.uint8]
    ) -> Score:
        """An accuracy, or another mean over images, of values [n]."""
        values = np.asarray(hits, np.float64)
        return cls(name, np.stack([values, np.ones_like(values)], 1), ids)

    @property
    def value(self) -> float:
        """The score of all images."""
        return float(STATISTICS[self.statistic](self.terms.sum(0)))

    @property
    def images(self) -> str:
        """A digest of which images it is of, in which order."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).tobytes(), digest_size=8).hexdigest()

    def drawn(self, draws: int = DRAWS, seed: int = 0) -> Array:
        """The score of `draws` sets of n images drawn with replacement, [B]."""
        return STATISTICS[self.statistic](_drawn_sums(self.terms, self.statistic, draws, seed))

    def interval(self, draws: int = DRAWS, seed: int = 0) -> Interval:
        """The score with its 95 % interval by the bootstrap over images."""
        return _interval(self.value, self.drawn(draws, seed))


def difference(
    one: Score, other: Score, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """By how much one model scores higher than another on the same images, with its interval.

    Both are computed on the same drawn images, so that what is hard for both does not widen it.

    Args:
        one: of one model.
        other: of the other, of the same name and the same images.
        draws: B.
        seed: of the draws.
        level: of the interval; of several comparisons at once each needs a higher one.

    Raises:
        DataError: they are other scores, or of other images.
    """
    if (one.name, one.statistic) != (other.name, other.statistic):
        raise DataError(f"{one.name} cannot be compared with {other.name}", "compare one score")
    if one.images != other.images:
        raise DataError(
            f"{one.name} is of {len(one.terms):,} and {len(other.terms):,} images that are not "
            "the same ones",
            "score both models on the same sets",
        )
    terms = one.terms.shape[1]
    both = np.concatenate([one.terms, other.terms], 1)
    sums = _drawn_sums(both, one.statistic, draws, seed)
    statistic = STATISTICS[one.statistic]
    between = statistic(sums[:, :terms]) - statistic(sums[:, terms:])
    return _interval(one.value - other.value, between, level)


def _interval(value: float, drawn: Array, level: float = LEVEL) -> Interval:
    tail = 50 * (1 - level)
    drawn = drawn[np.isfinite(drawn)]  # some draw may have no pixel that is known
    if not len(drawn):
        return Interval(value, np.nan, np.nan)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def _drawn_sums(terms: Array, statistic: str, draws: int, seed: int) -> Array:
    """Sums of the terms [n, m] over n images drawn with replacement, [B, m].

    Images with the same terms are drawn as one kind: hits of millions of images are two kinds.
    """
    generator = np.random.default_rng([seed, len(terms)])
    images = len(terms)
    kinds, counts = np.unique(terms, axis=0, return_counts=True)
    if len(kinds) <= FEW_KINDS:
        shares = counts.astype(np.float64)
        if statistic == "mean" and _are_shares(terms):
            extremes = _EXTREMES[terms.shape[1]]
            kinds = np.concatenate([kinds, extremes])
            shares = np.concatenate([shares, np.full(len(extremes), IMAGINARY)])
        return np.asarray(generator.multinomial(images, shares / shares.sum(), draws) @ kinds)
    at_once = max(1, WEIGHTS_AT_ONCE // images)
    sums = []
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        drawn = generator.integers(images, size=(count, images))
        drawn += images * np.arange(count)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=count * images).reshape(count, images)
        sums.append(weights.astype(np.float64) @ terms)
    return np.concatenate(sums)


# Terms of images that are all right or all wrong: of one model, and of two.
_EXTREMES = {
    2: np.array([(hit, 1) for hit in (0.0, 1.0)]),
    4: np.array([(hit, 1, other, 1) for hit in (0.0, 1.0) for other in (0.0, 1.0)]),
}


def _are_shares(terms: Array) -> bool:
    """Whether each image adds a value from 0 to 1, and counts once."""
    values = terms[:, ::2]
    return bool((terms[:, 1::2] == 1).all() and (values >= 0).all() and (values <= 1).all())
