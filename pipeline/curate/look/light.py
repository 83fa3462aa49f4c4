"""Two images of one picture in the same light and the same sharpness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

Array = np.ndarray[Any, Any]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
EQUAL = 4.0  # mean difference of values up to which the light is left as it is, ...
SEEN, EXPLAINED = 1.5, 0.35  # ... but for one above this, of which light leaves less than so much
MOST = 12.0
BINS = 32
TONES = 8  # different values that a change of light must be seen in
SATURATED = 0.35  # share that is black or white in both, above which no change of light is believed
SLOPES = (0.3, 2.5)
BLURS = (0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0, 3.7, 4.5)  # deviations, at 256 pixels a side
STRETCHES = (1.2, 1 / 1.2, 1.4, 1 / 1.4)  # along and across: squares are of stretched images
BETTER = 0.99  # what another blur must leave of the difference


@dataclass(frozen=True)
class Light:
    """What gives both images the same light: a table of values for one of them.

    `gain` is what differences count more for, where one image has less contrast.
    """

    of_a: Array | None = None
    of_b: Array | None = None
    gain: float = 1.0

    @property
    def changed(self) -> bool:
        """Whether one of them has another light."""
        return self.of_a is not None or self.of_b is not None

    def a(self, image: Array) -> Array:
        """Values of the first image."""
        return _looked_up(self.of_a, image)

    def b(self, image: Array) -> Array:
        """Values of the second one."""
        return _looked_up(self.of_b, image)


def _looked_up(table: Array | None, image: Array) -> Array:
    return image if table is None else table[np.clip(image + 0.5, 0, 255).astype(np.uint8)]


def same_light(a: Array, b: Array, inside: Array) -> Light:
    """One curve for all channels, monotone, from the image that shows more tones to the other.

    What is clipped in one image (and may be made darker afterwards) is one value there and many in
    the other, so only one direction fits: the one that leaves less, for the contrast that it gives.
    Pictures of few values, or white in most places, show too little of the light: they stay as
    they are, for another colour is another content.
    """
    x, y = a[inside].ravel(), b[inside].ravel()
    difference = float(np.abs(x - y).mean())
    if difference < SEEN:
        return Light()
    if float(((np.minimum(x, y) > 250) | (np.maximum(x, y) < 5)).mean()) > SATURATED:
        return Light()
    both = [(one, _fitted(*values)) for one, values in ((True, (x, y)), (False, (y, x)))]
    of_a, fit = min(both, key=lambda pair: pair[1].left * pair[1].gain)
    if fit.table is None or (difference < EQUAL and fit.left > EXPLAINED * difference):
        return Light()
    return Light(fit.table, None, fit.gain) if of_a else Light(None, fit.table, fit.gain)


@dataclass(frozen=True)
class _Fit:
    """A table of values, what differences of the result count more for, and their mean, where one
    place (a bar across the picture, say) counts for no more than `MOST`.
    """

    table: Array | None = None
    gain: float = 1.0
    left: float = np.inf


def _fitted(x: Array, y: Array) -> _Fit:
    table = _curve(x, y)
    if table is None:
        return _Fit()
    gain = min(2.0, max(1.0, float(x.std()) / max(float(y.std()), 1.0)))
    left = np.minimum(np.abs(_looked_up(table, x) - y), MOST)
    return _Fit(table, gain, float(left.mean()))


def _curve(x: Array, y: Array) -> Array | None:
    """The usual y of each of 256 values of x; None where there are too few values."""
    number = np.clip(x * (BINS / 256), 0, BINS - 1).astype(np.int64)
    order = np.argsort(number, kind="stable")
    ends = np.searchsorted(number[order], np.arange(BINS + 1))
    x, y = x[order], y[order]
    points = [
        (float(np.median(x[a:b])), float(np.median(y[a:b])), b - a)
        for a, b in pairwise(ends.tolist())
        if b - a >= max(8, 0.001 * len(x))
    ]
    if sum(count >= 0.004 * len(x) for _, _, count in points) < TONES:
        return None
    at = [one for one, _, _ in points]
    of = list(_ascending([(value, count) for _, value, count in points]))
    slope = (of[-1] - of[0]) / max(at[-1] - at[0], 1.0)
    slope = min(max(slope, SLOPES[0]), SLOPES[1])
    first, last = max(0.0, of[0] - slope * at[0]), min(255.0, of[-1] + slope * (255 - at[-1]))
    return np.interp(np.arange(256), [-1, *at, 256], [first, *of, last]).astype(np.float32)


def _ascending(values: list[tuple[float, int]]) -> Iterator[float]:
    """The nearest values that do not fall (pool adjacent violators)."""
    pools: list[tuple[float, int, int]] = []
    for value, count in values:
        pools.append((value, count, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (v, n, k), (w, m, j) = pools.pop(), pools.pop()
            pools.append(((v * n + w * m) / (n + m), n + m, k + j))
    for value, _, many in pools:
        yield from [value] * many


@dataclass(frozen=True)
class Blur:
    """What makes the sharper image as soft as the other: deviations down and across at 256."""

    of_a: bool = True
    down: float = 0.0
    across: float = 0.0

    def a(self, image: Array) -> Array:
        """The first image."""
        return self._soft(image) if self.of_a else image

    def b(self, image: Array) -> Array:
        """The second one."""
        return image if self.of_a else self._soft(image)

    def _soft(self, image: Array) -> Array:
        scale = len(image) / 256
        return smoothed(image, (self.down * scale, self.across * scale))


def smoothed(image: Array, deviations: tuple[float, float]) -> Array:
    """[S, S] or [S, S, channels]."""
    if not any(deviations):
        return image
    if image.ndim == 2:
        return np.asarray(gaussian_filter(image, deviations, truncate=3))
    channels = range(image.shape[-1])
    return np.stack([gaussian_filter(image[..., c], deviations, truncate=3) for c in channels], -1)


def equal_blur(a: Array, b: Array, inside: Array) -> Blur:
    """The blur of the sharper of two grey images with which both differ least.

    Only one is blurred, so details that differ are not blurred away to make them equal.
    """
    fine = [np.where(inside, x - uniform_filter(x, 3), 0) for x in (a, b)]
    of_a = float((fine[0] ** 2).sum()) >= float((fine[1] ** 2).sum())
    sharp, soft = (a, b) if of_a else (b, a)
    scale = len(a) / 256

    def differ(down: float, across: float) -> float:
        blurred = gaussian_filter(sharp, (down * scale, across * scale), truncate=3)
        differences = np.abs((blurred if down else sharp) - soft)[inside]
        most = int(0.9 * len(differences))
        return float(np.partition(differences, most)[:most].mean())

    least, best = differ(0, 0), (0.0, 0.0)
    if least < 0.7:
        return Blur()
    for size in BLURS:
        left = differ(size, size)
        if left < BETTER * least:
            least, best = left, (size, size)
        elif left > 1.25 * least:
            break
    size = best[0]
    for stretch in STRETCHES if size > 1 else ():
        left = differ(size * stretch, size / stretch)
        if left < BETTER * least:
            least, best = left, (size * stretch, size / stretch)
    return Blur(of_a, *best)
