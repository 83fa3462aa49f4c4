"""How alike different images of a set are: all pairs of a sample, without those that are copies.

A sample of 5,000 images has 12.5 million pairs, of which 12 may pass at a rate of 1e-6. So few move
a threshold much, so it is read off the few hundred highest similarities: their excess over the
lowest of them falls off like an exponential, whose scale is its median. A median is moved little by
pairs that are copies after all.

A user's images hold copies of each other, which are no errors when they match. So the pairs that
are most alike get the second look that also decides which images go (`second_look`), until hardly
any is a copy, and those that are copies by it are left out. The others are of different images.

How far the threshold would move with another sample is seen by drawing images of this one with
repetition (bootstrap): pairs are not independent of each other, images are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.curate.images.descriptor import MIRROR, similarities
from pipeline.curate.look.second_look import Verdict
from pipeline.curate.rows.exact import Doubles, Halves, Ints, dots

TOP = 20_000  # pairs that are most alike: of them the threshold is made
COUNTED = 300  # unlike pairs that may pass, from which on they are counted and nothing is fitted
FITTED = 1e-4  # share of the pairs above the point where the tail's fit begins
DEPTH = 300  # pairs above it, at least
HIGHEST = 0.995  # no threshold is above: JPEG alone costs a little
LOOKED_AT = 1000  # pairs, at most: a minute and a half
PATIENCE, FEW = 40, 4  # of so many in a row fewer are copies: no more are looked at
RESAMPLED = 200  # samples that are taken from the sample
LIKELY = (0.025, 0.975)  # the interval holds this share of their thresholds
_BLOCK = 2**24  # similarities computed at once
_MARGIN = 1e-4  # of single precision, and much more than it needs

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Look = Callable[[int, int], Verdict]  # at two images of a sample
Fetch = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Pairs:
    """All pairs i < j of m images.

    Attributes:
        vectors: half precision [m, d], unit length.
        crops: [m, 9, d], or None for embedders without views.
        plain: [m (m - 1) / 2], of the wholes; in the order of `numpy.triu_indices`.
        crop: likewise, of wholes with crops; None without views.
        unlike: which of them are of different pictures.
        copies: how many are not.
        exhausted: more looked alike than were looked at.
        undecided: pairs that the second look could not decide about; they count as unlike.
    """

    vectors: Halves
    crops: Halves | None
    plain: Floats
    crop: Floats | None
    unlike: Bools
    copies: int = 0
    exhausted: bool = False
    undecided: int = 0

    @property
    def images(self) -> int:
        """How many there are, m."""
        return len(self.vectors)

    def at(self, penalty: float) -> Floats:
        """Similarities with the crops' penalty, in single precision."""
        return self.plain if self.crop is None else np.maximum(self.plain, self.crop - penalty)

    def ends(self, pairs: Ints) -> tuple[Ints, Ints]:
        """Both images of some pairs."""
        rows = np.arange(self.images)
        starts = rows * self.images - rows * (rows + 1) // 2
        i = np.searchsorted(starts, pairs, side="right") - 1
        return i, pairs - starts[i] + i + 1

    def exact(self, i: Ints, j: Ints, penalty: float) -> Doubles:
        """Similarities as the join has them."""
        if self.crops is None:
            return dots(self.vectors[i], self.vectors[j])
        plain, crop = similarities(self.vectors[i], self.crops[i], self.vectors[j], self.crops[j])
        return np.maximum(plain, crop - penalty)

    def top(self, penalty: float, count: int = TOP) -> tuple[Doubles, Ints, Ints]:
        """The unlike pairs that are most alike, exactly ordered: similarities and both images."""
        fast = np.where(self.unlike, self.at(penalty), np.float32(-2))
        count = min(count, int(self.unlike.sum()))
        if not count:
            nothing = np.zeros(0, np.int64)
            return np.zeros(0), nothing, nothing
        low = np.partition(fast, len(fast) - count)[len(fast) - count]
        places = np.flatnonzero(fast >= max(low - _MARGIN, np.float32(-1.5)))
        i, j = self.ends(places)
        similarity = self.exact(i, j, penalty)
        order = np.lexsort((j, i, -similarity))[:count]
        return similarity[order], i[order], j[order]


def all_pairs(vectors: Halves, crops: Halves | None) -> Pairs:
    """Compares all images of a sample with each other, in single precision."""
    m = len(vectors)
    count = m * (m - 1) // 2
    plain = np.empty(count, np.float32)
    crop = None if crops is None else np.empty(count, np.float32)
    wide = vectors.astype(np.float32)
    turned = wide * MIRROR.astype(np.float32) if crops is not None else wide
    views = None if crops is None else crops.astype(np.float32).transpose(1, 0, 2)
    step = max(1, _BLOCK // max(1, m))
    at = 0
    for first in range(0, m, step):
        rows = slice(first, min(first + step, m))
        keep = np.arange(first, m)[None] > np.arange(rows.start, rows.stop)[:, None]
        end = at + int(keep.sum())
        best = wide[rows] @ wide[first:].T
        if views is not None and crop is not None:
            np.maximum(best, turned[rows] @ wide[first:].T, out=best)
            most = np.full_like(best, -1)
            for view in views:
                for one, other in ((wide, view), (turned, view), (view, wide), (view, turned)):
                    np.maximum(most, one[rows] @ other[first:].T, out=most)
            crop[at:end] = most[keep]
        plain[at:end] = best[keep]
        at = end
    return Pairs(vectors, crops, plain, crop, np.ones(count, bool))


def without_copies(
    pairs: Pairs, look: Look, penalty: float, fetch: Fetch = lambda places: None
) -> Pairs:
    """Looks at the pairs that are most alike, and leaves out those that show the same.

    A pair of which both were found to be copies of a third image is left out without a look.

    Args:
        pairs: of the sample.
        look: the second look at two images.
        penalty: of crops, for the order.
        fetch: is told which images may be looked at next, before they are.
    """
    _, i, j = pairs.top(penalty)
    group = np.arange(pairs.images)
    unlike = pairs.unlike.copy()
    last: deque[bool] = deque(maxlen=PATIENCE)
    looked = undecided = fetched = 0
    for at, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        same = bool(group[a] == group[b])
        if not same:
            if looked == LOOKED_AT or (len(last) == PATIENCE and sum(last) < FEW):
                break
            if at >= fetched:  # so many are looked at before it can end
                most = min(PATIENCE, LOOKED_AT - looked)
                apart = at + np.flatnonzero(group[i[at:]] != group[j[at:]])[:most]
                fetch(np.unique(np.concatenate([i[apart], j[apart]])).tolist())
                fetched = int(apart[-1]) + 1
            looked += 1
            verdict = look(a, b)
            same = verdict.same
            undecided += verdict.reason == "undecided"
            last.append(same)
        if same:
            group[group == group[b]] = group[a]
            unlike[a * pairs.images - a * (a + 1) // 2 + b - a - 1] = False
    copies = int(len(unlike) - unlike.sum())
    return replace(
        pairs,
        unlike=unlike,
        copies=copies,
        exhausted=looked == LOOKED_AT,
        undecided=undecided,
    )


def tail_threshold(
    top: Doubles, total: float, target: float, weights: Doubles | None = None
) -> tuple[float, bool]:
    """The similarity that a share of all pairs exceeds; whether it is extrapolated.

    Args:
        top: the highest similarities, descending.
        total: pairs, with those that are not among the highest.
        target: the share.
        weights: how often each of the pairs counts; default: once.
    """
    if not len(top) or total <= 0:
        return HIGHEST, True
    count = np.cumsum(np.ones(len(top)) if weights is None else weights)
    allowed = target * total

    def at(place: float) -> int:
        return min(int(np.searchsorted(count, place, side="left")), len(top) - 1)

    if allowed >= COUNTED:
        return _rounded(float(top[at(allowed)])), False
    depth = min(max(float(DEPTH), FITTED * total), float(count[-1]))
    start, middle = float(top[at(depth)]), float(top[at(depth / 2)])
    scale = (middle - start) / math.log(2)
    return _rounded(start + scale * math.log(depth / allowed)), True


def interval(
    top: Doubles, i: Ints, j: Ints, images: int, copies: int, target: float, seed: int = 0
) -> tuple[float, float]:
    """Between which thresholds most samples of so many images would have ended.

    Args:
        top: the highest similarities, descending.
        i: one image of each of these pairs.
        j: the other.
        images: of the sample.
        copies: pairs that were left out.
        target: share of the pairs.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    thresholds = []
    for _ in range(RESAMPLED):
        times = rng.multinomial(images, np.full(images, 1 / images)).astype(np.float64)
        pairs = (images**2 - float(times @ times)) / 2 - copies
        thresholds.append(tail_threshold(top, pairs, target, times[i] * times[j])[0])
    low, high = np.quantile(thresholds, LIKELY)
    return _rounded(float(low)), _rounded(float(high))


def _rounded(threshold: float) -> float:
    """Up to six digits: logarithms of two machines may differ in the sixteenth."""
    return min(HIGHEST, math.ceil(threshold * 1e6) / 1e6)
