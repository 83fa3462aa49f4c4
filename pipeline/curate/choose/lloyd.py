"""k-means over files: tasks hold a part of the rows and all centroids, files hold what adds up.

The result is that of `kmeans.fit_local`, bit by bit. A fit that would be quick in one process is
one task. Otherwise each pass of the seeding and each iteration is a step, so a fit that was killed
goes on with what is missing. When it ends, one file of centroids is left.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.curate.choose.kmeans import UNIT, KMeans, Pass, drawn_next
from pipeline.curate.choose.lloyd_tasks import (
    CentroidFiles,
    Fitted,
    assign_task,
    draw_task,
    fit_task,
    merge_drawn,
    merge_sums,
    sum_task,
)
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import list_array, read_table, write_table
from pipeline.curate.steps.steps import ONE_CPU, Resources, Step, Steps, by_number
from pipeline.curate.steps.tasks import remove_steps
from pipeline.errors import PipelineError
from pipeline.storage.places import list_files, resolve_uri
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import read_mark, write_bytes_atomic
from pipeline.uri import join

Array = np.ndarray[Any, Any]

_FIT = re.compile(r"fit-[0-9a-f]{16}")

LOCAL_WORK = 2**35  # products of an iteration times width that one task does in about a second
LOCAL_BYTES = 2**28  # of vectors that one task holds
GROUP_ROWS = 2**16  # of one task, at least; or as many as there are centroids
RANGE_ELEMENTS = 2**20  # sums, clusters times width, that one task adds up
TASK_ELEMENTS = 2**27  # most centroids times width: sums of 1 GiB in doubles


def fit(steps: Steps, rows: RowSet, kmeans: KMeans, resources: Resources = ONE_CPU) -> Fitted:
    """Spherical k-means of the rows; see `kmeans`.

    Args:
        steps: whose folder is this fit's own.
        rows: to cluster.
        kmeans: what is asked for.
        resources: of a task over the rows.

    Raises:
        PipelineError: so many centroids do not fit into a task.
    """
    dim = rows.source.dim
    kmeans = replace(kmeans, clusters=min(kmeans.clusters, rows.rows))  # a row is one at most
    if kmeans.clusters * dim > TASK_ELEMENTS:
        raise PipelineError(
            f"{kmeans.clusters:,} clusters of {dim} dimensions do not fit into a task of 2 GB",
            f"ask for at most {TASK_ELEMENTS // dim:,}",
        )
    settings = [kmeans.clusters, kmeans.seed, kmeans.iterations]
    key = fingerprint(["k-means", rows.key, list(rows.names), *settings])
    folder = str(join(steps.root, f"fit-{key}"))
    fs, path = resolve_uri(folder)
    known = read_mark(fs, f"{path}/fit.json")
    if not known:
        known = _fit(_Passes(steps.aside(), rows, kmeans, resources), folder)
        write_bytes_atomic(json.dumps(known).encode(), fs, f"{path}/fit.json")
    _tidy(folder)  # also after a start that was killed before it
    step = Step("k-means", key, folder, **known["cost"])
    steps.done.append(step)
    return Fitted(step, known["clusters"], dim, tuple(known["similarity"]))


def _tidy(folder: str) -> None:
    """Deletes what a finished fit does not need: its parts, which are larger than the rows, and
    the fits under other keys, of rows or settings that there are no more.
    """
    fs, path = resolve_uri(folder)
    for info in list_files(fs, path.rpartition("/")[0], recursive=False, folders=True):
        stale = bool(_FIT.fullmatch(info.base_name)) and info.path != path
        stale |= info.base_name in ("seeds", "means", "local")
        if stale and info.type == pafs.FileType.Directory:
            remove_steps(fs, info.path)


def _fit(passes: _Passes, folder: str) -> dict[str, Any]:
    """Runs the passes and writes the centroids; what `fit.json` says of them."""
    rows = passes.rows
    size = rows.rows * rows.source.dim
    if size * passes.kmeans.clusters <= LOCAL_WORK and 2 * size <= LOCAL_BYTES:
        centroids, similarity = passes.at_once()
    else:
        centroids, similarity = passes.means(passes.seeds())
    write_table(pa.table({"vector": list_array(centroids)}), folder, "centroids")
    done = passes.steps.done
    cost = {
        "seconds": sum(step.seconds for step in done),
        "cpu_s": sum(step.cpu_s for step in done),
        "peak_bytes": max(step.peak_bytes for step in done) if done else 0,
    }
    return {"clusters": len(centroids), "similarity": similarity, "cost": cost}


@dataclass
class _Passes:
    """The passes of one fit."""

    steps: Steps
    rows: RowSet
    kmeans: KMeans
    resources: Resources

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """Files of the rows, as tasks go through them."""
        return by_number(self.rows.groups(max(GROUP_ROWS, self.kmeans.clusters)))

    def at_once(self) -> tuple[Halves, list[float]]:
        """The whole fit in one task."""
        step = self.steps.run(
            "local", fit_task, {"fit": None}, self.resources, rows=self.rows, settings=self.kmeans
        )
        return CentroidFiles(self.rows.source.dim, (step,)).load(), step.accounts[0]["similarity"]

    def seeds(self) -> CentroidFiles:
        """Draws the seeds: each pass a step of all rows and a step that merges."""
        dim, clusters = self.rows.source.dim, self.kmeans.clusters
        seeds, drawn, turn = CentroidFiles(dim), None, 0
        while seeds.count < clusters:
            count = drawn_next(seeds.count, clusters)
            drawn = self.steps.run(
                f"seeds/{turn:03d}/drawn",
                draw_task,
                self.parts,
                self.resources,
                rows=self.rows,
                before=drawn,
                new=CentroidFiles(dim, seeds.steps[-1:]),
                draw=Pass(self.kmeans.seed, turn, count),
            )
            name = f"seeds/{turn:03d}/new"
            merged = self.steps.run(name, merge_drawn, {"new": count}, drawn=drawn, dim=dim)
            new = int(merged.total("rows"))
            if not new:
                break
            seeds = CentroidFiles(dim, (*seeds.steps, merged), seeds.count + new)
            turn += 1
        return seeds

    def means(self, centroids: CentroidFiles) -> tuple[Halves, list[float]]:
        """Lloyd's iterations: each a step that sums rows and one that adds up the sums."""
        dim = centroids.dim
        step = max(1, RANGE_ELEMENTS // dim)
        starts = range(0, centroids.count, step)
        ranges = by_number((low, min(low + step, centroids.count)) for low in starts)
        similarity: list[float] = []
        for turn in range(self.kmeans.iterations if centroids.count else 0):
            summed = self.steps.run(
                f"means/{turn:03d}/sums",
                sum_task,
                self.parts,
                self.resources,
                rows=self.rows,
                centroids=centroids,
                seed=self.kmeans.seed,
                turn=turn,
            )
            name = f"means/{turn:03d}/new"
            merged = self.steps.run(name, merge_sums, ranges, summed=summed, before=centroids)
            similarity.append(summed.total("similarity") / UNIT / self.rows.rows)
            centroids = CentroidFiles(dim, (merged,), centroids.count, refilled=True)
            # With an empty cluster it goes on as long as a spare row can fill it.
            empty, spare = merged.total("empty"), merged.total("spare")
            if not merged.total("changed") and not (empty and spare):
                break
        return centroids.load(), similarity


def assign(
    steps: Steps, name: str, rows: RowSet, fitted: Fitted, resources: Resources = ONE_CPU
) -> tuple[Step, Array]:
    """The cluster of each row.

    Returns:
        The step, which wrote `NNNNN.parquet` (`lloyd_tasks.ASSIGNED`) for each input file, and the
        members of each cluster, int64 [k].
    """
    numbered = by_number(rows.groups(GROUP_ROWS))
    groups = {f"group-{number}": group for number, group in numbered.items()}
    step = steps.run(name, assign_task, groups, resources, rows=rows, fitted=fitted)
    counts = np.zeros(fitted.clusters, np.int64)
    for group in groups:
        table = read_table(step.folder, f"{group}.counts")
        counts[table["cluster"].to_numpy()] += table["count"].to_numpy()
    return step, counts
