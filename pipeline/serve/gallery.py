"""The set as a page shows it: rows, and orders of them that put like beside like.

Shapes: n rows, D width, g groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.curate.choose.kmeans import KMeans, fit_local
from pipeline.curate.rows.exact import unit_half
from pipeline.search.rows import label_name

Array = np.ndarray[Any, Any]

MAX_CLUSTERS = 64
_FITTED_ROWS = 10_000  # that the clusters are fitted on; all rows are put into the nearest one
_FIT_TURNS = 10
_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class Grouping:
    """Rows in an order, cut into groups.

    Attributes:
        name: cluster, label, ...; "all" for one group of all rows.
        groups: names.
        starts: int64 [g + 1]: where each group begins in the order.
        order: int64 [n]: row numbers.
    """

    name: str
    groups: tuple[str, ...]
    starts: Array
    order: Array

    def summary(self) -> dict[str, Any]:
        """As the page gets it."""
        counts = np.diff(self.starts).tolist()
        groups = zip(self.groups, counts, strict=True)
        return {"name": self.name, "groups": [{"name": n, "count": c} for n, c in groups]}


def everything(rows: int) -> Grouping:
    """All rows as they lie, which is the order in which images are read fastest."""
    return Grouping("all", ("all images",), np.array([0, rows]), np.arange(rows))


def grouped(name: str, groups: Sequence[str], of_rows: Array, within: Array | None) -> Grouping:
    """Groups by size, the largest first; empty ones are left out.

    Args:
        name: of the grouping.
        groups: names.
        of_rows: int [n]: the group of each row.
        within: float [n]: rows of a group come by this, the highest first; None: as they lie.
    """
    counts = np.bincount(of_rows, minlength=len(groups))
    by_size = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    rank = np.zeros(len(groups), np.int64)
    rank[by_size] = np.arange(len(by_size))
    first = np.zeros(len(of_rows)) if within is None else -within
    order = np.lexsort((np.arange(len(of_rows)), first, rank[of_rows]))
    starts = np.concatenate([[0], np.cumsum(counts[by_size])])
    return Grouping(name, tuple(groups[i] for i in by_size), starts, order)


def by_text(name: str, texts: Array) -> Grouping:
    """Rows of equal text in one group."""
    groups, of_rows = np.unique(texts, return_inverse=True)
    return grouped(name, [str(group) for group in groups], of_rows, None)


def label_texts(labels: Array, class_names: Sequence[str]) -> Array:
    """Names of labels; a label without a name is a number, -1 is `no label`.

    Args:
        labels: int64 [n], -1 where unknown.
        class_names: by label.
    """
    known, of_rows = np.unique(labels, return_inverse=True)
    names = [label_name(i, class_names) if i >= 0 else "no label" for i in known.tolist()]
    return np.array(names, object)[of_rows]


def by_cluster(vectors: Array, ids: Array, seed: int = 0) -> Grouping:
    """Rows by the nearest of up to 64 spherical k-means centroids, the most typical first.

    Args:
        vectors: float [n, D], of any length.
        ids: uint8 [n, 16]; they decide what is drawn, so that a set has its clusters.
        seed: of the draws.
    """
    rows = len(vectors)
    clusters = int(np.clip(np.sqrt(rows / 2), 1, MAX_CLUSTERS))
    # the rows with the lowest ids: a sample, since ids are hashes
    sample = np.argsort(ids[:, :8].copy().view(">u8")[:, 0], kind="stable")[:_FITTED_ROWS]
    kmeans = KMeans(clusters, seed, _FIT_TURNS)
    fit = fit_local(ids[sample], unit_half(vectors[sample]), kmeans)
    centroids = fit.centroids.astype(np.float32)
    nearest, similarity = np.zeros(rows, np.int64), np.zeros(rows, np.float32)
    for start in range(0, rows, _BLOCK_ROWS):
        block = vectors[start : start + _BLOCK_ROWS].astype(np.float32)
        lengths = np.linalg.norm(block, axis=1).clip(1e-12)
        products = block @ centroids.T
        nearest[start : start + len(block)] = best = products.argmax(1)
        similarity[start : start + len(block)] = products[np.arange(len(block)), best] / lengths
    by_size = grouped("cluster", [""] * len(centroids), nearest, similarity)
    names = tuple(f"cluster {number + 1}" for number in range(len(by_size.groups)))
    return replace(by_size, groups=names)
