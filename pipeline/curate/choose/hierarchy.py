"""Hierarchical k-means, bottom-up (Vo et al. 2024, arXiv 2405.15613, section 3).

Centroids of k-means follow the density of the rows, so frequent things get most clusters. Two
remedies: k-means of the centroids, level on level, each flatter than the one below; and resampling
within a level: k-means once more, of the rows nearest to each centroid, as many from each cluster,
and then all rows are assigned to the new centroids.

The first level goes over the files; the others are k-means of centroids, which one task does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import first_few, lloyd
from pipeline.curate.choose.first_few import Entries, Limits
from pipeline.curate.choose.kmeans import KMeans, fit_local
from pipeline.curate.choose.lloyd import assign
from pipeline.curate.choose.lloyd_tasks import Fitted, device_of
from pipeline.curate.rows.draws_by_id import numbers_as_ids
from pipeline.curate.rows.exact import Centres, Halves
from pipeline.curate.rows.first_of_each import firsts
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.steps.steps import ONE_CPU, Account, Output, Resources, Step, Steps
from pipeline.errors import PipelineError
from pipeline.storage.run_folder import fingerprint

Array = np.ndarray[Any, Any]

LEAF_ROWS = 30  # mean members of a leaf
MOST_LEAVES = 100_000  # the first level of Vo et al., before each cluster is split
RATIO = 10  # of neighbouring levels; Vo et al.: 20, 10 and 5
LEAST_RATIO = 3  # of the top level
TOP = 300  # clusters: a top level coarser than there are concepts hides the rare ones
LEAST_TOP = 10  # clusters of the top level; with less there is one level


def default_levels(rows: int, dim: int, top: int = TOP) -> tuple[int, ...]:
    """Clusters of each level, finest first, for so many rows.

    Leaves have 30 rows in the mean, and more above 3,000,000 rows. Each level has a tenth of the
    clusters of the one below, but the top has at least `top`; with less than `3 top` leaves a third
    of them, since two levels were better than one at every size (benchmarks/concepts.py). Below
    900 rows there is one level.

    Args:
        rows: considered.
        dim: of the vectors, which limits how many centroids a task can hold.
        top: fewest clusters of the top level.
    """
    levels = [max(1, min(rows // LEAF_ROWS, MOST_LEAVES, lloyd.TASK_ELEMENTS // dim))]
    least = min(top, levels[0] // LEAST_RATIO)
    while least >= LEAST_TOP and levels[-1] >= LEAST_RATIO * least:
        levels.append(max(least, levels[-1] // RATIO))
    return tuple(levels)


def check_levels(levels: Sequence[int]) -> None:
    """Raises PipelineError where a level is not coarser than the one below."""
    for below, above in pairwise(levels):
        if above >= below:
            raise PipelineError(
                f"balance.levels={list(levels)}: {above:,} clusters over {below:,}",
                "name the finest level first; each must have fewer clusters than the one before",
            )


@dataclass(frozen=True)
class Levels:
    """What a hierarchy is asked for.

    Attributes:
        clusters: of each level, finest first; empty: `default_levels`.
        seed: of the run.
        iterations: of each k-means, at most.
        resampling: rounds of each level.
    """

    clusters: tuple[int, ...]
    seed: int
    iterations: int
    resampling: int


@dataclass(frozen=True)
class Hierarchy:
    """The levels, and the leaf of each row.

    Attributes:
        leaves: centroids of the finest level.
        assigned: step that wrote the leaf of each row (`lloyd_tasks.ASSIGNED`).
        sizes: rows of each leaf, int64 [leaves].
        parents: for each level but the top, the cluster of the next level of each of its clusters.
        key: of all of it.
    """

    leaves: Fitted
    assigned: Step
    sizes: Array
    parents: tuple[Array, ...]
    key: str

    def tops(self) -> Array:
        """The cluster of the top level of each leaf, int64 [leaves]."""
        tops = np.arange(len(self.sizes))
        for parents in self.parents:
            tops = parents[tops]
        return tops

    def level_sizes(self, sizes: Array) -> list[Array]:
        """What leaves hold, added up in each level, the leaves first."""
        return added_up(sizes, self.parents)


def added_up(leaves: Array, parents: Sequence[Array]) -> list[Array]:
    """Numbers of leaves, added up in each level, the leaves first; `parents` as in `Hierarchy`."""
    levels = [np.asarray(leaves, np.int64)]
    for above in parents:
        clusters = int(above.max()) + 1 if len(above) else 0
        levels.append(np.bincount(above, levels[-1], clusters).astype(np.int64))
    return levels


def build(steps: Steps, rows: RowSet, levels: Levels, resources: Resources = ONE_CPU) -> Hierarchy:
    """Clusters the rows, level on level.

    Args:
        steps: whose folder is the hierarchy's own.
        rows: to cluster.
        levels: what is asked for.
        resources: of the tasks that make products.

    Raises:
        PipelineError: a level is not coarser than the one below it.
    """
    clusters = levels.clusters or default_levels(rows.rows, rows.source.dim)
    check_levels(clusters)
    kmeans = KMeans(clusters[0], levels.seed, levels.iterations)
    fitted = lloyd.fit(steps.below("leaves-0"), rows, kmeans, resources)
    assigned, sizes = assign(steps, "assigned-0", rows, fitted, resources)
    for turn in range(1, levels.resampling + 1):
        if rows.rows <= fitted.clusters:
            break  # every row is a leaf
        # Equally many rows of each cluster, so that clusters of rare things stand as firm as
        # others; with other draws, or it would end where it began.
        near = _nearest_rows(steps.below(f"near-{turn}"), rows, fitted, assigned)
        kmeans = replace(kmeans, clusters=fitted.clusters, seed=levels.seed + turn)
        fitted = lloyd.fit(steps.below(f"leaves-{turn}"), near, kmeans, resources)
        assigned, sizes = assign(steps, f"assigned-{turn}", rows, fitted, resources)
    levels = replace(levels, clusters=clusters)
    above = steps.run(
        "levels", _levels_task, {"levels": None}, resources, fitted=fitted, levels=levels
    )
    parents = tuple(
        np.asarray(above.read(f"level-{level}")["parent"].to_numpy(), np.int64)
        for level in range(len(clusters) - 1)
    )
    return Hierarchy(fitted, assigned, sizes, parents, fingerprint([assigned.key, above.key]))


def half_mean_size(rows: int, clusters: int) -> int:
    """Rows that a round of resampling takes from each cluster (Vo et al.: half the mean size)."""
    return max(1, rows // (2 * max(1, clusters)))


def nearest_entries(name: str, assigned: Step) -> Entries:
    """Rows of a file that ask to be chosen by their similarity to their centroid."""
    table = assigned.read(name)
    return Entries.of(table, -np.asarray(table["similarity"].to_numpy(), np.float64))


def _nearest_rows(steps: Steps, rows: RowSet, fitted: Fitted, assigned: Step) -> RowSet:
    """The rows nearest to each centroid, equally many of each cluster that has them."""
    quota = np.full(fitted.clusters, half_mean_size(rows.rows, fitted.clusters))
    reader = partial(nearest_entries, assigned=assigned)
    limits = first_few.limits(steps, rows, quota, reader)
    files = dict.fromkeys(rows.names)
    near = steps.run("rows", _near_task, files, assigned=assigned, limits=limits)
    return rows.within(near.folder, near.key, [account["rows"] for account in near.accounts])


def _near_task(out: Output, _: None, assigned: Step, limits: Limits) -> None:
    entries = nearest_entries(out.name, assigned)
    out.table(pa.table({"row": entries.rows[limits.load().chosen(entries)]}))


def _levels_task(out: Output, _: None, fitted: Fitted, levels: Levels) -> Account:
    """Clusters centroids, level on level, and writes the parent of each."""
    points = fitted.centroids()
    for level, clusters in enumerate(levels.clusters[1:]):
        kmeans = KMeans(clusters, levels.seed, levels.iterations)
        points, parents = level_of(points, kmeans, levels.resampling, device_of(out))
        table = pa.table({"cluster": np.arange(len(parents)), "parent": parents})
        out.table(table, f"level-{level}")
    return {"rows": fitted.clusters}


def level_of(points: Halves, kmeans: KMeans, resampling: int, on: str = "") -> tuple[Halves, Array]:
    """k-means of centroids, with resampling.

    Args:
        points: centroids of the level below, [n, d].
        kmeans: what is asked for.
        resampling: rounds.
        on: torch device of the products.

    Returns:
        This level's centroids [k, d], none of which is empty, and the one of each point, int64 [n].
    """
    ids, numbers = numbers_as_ids(len(points)), np.arange(len(points))
    centroids = fit_local(ids, points, kmeans, on).centroids
    for turn in range(1, resampling + 1):
        if len(centroids) >= len(points):
            break
        labels, similarity = Centres(centroids, on).nearest_one(points)
        quota = np.full(len(centroids), half_mean_size(len(points), len(centroids)))
        picked = np.sort(firsts(labels, -similarity, ids, numbers, quota))
        again = replace(kmeans, clusters=len(centroids), seed=kmeans.seed + turn)
        centroids = fit_local(ids[picked], points[picked], again, on).centroids
    labels, _ = Centres(centroids, on).nearest_one(points)
    used, parents = np.unique(labels, return_inverse=True)
    return centroids[used], parents.astype(np.int64)
