"""What the tasks of a k-means over files do; `lloyd` says in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import kmeans
from pipeline.curate.choose.kmeans import Centroids, Drawn, Sums, none_drawn
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import Points, Source
from pipeline.curate.rows.tables import (
    HALF,
    id_array,
    ids_of,
    list_array,
    matrix,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account

Array = np.ndarray[Any, Any]


def fit_task(
    folder: str,
    source: Source,
    names: tuple[str, ...],
    clusters: int,
    seed: int,
    iterations: int,
    gpu: bool,
) -> Account:
    """The whole fit in one task."""
    points = source.read_all(names)
    fit = kmeans.fit_local(points.ids, points.vectors, clusters, seed, iterations, gpu)
    table = pa.table({"vector": list_array(fit.centroids)})
    written = write_table(table, folder, "fit")
    return {"rows": len(points.rows), "bytes": written, "similarity": fit.similarity}


@dataclass(frozen=True)
class Part:
    """The rows that a task goes through.

    Attributes:
        name: of the task.
        source: of the rows.
        files: of the source.
        gpu: use it for the products.
    """

    name: str
    source: Source
    files: tuple[str, ...]
    gpu: bool

    def read(self) -> Iterator[Points]:
        """The rows, file by file."""
        return (self.source.read(file) for file in self.files)


@dataclass(frozen=True)
class CentroidFiles:
    """Centroids as they are between steps: files in order, and rows for the empty clusters."""

    folders: tuple[tuple[str, str], ...]  # folder and name of each file
    count: int
    spare: str = ""  # folder of `spare.parquet`

    def load(self, dim: int) -> Halves:
        """Half [k, d]."""
        if not self.folders:
            return np.zeros((0, dim), HALF)
        vectors = np.concatenate([read_vectors(folder, name, dim) for folder, name in self.folders])
        if not self.spare:
            return vectors
        counts = np.concatenate(
            [
                read_table(folder, name, ["count"])["count"].to_numpy()
                for folder, name in self.folders
            ]
        )
        return kmeans.refill(vectors, counts, _read_drawn(self.spare, "spare", dim))


def read_vectors(folder: str, name: str, dim: int) -> Halves:
    """Half [k, d] of a file of centroids."""
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


def draw_task(
    folder: str,
    part: Part,
    before: str,
    new: CentroidFiles,
    seed: int,
    turn: int,
    count: int,
) -> Account:
    """Brings the distances to the nearest seed up to date, and draws from this part of the rows.

    Args:
        folder: of the step.
        part: of the rows.
        before: folder of the last pass, which has the distances so far; empty: there was none.
        new: the seeds of the last pass.
        seed: of the run.
        turn: number of the pass.
        count: seeds to draw.
    """
    dim = part.source.dim
    seeds = Centroids(new.load(dim), part.gpu)
    known = read_table(before, f"{part.name}.closest")["closest"].to_numpy() if before else None
    drawn, closest, at = none_drawn(dim), [], 0
    for points in part.read():
        mine = np.full(len(points.rows), np.inf)
        if known is not None:
            mine = np.asarray(known[at : at + len(points.rows)])
        at += len(points.rows)
        mine = kmeans.closer(mine, points.vectors, seeds)
        closest.append(mine)
        here = kmeans.draw_seeds(mine, points.ids, points.vectors, seed, turn, count)
        drawn = drawn.merged(here, count)
    table = pa.table({"closest": np.concatenate(closest)})
    written = write_table(table, folder, f"{part.name}.closest")
    written += _write_drawn(drawn, folder, part.name)
    return {"rows": at, "bytes": written}


def merge_drawn(folder: str, parts: str, names: list[str], count: int, dim: int) -> Account:
    """The earliest of all parts: the seeds of a pass."""
    drawn = none_drawn(dim)
    for name in names:
        drawn = drawn.merged(_read_drawn(parts, name, dim), count)
    written = _write_drawn(drawn, folder, "new")
    return {"rows": len(drawn.times), "bytes": written}


def sum_task(folder: str, part: Part, stored: CentroidFiles, seed: int, turn: int) -> Account:
    """Adds up this part of the rows by their nearest centroids."""
    centroids = Centroids(stored.load(part.source.dim), part.gpu)
    total = Sums.zero(len(centroids), part.source.dim)
    rows = 0
    for points in part.read():
        total.add(points.ids, points.vectors, centroids, seed, turn)
        rows += len(points.rows)
    present = np.flatnonzero(total.counts)
    columns = {
        "cluster": present,
        "count": total.counts[present],
        "sum": list_array(total.sums[present]),
    }
    written = write_table(pa.table(columns), folder, part.name, row_group_size=1024)
    written += _write_drawn(total.spare, folder, f"{part.name}.spare")
    return {"rows": rows, "bytes": written, "similarity": total.similarity}


def merge_sums(
    folder: str,
    name: str,
    summed: tuple[str, list[str]],
    low: int,
    high: int,
    stored: CentroidFiles,
    dim: int,
) -> Account:
    """Adds up the sums of clusters low to high; the first range brings the spare rows together.

    Args:
        folder: of the step.
        name: of the table that is written.
        summed: folder and parts of `sum_task`.
        low: the first cluster.
        high: the one after the last.
        stored: the centroids so far.
        dim: of a vector.
    """
    parts, names = summed
    sums, counts = np.zeros((high - low, dim)), np.zeros(high - low, np.int64)
    for part in names:
        table = read_table(parts, part, filters=[("cluster", ">=", low), ("cluster", "<", high)])
        cluster = np.asarray(table["cluster"].to_numpy()) - low
        values = table["sum"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sums[cluster] += np.asarray(values, np.float64).reshape(-1, dim)
        counts[cluster] += table["count"].to_numpy()
    before = stored.load(dim)[low:high]
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
