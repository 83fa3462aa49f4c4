"""How much of the start is left, without labels: rank, neighbours and smoothness of patches.

None of the three says that features are good (see `unlabelled.py`). Held against the features that
a training began with, they say how much of these is left. The combination is ours; no paper has
one that others use:

    left = (min(1, R / R0) * A * min(1, S / S0)) ** (1 / 3)

R and R0 are RankMe (Garrido et al. 2023) now and at the start. A is the mean share of an image's k
nearest neighbours at the start that are still among its k nearest, corrected for chance: 1 where
all are, 0 where there are as many as between unrelated features, k / (N - 1). S and S0 are the mean
smoothness of patches. What cannot be measured is left out, and the root is that of what remains: S
without patches, or where patches were not smooth at the start. At the start it is 1, and any
training makes it less. So a fall is no fall below 1, but below a share that is stated
(`guard.least`).

Shapes: N images, k neighbours of each, M of the images with smoothness, B draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.evaluate.score import DRAWS, LEVEL, Interval

SMOOTH = 0.01  # a smaller smoothness at the start says nothing: noise has 0
PARTS = ("rank", "neighbours", "smoothness")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """What is compared of one network.

    Attributes:
        ids: uint8 [N, 16], the images.
        neighbours: int64 [N, k], rows of the most similar other images; -1: there is none.
        rank: RankMe of the features; 0 where they are not finite.
        smoothness: float64 [M], of the first M images; empty without patches.
    """

    ids: npt.NDArray[np.uint8]
    neighbours: npt.NDArray[np.int64]
    rank: float
    smoothness: Array


@dataclass(frozen=True)
class Left:
    """What is left of the start.

    Attributes:
        interval: of the combination, over images; the rank is one number and is not drawn.
        parts: rank, neighbours and smoothness, each at most 1; those that were measured.
    """

    interval: Interval
    parts: dict[str, float]


def left_of(now: Structure, start: Structure, draws: int = DRAWS, seed: int = 0) -> Left:
    """How much of the start a network still has, with a 95 % interval by the bootstrap over images.

    Raises:
        DataError: they are of other images, or of other numbers of neighbours or patches.
    """
    shapes = [(x.neighbours.shape, x.smoothness.shape) for x in (now, start)]
    if shapes[0] != shapes[1] or not np.array_equal(now.ids, start.ids):
        raise DataError(
            f"the features of {len(now.ids):,} images cannot be compared with those of "
            f"{len(start.ids):,} at the start: they are not of the same images and settings",
            "evaluate both on the same images",
        )
    images = len(now.ids)
    shared = shared_neighbours(now.neighbours, start.neighbours)
    rank = min(1.0, now.rank / start.rank) if start.rank > 0 else 0.0
    few = len(now.smoothness)
    smooth = bool(few) and float(start.smoothness.mean()) >= SMOOTH

    def parts(weights: Array) -> list[Array]:
        """Each part for weights of images [B, N]."""
        rows = [np.full(len(weights), rank), (weights @ shared / weights.sum(1)).clip(0)]
        if smooth:
            before = weights[:, :few] @ start.smoothness
            after = weights[:, :few] @ now.smoothness
            share = np.divide(after, before, out=np.zeros_like(after), where=before > 0)
            rows.append(share.clip(0, 1))
        return rows

    def left(rows: list[Array]) -> Array:
        return np.asarray(np.prod(rows, axis=0) ** (1 / len(rows)))

    whole = parts(np.ones((1, images)))
    generator = np.random.default_rng([seed, images])
    weights = generator.multinomial(images, np.full(images, 1 / images), draws).astype(np.float64)
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(left(parts(weights)), [tail, 100 - tail])
    interval = Interval(float(left(whole)[0]), float(low), float(high))
    return Left(interval, dict(zip(PARTS, (float(row[0]) for row in whole), strict=False)))


def shared_neighbours(now: npt.NDArray[np.int64], start: npt.NDArray[np.int64]) -> Array:
    """Of each image [N]: the share of its neighbours at the start that it still has, less what
    chance gives, as a share of what is possible beyond chance.
    """
    images, k = now.shape
    chance = k / max(1, images - 1)
    if chance >= 1:
        return np.ones(images)  # all others are neighbours, whatever the features
    still = (now[:, :, None] == start[:, None, :]) & (start >= 0)[:, None, :]
    return np.asarray((still.any(2).sum(1) / k - chance) / (1 - chance))
