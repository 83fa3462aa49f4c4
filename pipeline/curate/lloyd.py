"""k-means over files: tasks hold a part of the rows and all centroids, files hold what adds up.

The result is that of `kmeans.fit_local`, bit by bit. A fit that would be quick in one process is
one task. Otherwise each pass of the seeding and each iteration is a step, so a fit that was killed
goes on with what is missing. When it ends, one file of centroids is left.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.curate import kmeans
from pipeline.curate.considered import Considered, Source
from pipeline.curate.exact import Halves
from pipeline.curate.kmeans import UNIT, Centroids, Drawn, Sums, none_drawn
from pipeline.curate.tables import (
    HALF,
    ID,
    ROW,
    id_array,
    ids_of,
    list_array,
    matrix,
    read_table,
    write_table,
)
from pipeline.curate.work import Account, Result, Task, run_step
from pipeline.data.storage import file_info, resolve_uri
from pipeline.data.transfer import read_json, write_bytes_atomic
from pipeline.errors import PipelineError
from pipeline.files import fingerprint
from pipeline.uri import Place, join

Array = np.ndarray[Any, Any]

LOCAL_WORK = 2**35  # products of an iteration times width that one task does in about a second
LOCAL_BYTES = 2**28  # of vectors that one task holds
GROUP_ROWS = 2**16  # of one task, at least; or as many as there are centroids
RANGE_ELEMENTS = 2**20  # sums, clusters times width, that one task adds up
TASK_ELEMENTS = 2**27  # most centroids times width: sums of 1 GiB in doubles
ASSIGNED = pa.schema(
    [("row", ROW), ("image_id", ID), ("leaf", pa.int64()), ("similarity", pa.float64())]
)


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
    rows: Considered,
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
    if clusters * dim > TASK_ELEMENTS:
        raise PipelineError(
            f"{clusters:,} clusters of {dim} dimensions do not fit into a task of 2 GB",
            f"ask for at most {TASK_ELEMENTS // dim:,}",
        )
    settings = ["k-means", rows.key, list(rows.names), clusters, seed, iterations]
    key = fingerprint(settings)
    folder = str(join(root, *name.split("/"), f"fit-{key}"))
    fs, path = resolve_uri(folder)
    known = read_json(fs, f"{path}/fit.json")
    if known is None:
        known = _fit(root, name, folder, rows, clusters, seed, iterations, key, resources)
        # Nothing reads the parts any more, and they are larger than the rows.
        for part in ("seeds", "means", "local"):
            place = resolve_uri(str(join(root, *name.split("/"), part)))[1]
            if file_info(fs, place).type == pafs.FileType.Directory:
                fs.delete_dir(place)
    return Fitted(
        folder=folder,
        key=key,
        clusters=known["clusters"],
        dim=dim,
        similarity=tuple(known["similarity"]),
        cost=Cost(**known["cost"]),
    )


def _fit(
    root: Place,
    name: str,
    folder: str,
    rows: Considered,
    clusters: int,
    seed: int,
    iterations: int,
    key: str,
    resources: Resources,
) -> dict[str, Any]:
    """Runs the steps and writes the centroids and, last, `fit.json`."""
    dim, cost = rows.source.dim, Cost()
    work = float(rows.rows) * clusters * dim
    if work <= resources.local_work and rows.rows * dim * 2 <= LOCAL_BYTES:
        task = Task(
            "fit", (rows.source, rows.names, clusters, seed, iterations, resources.gpus > 0)
        )
        one = run_step(
            root, f"{name}/local", key, [task], _fit_task,
            cpus=resources.cpus, gpus=resources.gpus,
        )  # fmt: skip
        cost.add(one)
        centroids, similarity = _vectors(one.folder, "fit", dim), one.accounts[0]["similarity"]
    else:
        groups = rows.groups(max(resources.group_rows, clusters))
        steps = _Steps(root, name, key, rows.source, groups, seed, resources, cost)
        found = steps.seeds(clusters)
        similarity = []
        if found.count:
            found, similarity = steps.means(found, iterations, rows.rows)
        centroids = found.load(dim)
    write_table(pa.table({"vector": list_array(centroids)}), folder, "centroids")
    known = {"clusters": len(centroids), "similarity": similarity, "cost": asdict(cost)}
    fs, path = resolve_uri(folder)
    write_bytes_atomic(json.dumps(known).encode(), fs, f"{path}/fit.json")
    return known


def _fit_task(
    folder: str,
    source: Source,
    names: tuple[str, ...],
    clusters: int,
    seed: int,
    iterations: int,
    gpu: bool,
) -> Account:
    points = source.read_all(names)
    found = kmeans.fit_local(points.ids, points.vectors, clusters, seed, iterations, gpu)
    table = pa.table({"vector": list_array(found.centroids)})
    written = write_table(table, folder, "fit")
    return {"rows": len(points.rows), "bytes": written, "similarity": found.similarity}


@dataclass(frozen=True)
class Files:
    """Centroids as they are between steps: files in order, and rows for the empty clusters."""

    folders: tuple[tuple[str, str], ...]  # folder and name of each file
    count: int
    spare: str = ""  # folder of `spare.parquet`

    def load(self, dim: int) -> Halves:
        """Half [k, d]."""
        if not self.folders:
            return np.zeros((0, dim), HALF)
        found = np.concatenate([_vectors(folder, name, dim) for folder, name in self.folders])
        if not self.spare:
            return found
        counts = np.concatenate(
            [
                read_table(folder, name, ["count"])["count"].to_numpy()
                for folder, name in self.folders
            ]
        )
        return kmeans.refill(found, counts, _read_drawn(self.spare, "spare", dim))


def _vectors(folder: str, name: str, dim: int) -> Halves:
    return matrix(read_table(folder, name, ["vector"])["vector"], dim)


def _write_drawn(drawn: Drawn, folder: str, name: str) -> int:
    columns = {
        "time": drawn.times,
        "image_id": id_array(drawn.ids),
        "vector": list_array(drawn.vectors),
    }
    return write_table(pa.table(columns), folder, name)


def _read_drawn(folder: str, name: str, dim: int) -> Drawn:
    table = read_table(folder, name)
    times = np.asarray(table["time"].to_numpy(), np.float64)
    return Drawn(times, ids_of(table["image_id"]), matrix(table["vector"], dim))


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
    def numbered(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(f"{i:05d}", group) for i, group in enumerate(self.groups)]

    def seeds(self, clusters: int) -> Files:
        """Draws the seeds: each pass a step of all rows and a step that merges."""
        found, turn, before = Files((), 0), 0, ""
        names = [name for name, _ in self.numbered]
        gpu = self.resources.gpus > 0
        while found.count < clusters:
            count = kmeans.drawn_next(found.count, clusters)
            new = Files(found.folders[-1:], 1)
            tasks = [
                Task(name, (name, self.source, group, before, new, self.seed, turn, count, gpu))
                for name, group in self.numbered
            ]
            drawn = self.run(f"seeds/{turn:03d}/drawn", tasks, _draw_task)
            merge = [Task("new", (drawn.folder, names, count, self.source.dim))]
            merged = self.run(f"seeds/{turn:03d}/new", merge, _merge_drawn, heavy=False)
            before, turn = drawn.folder, turn + 1
            got = merged.accounts[0]["rows"]
            if not got:
                break
            found = Files((*found.folders, (merged.folder, "new")), found.count + got)
        return found

    def means(self, found: Files, iterations: int, rows: int) -> tuple[Files, list[float]]:
        """Lloyd's iterations: each a step that sums rows and one that adds up the sums."""
        names = [name for name, _ in self.numbered]
        dim, gpu = self.source.dim, self.resources.gpus > 0
        step = max(1, RANGE_ELEMENTS // dim)
        ranges = [(i, min(i + step, found.count)) for i in range(0, found.count, step)]
        similarity = []
        for turn in range(iterations):
            tasks = [
                Task(name, (name, self.source, group, found, self.seed, turn, gpu))
                for name, group in self.numbered
            ]
            summed = self.run(f"means/{turn:03d}/sums", tasks, _sum_task)
            tasks = [
                Task(f"{i:05d}", (f"{i:05d}", summed.folder, names, low, high, found, dim))
                for i, (low, high) in enumerate(ranges)
            ]
            merged = self.run(f"means/{turn:03d}/new", tasks, _merge_sums, heavy=False)
            similarity.append(sum(a["similarity"] for a in summed.accounts) / UNIT / rows)
            files = tuple((merged.folder, task.name) for task in tasks)
            found = Files(files, found.count, merged.folder)
            # With an empty cluster it goes on as long as a spare row can fill it.
            empty, spare = merged.total("empty"), merged.total("spare")
            if not merged.total("changed") and not (empty and spare):
                break
        return found, similarity


def _draw_task(
    folder: str,
    name: str,
    source: Source,
    names: tuple[str, ...],
    before: str,
    new: Files,
    seed: int,
    turn: int,
    count: int,
    gpu: bool,
) -> Account:
    """Brings the distances to the nearest seed up to date, and draws from this part of the rows."""
    seeds = Centroids(new.load(source.dim), gpu)
    known = read_table(before, f"{name}.closest")["closest"].to_numpy() if before else None
    drawn, closest, at = none_drawn(source.dim), [], 0
    for file in names:
        points = source.read(file)
        mine = np.full(len(points.rows), np.inf)
        if known is not None:
            mine = np.asarray(known[at : at + len(points.rows)])
        at += len(points.rows)
        mine = kmeans.closer(mine, points.vectors, seeds)
        closest.append(mine)
        here = kmeans.draw_seeds(mine, points.ids, points.vectors, seed, turn, count)
        drawn = drawn.merged(here, count)
    table = pa.table({"closest": np.concatenate(closest)})
    written = write_table(table, folder, f"{name}.closest")
    written += _write_drawn(drawn, folder, name)
    return {"rows": at, "bytes": written}


def _merge_drawn(folder: str, parts: str, names: list[str], count: int, dim: int) -> Account:
    drawn = none_drawn(dim)
    for name in names:
        drawn = drawn.merged(_read_drawn(parts, name, dim), count)
    written = _write_drawn(drawn, folder, "new")
    return {"rows": len(drawn.times), "bytes": written}


def _sum_task(
    folder: str,
    name: str,
    source: Source,
    names: tuple[str, ...],
    found: Files,
    seed: int,
    turn: int,
    gpu: bool,
) -> Account:
    centroids = Centroids(found.load(source.dim), gpu)
    total = Sums.zero(len(centroids), source.dim)
    rows = 0
    for file in names:
        points = source.read(file)
        total.add(points.ids, points.vectors, centroids, seed, turn)
        rows += len(points.rows)
    present = np.flatnonzero(total.counts)
    columns = {
        "cluster": present,
        "count": total.counts[present],
        "sum": list_array(total.sums[present]),
    }
    written = write_table(pa.table(columns), folder, name, row_group_size=1024)
    written += _write_drawn(total.spare, folder, f"{name}.spare")
    return {"rows": rows, "bytes": written, "similarity": total.similarity}


def _merge_sums(
    folder: str,
    name: str,
    parts: str,
    names: list[str],
    low: int,
    high: int,
    found: Files,
    dim: int,
) -> Account:
    """Adds up the sums of clusters low to high; the first range brings the spare rows together."""
    sums, counts = np.zeros((high - low, dim)), np.zeros(high - low, np.int64)
    for part in names:
        table = read_table(parts, part, filters=[("cluster", ">=", low), ("cluster", "<", high)])
        cluster = np.asarray(table["cluster"].to_numpy()) - low
        values = table["sum"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sums[cluster] += np.asarray(values, np.float64).reshape(-1, dim)
        counts[cluster] += table["count"].to_numpy()
    before = found.load(dim)[low:high]
    new = kmeans.means(sums, counts, before)
    columns = {"vector": list_array(new), "count": pa.array(counts)}
    written = write_table(pa.table(columns), folder, name)
    spare = 0
    if low == 0:
        drawn = none_drawn(dim)
        for part in names:
            drawn = drawn.merged(_read_drawn(parts, f"{part}.spare", dim), kmeans.SPARE)
        spare = len(drawn.times)
        written += _write_drawn(drawn, folder, "spare")
    return {
        "rows": int(counts.sum()),
        "bytes": written,
        "changed": int((new != before).any(1).sum()),
        "empty": int((counts == 0).sum()),
        "spare": spare,
    }


def assign(
    root: Place,
    name: str,
    rows: Considered,
    fitted: Fitted,
    resources: Resources = ONE_CPU,
) -> tuple[Result, Array]:
    """The cluster of each row.

    Returns:
        The step, which wrote `NNNNN.parquet` (`ASSIGNED`) for each input file, and the members of
        each cluster, int64 [k].
    """
    groups = rows.groups(resources.group_rows)
    tasks = [
        Task(f"group-{i:05d}", (f"group-{i:05d}", rows.source, group, fitted, resources.gpus > 0))
        for i, group in enumerate(groups)
    ]
    result = run_step(
        root, name, [rows.key, fitted.key], tasks, _assign_task,
        cpus=resources.cpus, gpus=resources.gpus,
    )  # fmt: skip
    counts = np.zeros(fitted.clusters, np.int64)
    for task in tasks:
        table = read_table(result.folder, f"{task.name}.counts")
        counts[table["cluster"].to_numpy()] += table["count"].to_numpy()
    return result, counts


def _assign_task(
    folder: str, name: str, source: Source, names: tuple[str, ...], fitted: Fitted, gpu: bool
) -> Account:
    centroids = Centroids(fitted.centroids(), gpu)
    counts = np.zeros(max(1, len(centroids)), np.int64)
    rows = written = 0
    for file in names:
        points = source.read(file)
        labels, similarity = centroids.nearest(points.vectors)
        counts += np.bincount(labels, minlength=len(counts))
        columns = [points.rows, id_array(points.ids), labels, similarity]
        written += write_table(pa.table(columns, schema=ASSIGNED), folder, file)
        rows += len(points.rows)
    present = np.flatnonzero(counts)
    table = pa.table({"cluster": present, "count": counts[present]})
    written += write_table(table, folder, f"{name}.counts")
    return {"rows": rows, "bytes": written}
