"""k-means whose result does not depend on files, tasks, row order or the machine.

Spherical: a centroid is the mean of its members scaled to unit length, and a row belongs to the
centroid with the highest dot product. The vectors have unit length and are compared by cosine
everywhere else. Centroids are kept in half precision, so all products are exact (`exact.py`), and
so are sums of members: partial sums of any files, in any order, give the same centroids bit by bit.

Seeding draws in proportion to the squared distance from the nearest seed, several a pass as
k-means|| does (Bahmani et al. 2012), by clocks that are hashes of image ids. An empty cluster gets
a new seed in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.curate.rows.draws_by_id import REFILL, SEEDING, race
from pipeline.curate.rows.exact import Centres, Doubles, Halves, dots, unit_half
from pipeline.curate.rows.first_of_each import id_words
from pipeline.curate.rows.tables import HALF

Array = np.ndarray[Any, Any]

BLOCK_ROWS = 8192  # that are added up at once
BLOCK_ELEMENTS = 2**23  # of these rows, in doubles
MAX_DRAWN = 4096  # seeds of one pass
SPARE = 64  # rows that each task names for empty clusters
UNIT = 2.0**24  # similarities are added up as integers of this, so that sums are exact


@dataclass(frozen=True)
class KMeans:
    """What a k-means is asked for.

    Attributes:
        clusters: wanted; there are fewer where fewer rows differ.
        seed: of the run.
        iterations: at most; it ends where no centroid changes.
    """

    clusters: int
    seed: int
    iterations: int


def squared_distances(
    vectors: Halves, centroids: Halves, labels: Array, products: Doubles
) -> Doubles:
    """Exact squared distance of each row to its centroid, float64 [n]; 0 where they are equal."""
    lengths = dots(centroids, centroids)[labels]
    distances: Doubles = dots(vectors, vectors) + lengths - 2 * products
    return distances


@dataclass
class Drawn:
    """The earliest of a race: times [m], ids [m, 16] and vectors [m, d], by time."""

    times: Array
    ids: Array
    vectors: Halves

    @classmethod
    def of(cls, times: Array, ids: Array, vectors: Halves, count: int) -> Drawn:
        """The `count` earliest that arrive at all, ties by id."""
        arrived = np.flatnonzero(np.isfinite(times))
        if len(arrived) > count:
            last = np.partition(times[arrived], count - 1)[count - 1]
            arrived = arrived[times[arrived] <= last]
        high, low = id_words(ids[arrived])
        first = arrived[np.lexsort((low, high, times[arrived]))[:count]]
        return cls(times[first], ids[first], vectors[first])

    def merged(self, other: Drawn, count: int) -> Drawn:
        """The earliest of both."""
        return Drawn.of(
            np.concatenate([self.times, other.times]),
            np.concatenate([self.ids, other.ids]),
            np.concatenate([self.vectors, other.vectors]),
            count,
        )


def none_drawn(dim: int) -> Drawn:
    """Nobody yet."""
    return Drawn(np.zeros(0), np.zeros((0, 16), np.uint8), np.zeros((0, dim), HALF))


def drawn_next(drawn: int, clusters: int) -> int:
    """Seeds of the next pass: a quarter of those there are, so that few of a pass are alike."""
    return min(clusters - drawn, max(1, drawn // 4), MAX_DRAWN)


def closer(closest: Array, vectors: Halves, new: Centres) -> Array:
    """Squared distances to the nearest seed, after new seeds; float64 [n], infinite at first."""
    if not len(new):
        return closest
    labels, products = new.nearest_one(vectors)
    return np.minimum(closest, squared_distances(vectors, new.centres, labels, products))


@dataclass(frozen=True)
class Pass:
    """A pass of the seeding: seed of the run, number of the pass, seeds to draw."""

    seed: int
    turn: int
    count: int


def draw_seeds(closest: Array, ids: Array, vectors: Halves, draw: Pass) -> Drawn:
    """Rows drawn in proportion to their squared distance from the nearest seed.

    Args:
        closest: squared distances [n]; infinite before the first seed, which is drawn uniformly.
        ids: uint8 [n, 16].
        vectors: [n, d].
        draw: the pass; it gives fewer rows where fewer are apart from all seeds.
    """
    weights = np.where(np.isinf(closest), 1.0, closest)
    return Drawn.of(race(draw.seed, draw.turn, ids, weights, SEEDING), ids, vectors, draw.count)


@dataclass
class Sums:
    """What an iteration adds up over rows; sums of any parts give the same.

    Attributes:
        sums: float64 [k, d].
        counts: int64 [k].
        similarity: of all rows to their centroids, in units of 2^-24.
        spare: rows for empty clusters.
    """

    sums: Doubles
    counts: Array
    similarity: int
    spare: Drawn

    @classmethod
    def zero(cls, clusters: int, dim: int) -> Sums:
        """Of no rows."""
        return cls(np.zeros((clusters, dim)), np.zeros(clusters, np.int64), 0, none_drawn(dim))

    def add(self, ids: Array, vectors: Halves, centroids: Centres, seed: int, turn: int) -> None:
        """Adds rows, by the nearest of these centroids."""
        from scipy.sparse import csr_matrix

        # In blocks, for the rows become doubles.
        step = max(16, min(BLOCK_ELEMENTS // vectors.shape[1], BLOCK_ROWS))
        for begin in range(0, len(vectors), step):
            part = slice(begin, begin + step)
            rows = vectors[part]
            labels, products = centroids.nearest_one(rows)
            present, place = np.unique(labels, return_inverse=True)
            # One product adds up the rows of each cluster: five times as fast as np.add.at
            # (8,192 rows of width 384, 1,000 clusters), and exact in any order.
            ones = csr_matrix(
                (np.ones(len(rows)), (place, np.arange(len(rows)))), (len(present), len(rows))
            )
            self.sums[present] += ones @ rows.astype(np.float64)
            self.counts += np.bincount(labels, minlength=len(self.counts))
            self.similarity += int(np.rint(products * UNIT).astype(np.int64).sum())
            far = squared_distances(rows, centroids.centres, labels, products)
            times = race(seed, turn, ids[part], far, REFILL)
            self.spare = self.spare.merged(Drawn.of(times, ids[part], rows, SPARE), SPARE)


def means(sums: Doubles, counts: Array, before: Halves) -> Halves:
    """New centroids [k, d]; the one before where a cluster is empty or its members cancel out."""
    new = unit_half(sums)
    stays = (counts == 0) | ~new.any(1)
    new[stays] = before[stays]
    return new


def refill(centroids: Halves, counts: Array, spare: Drawn) -> Halves:
    """Empty clusters in order of their number get spare rows in order of their time."""
    empty = np.flatnonzero(counts == 0)
    if not len(empty) or not len(spare.times):
        return centroids
    _, first = np.unique(spare.vectors.view(np.uint16), axis=0, return_index=True)
    distinct = spare.vectors[np.sort(first)][: len(empty)]
    filled = centroids.copy()
    filled[empty[: len(distinct)]] = distinct
    return filled


def goes_on(counts: Array, spare: Drawn) -> bool:
    """Whether a row is to spare for an empty cluster, so that centroids change once more."""
    return bool((counts == 0).any() and len(spare.times))


@dataclass
class Fit:
    """Centroids, and how they came about.

    Attributes:
        centroids: half [k, d], unit length; fewer than asked for where fewer rows differ.
        similarity: mean similarity of rows to their centroids, before each iteration.
        passes: over the rows to draw the seeds.
    """

    centroids: Halves
    similarity: list[float] = field(default_factory=list)
    passes: int = 0


def fit_local(ids: Array, vectors: Halves, kmeans: KMeans, on: str = "") -> Fit:
    """The k-means of `lloyd.fit`, with the same result, for rows that fit into memory.

    Args:
        ids: uint8 [n, 16]; they alone decide what is drawn.
        vectors: [n, d] of unit length.
        kmeans: what is asked for.
        on: torch device of the products; the results are the same.
    """
    dim, seed = vectors.shape[1], kmeans.seed
    clusters = min(kmeans.clusters, len(vectors))
    fit = Fit(np.zeros((0, dim), HALF))
    closest, new = np.full(len(vectors), np.inf), fit.centroids
    while len(fit.centroids) < clusters:
        closest = closer(closest, vectors, Centres(new, on))
        count = drawn_next(len(fit.centroids), clusters)
        new = draw_seeds(closest, ids, vectors, Pass(seed, fit.passes, count)).vectors
        fit.passes += 1
        if not len(new):
            break
        fit.centroids = np.concatenate([fit.centroids, new])
    if not len(fit.centroids):
        return fit
    for turn in range(kmeans.iterations):
        total = Sums.zero(len(fit.centroids), dim)
        total.add(ids, vectors, Centres(fit.centroids, on), seed, turn)
        fit.similarity.append(total.similarity / UNIT / len(vectors))
        after = means(total.sums, total.counts, fit.centroids)
        changed = not np.array_equal(after, fit.centroids)
        fit.centroids = refill(after, total.counts, total.spare)
        if not changed and not goes_on(total.counts, total.spare):
            break
    return fit
