"""k-means over files: tasks hold a part of the rows and all centroids, files hold what adds up.

The result is that of `kmeans.fit_local`, bit by bit. A fit that would be quick in one process is
one task. Otherwise each pass of the seeding and each iteration is a step, so a fit that was killed
goes on with what is missing. When it ends, one file of centroids is left.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.curate.choose import kmeans
from pipeline.curate.choose.kmeans import UNIT
from pipeline.curate.choose.lloyd_tasks import (
    CentroidFiles,
    Part,
    draw_task,
    fit_task,
    merge_drawn,
    merge_sums,
    read_vectors,
    sum_task,
)
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import RowSet, Source
from pipeline.curate.rows.tables import list_array, matrix, read_table, write_table
from pipeline.curate.steps.steps import Result, Task, remove_steps, run_step
from pipeline.errors import PipelineError
from pipeline.storage.places import resolve_uri, with_retries
from pipeline.storage.run_folder import fingerprint
from pipeline.storage.transfer import read_mark, write_bytes_atomic
from pipeline.uri import Place, join

Array = np.ndarray[Any, Any]

_FIT = re.compile(r"fit-[0-9a-f]{16}")

LOCAL_WORK = 2**35  # products of an iteration times width that one task does in about a second
LOCAL_BYTES = 2**28  # of vectors that one task holds
GROUP_ROWS = 2**16  # of one task, at least; or as many as there are centroids
RANGE_ELEMENTS = 2**20  # sums, clusters times width, that one task adds up
TASK_ELEMENTS = 2**27  # most centroids times width: sums of 1 GiB in doubles


@dataclass
class Cost:
    """What steps cost, added up."""

    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0

    def add(self, other: Result | Cost) -> None:
        """Counts a step's, or other steps', cost in."""
        self.seconds += other.seconds
        self.cpu_s += other.cpu_s
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@dataclass(frozen=True)
class Fitted:
    """A finished k-means.

    Attributes:
        folder: with `centroids.parquet`.
        key: of the settings and rows.
        clusters: how many there are.
        dim: width.
        similarity: mean similarity of rows to their centroids, before each iteration.
        cost: of all that it took.
    """

    folder: str
    key: str
    clusters: int
    dim: int
    similarity: tuple[float, ...]
    cost: Cost

    def centroids(self) -> Halves:
        """Half [k, d]."""
        return matrix(read_table(self.folder, "centroids", ["vector"])["vector"], self.dim)


@dataclass(frozen=True)
class Resources:
    """Of a task: CPUs, GPUs, and how much work is left to one task."""

    cpus: float = 1.0
    gpus: float = 0.0
    local_work: float = LOCAL_WORK
    group_rows: int = GROUP_ROWS


ONE_CPU = Resources()


def fit(
    root: Place,
    name: str,
    rows: RowSet,
    clusters: int,
    seed: int,
    iterations: int,
    resources: Resources = ONE_CPU,
) -> Fitted:
    """Spherical k-means of the rows; see `kmeans`.

    Args:
        root: folder of the curation.
        name: of the step; files go to `root/name`.
        rows: to cluster.
        clusters: wanted; there are fewer where fewer rows differ.
        seed: of the run.
        iterations: at most; it ends where no centroid changes.
        resources: of a task.

    Raises:
        PipelineError: so many centroids do not fit into a task.
    """
    dim = rows.source.dim
    clusters = min(clusters, rows.rows)  # a row is one cluster at most
    if clusters * dim > TASK_ELEMENTS:
        raise PipelineError(
            f"{clusters:,} clusters of {dim} dimensions do not fit into a task of 2 GB",
            f"ask for at most {TASK_ELEMENTS // dim:,}",
        )
    settings = ["k-means", rows.key, list(rows.names), clusters, seed, iterations]
    key = fingerprint(settings)
    folder = str(join(root, *name.split("/"), f"fit-{key}"))
    fs, path = resolve_uri(folder)
    known = read_mark(fs, f"{path}/fit.json")
    if not known:
        groups = rows.groups(max(resources.group_rows, clusters))
        steps = _Steps(root, name, key, rows.source, groups, seed, resources, Cost())
        known = _fit(steps, folder, rows, clusters, iterations)
        _tidy(root, name, folder)
    return Fitted(
        folder=folder,
        key=key,
        clusters=known["clusters"],
        dim=dim,
        similarity=tuple(known["similarity"]),
        cost=Cost(**known["cost"]),
    )


def _tidy(root: Place, name: str, folder: str) -> None:
    """Deletes what a finished fit does not need: its parts, which are larger than the rows, and
    the fits under other keys, of rows or settings that there are no more.
    """
    fs, path = resolve_uri(folder)
    above = pafs.FileSelector(path.rpartition("/")[0])
    for info in with_retries(f"listing {above.base_dir}", lambda: fs.get_file_info(above)):
        stale = bool(_FIT.fullmatch(info.base_name)) and info.path != path
        stale |= info.base_name in ("seeds", "means", "local")
        if stale and info.type == pafs.FileType.Directory:
            remove_steps(fs, info.path)


def _fit(
    steps: _Steps, folder: str, rows: RowSet, clusters: int, iterations: int
) -> dict[str, Any]:
    """Runs the steps and writes the centroids and, last, `fit.json`."""
    dim, resources = rows.source.dim, steps.resources
    operations = float(rows.rows) * clusters * dim
    if operations <= resources.local_work and rows.rows * dim * 2 <= LOCAL_BYTES:
        gpu = resources.gpus > 0
        task = Task("fit", (rows.source, rows.names, clusters, steps.seed, iterations, gpu))
        one = steps.run("local", [task], fit_task)
        centroids, similarity = read_vectors(one.folder, "fit", dim), one.accounts[0]["similarity"]
    else:
        stored = steps.seeds(clusters)
        similarity = []
        if stored.count:
            stored, similarity = steps.means(stored, iterations, rows.rows)
        centroids = stored.load(dim)
    write_table(pa.table({"vector": list_array(centroids)}), folder, "centroids")
    known = {"clusters": len(centroids), "similarity": similarity, "cost": asdict(steps.cost)}
    fs, path = resolve_uri(folder)
    write_bytes_atomic(json.dumps(known).encode(), fs, f"{path}/fit.json")
    return known


@dataclass
class _Steps:
    """The passes of one fit."""

    root: Place
    name: str
    key: str
    source: Source
    groups: list[tuple[str, ...]]
    seed: int
    resources: Resources
    cost: Cost

    def run(self, step: str, tasks: list[Task], function: Any, heavy: bool = True) -> Result:
        """A step below this fit's name, its cost counted."""
        result = run_step(
            self.root, f"{self.name}/{step}", self.key, tasks, function,
            cpus=self.resources.cpus if heavy else 1.0,
            gpus=self.resources.gpus if heavy else 0.0,
        )  # fmt: skip
        self.cost.add(result)
        return result

    @property
    def parts(self) -> list[Part]:
        """The rows as tasks go through them."""
        gpu = self.resources.gpus > 0
        return [Part(f"{i:05d}", self.source, group, gpu) for i, group in enumerate(self.groups)]

    def seeds(self, clusters: int) -> CentroidFiles:
        """Draws the seeds: each pass a step of all rows and a step that merges."""
        seeds, turn, before = CentroidFiles((), 0), 0, ""
        parts, dim = self.parts, self.source.dim
        names = [part.name for part in parts]
        while seeds.count < clusters:
            count = kmeans.drawn_next(seeds.count, clusters)
            new = CentroidFiles(seeds.folders[-1:], 1)
            tasks = [Task(part.name, (part, before, new, self.seed, turn, count)) for part in parts]
            drawn = self.run(f"seeds/{turn:03d}/drawn", tasks, draw_task)
            merge = [Task("new", (drawn.folder, names, count, dim))]
            merged = self.run(f"seeds/{turn:03d}/new", merge, merge_drawn, heavy=False)
            before, turn = drawn.folder, turn + 1
            drawn_now = merged.accounts[0]["rows"]
            if not drawn_now:
                break
            seeds = CentroidFiles((*seeds.folders, (merged.folder, "new")), seeds.count + drawn_now)
        return seeds

    def means(
        self, stored: CentroidFiles, iterations: int, rows: int
    ) -> tuple[CentroidFiles, list[float]]:
        """Lloyd's iterations: each a step that sums rows and one that adds up the sums."""
        parts, dim = self.parts, self.source.dim
        names = [part.name for part in parts]
        step = max(1, RANGE_ELEMENTS // dim)
        ranges = [(i, min(i + step, stored.count)) for i in range(0, stored.count, step)]
        similarity = []
        for turn in range(iterations):
            tasks = [Task(part.name, (part, stored, self.seed, turn)) for part in parts]
            summed = self.run(f"means/{turn:03d}/sums", tasks, sum_task)
            tasks = [
                Task(f"{i:05d}", (f"{i:05d}", (summed.folder, names), low, high, stored, dim))
                for i, (low, high) in enumerate(ranges)
            ]
            merged = self.run(f"means/{turn:03d}/new", tasks, merge_sums, heavy=False)
            similarity.append(sum(a["similarity"] for a in summed.accounts) / UNIT / rows)
            files = tuple((merged.folder, task.name) for task in tasks)
            stored = CentroidFiles(files, stored.count, merged.folder)
            # With an empty cluster it goes on as long as a spare row can fill it.
            empty, spare = merged.total("empty"), merged.total("spare")
            if not merged.total("changed") and not (empty and spare):
                break
        return stored, similarity
