"""Hierarchical k-means, bottom-up (Vo et al. 2024, arXiv 2405.15613, section 3).

Centroids of k-means follow the density of the rows, so frequent things get most clusters. Two
remedies: k-means of the centroids, level on level, each flatter than the one below; and resampling
within a level: k-means once more, of the rows nearest to each centroid, as many from each cluster,
and then all rows are assigned to the new centroids.

The first level goes over the files; the others are k-means of centroids, which one task does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import first_few, lloyd
from pipeline.curate.choose.assign import assign
from pipeline.curate.choose.first_few import Entries, Limits
from pipeline.curate.choose.kmeans import Centroids, fit_local
from pipeline.curate.choose.lloyd import ONE_CPU, Cost, Fitted, Resources
from pipeline.curate.rows.draws_by_id import firsts, numbers_as_ids
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.errors import PipelineError
from pipeline.uri import Place

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
class Hierarchy:
    """The levels, and the leaf of each row.

    Attributes:
        leaves: centroids of the finest level.
        folder: where the leaf of each row is written: `NNNNN.parquet` (`assign.ASSIGNED`).
        key: of all of it.
        sizes: rows of each leaf, int64 [leaves].
        parents: for each level but the top, the cluster of the next level of each of its clusters.
        cost: of all that it took.
    """

    leaves: Fitted
    folder: str
    key: str
    sizes: Array
    parents: tuple[Array, ...]
    cost: Cost

    def tops(self) -> Array:
        """The cluster of the top level of each leaf, int64 [leaves]."""
        tops = np.arange(len(self.sizes))
        for parents in self.parents:
            tops = parents[tops]
        return tops

    def level_sizes(self, sizes: Array) -> list[Array]:
        """What leaves hold, added up in each level, the leaves first."""
        levels = [np.asarray(sizes, np.int64)]
        for parents in self.parents:
            above = int(parents.max()) + 1 if len(parents) else 0
            levels.append(np.bincount(parents, levels[-1], above).astype(np.int64))
        return levels


def build(
    root: Place,
    name: str,
    rows: RowSet,
    levels: Sequence[int],
    seed: int,
    iterations: int,
    resampling: int,
    resources: Resources = ONE_CPU,
) -> Hierarchy:
    """Clusters the rows, level on level.

    Args:
        root: folder of the curation.
        name: of the step.
        rows: to cluster.
        levels: clusters of each, finest first; empty: `default_levels`.
        seed: of the run.
        iterations: of each k-means, at most.
        resampling: rounds of each level.
        resources: of the tasks over files.

    Raises:
        PipelineError: a level is not coarser than the one below it.
    """
    clusters = tuple(levels) or default_levels(rows.rows, rows.source.dim)
    check_levels(clusters)
    cost = Cost()
    fitted = lloyd.fit(root, f"{name}/leaves-0", rows, clusters[0], seed, iterations, resources)
    result, sizes = assign(root, f"{name}/assigned-0", rows, fitted, resources)
    cost.add(fitted.cost)
    cost.add(result)
    for turn in range(1, resampling + 1):
        if rows.rows <= fitted.clusters:
            break  # every row is a leaf
        near = _nearest_rows(root, f"{name}/near-{turn}", rows, fitted, result, cost)
        fitted = lloyd.fit(
            root, f"{name}/leaves-{turn}", near, fitted.clusters, seed + turn, iterations, resources
        )
        result, sizes = assign(root, f"{name}/assigned-{turn}", rows, fitted, resources)
        cost.add(fitted.cost)
        cost.add(result)
    arguments = (fitted, clusters[1:], seed, iterations, resampling, resources.gpus > 0)
    above = run_step(
        root,
        f"{name}/levels",
        [result.key, fitted.key, list(clusters[1:]), seed, iterations, resampling],
        [Task("levels", arguments)],
        _levels_task,
        cpus=resources.cpus,
        gpus=resources.gpus,
    )
    cost.add(above)
    parents = []
    for level in range(len(clusters) - 1):
        table = read_table(above.folder, f"level-{level}")
        parents.append(np.asarray(table["parent"].to_numpy(), np.int64))
    return Hierarchy(fitted, result.folder, above.key, sizes, tuple(parents), cost)


def half_mean_size(rows: int, clusters: int) -> int:
    """Rows that a round of resampling takes from each cluster (Vo et al.: half the mean size)."""
    return max(1, rows // (2 * max(1, clusters)))


def nearest_entries(name: str, assigned: str) -> Entries:
    """Rows of a file that ask to be chosen by their similarity to their centroid."""
    table = read_table(assigned, name)
    similarity = np.asarray(table["similarity"].to_numpy(), np.float64)
    return Entries(
        np.asarray(table["leaf"].to_numpy(), np.int64),
        -similarity,
        ids_of(table["image_id"]),
        np.asarray(table["row"].to_numpy(), np.int64),
    )


def _nearest_rows(
    root: Place, name: str, rows: RowSet, fitted: Fitted, assigned: Result, cost: Cost
) -> RowSet:
    """The rows nearest to each centroid, equally many of each cluster that has them."""
    quota = np.full(fitted.clusters, half_mean_size(rows.rows, fitted.clusters))
    reader = partial(nearest_entries, assigned=assigned.folder)
    limits = first_few.limits(root, name, rows, quota, reader, assigned.key, cost)
    tasks = [Task(file, (file, assigned.folder, limits)) for file in rows.names]
    chosen = run_step(root, f"{name}/rows", limits.key, tasks, _near_task)
    cost.add(chosen)
    counts = [account["rows"] for account in chosen.accounts]
    return rows.within(chosen.folder, chosen.key, counts)


def _near_task(folder: str, name: str, assigned: str, limits: Limits) -> Account:
    entries = nearest_entries(name, assigned)
    rows = entries.rows[limits.load().chosen(entries)]
    return {"rows": len(rows), "bytes": write_table(pa.table({"row": rows}), folder, name)}


def _levels_task(
    folder: str,
    fitted: Fitted,
    levels: tuple[int, ...],
    seed: int,
    iterations: int,
    resampling: int,
    gpu: bool,
) -> Account:
    """Clusters centroids, level on level, and writes the parent of each."""
    points, written = fitted.centroids(), 0
    for level, clusters in enumerate(levels):
        points, parents = level_of(points, clusters, seed, iterations, resampling, gpu)
        table = pa.table({"cluster": np.arange(len(parents)), "parent": parents})
        written += write_table(table, folder, f"level-{level}")
    return {"rows": fitted.clusters, "bytes": written}


def level_of(
    points: Halves, clusters: int, seed: int, iterations: int, resampling: int, gpu: bool = False
) -> tuple[Halves, Array]:
    """k-means of centroids, with resampling.

    Args:
        points: centroids of the level below, [n, d].
        clusters: of this level.
        seed: of the run.
        iterations: of each k-means.
        resampling: rounds.
        gpu: use it for the products.

    Returns:
        This level's centroids [k, d], none of which is empty, and the one of each point, int64 [n].
    """
    ids, numbers = numbers_as_ids(len(points)), np.arange(len(points))
    centroids = fit_local(ids, points, clusters, seed, iterations, gpu).centroids
    for turn in range(1, resampling + 1):
        if len(centroids) >= len(points):
            break
        labels, similarity = Centroids(centroids, gpu).nearest(points)
        quota = np.full(len(centroids), half_mean_size(len(points), len(centroids)))
        picked = np.sort(firsts(labels, -similarity, ids, numbers, quota))
        centroids = fit_local(
            ids[picked], points[picked], len(centroids), seed + turn, iterations, gpu
        ).centroids
    labels, _ = Centroids(centroids, gpu).nearest(points)
    used, parents = np.unique(labels, return_inverse=True)
    return centroids[used], parents.astype(np.int64)
