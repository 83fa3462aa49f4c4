"""What the tasks of a k-means over files do; `lloyd` says in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose import kmeans
from pipeline.curate.choose.kmeans import Drawn, KMeans, Pass, Sums, none_drawn
from pipeline.curate.rows.exact import Centres, Halves
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import (
    HALF,
    ID,
    ROW,
    id_array,
    ids_of,
    list_array,
    matrix,
    write_table,
)
from pipeline.curate.steps.steps import Account, Output, Step

Array = np.ndarray[Any, Any]

ASSIGNED = pa.schema(
    [("row", ROW), ("image_id", ID), ("leaf", pa.int64()), ("similarity", pa.float64())]
)
SUM_ROWS = 1024  # sums in a row group: a task that adds them up reads a range of clusters


@dataclass(frozen=True)
class CentroidFiles:
    """Centroids as they are between steps.

    Attributes:
        dim: width.
        steps: whose tables hold them, in order.
        count: how many there are.
        refilled: whether empty clusters get the spare rows of the last step.
    """

    dim: int
    steps: tuple[Step, ...] = ()
    count: int = 0
    refilled: bool = False

    def load(self) -> Halves:
        """Half [k, d]."""
        if not self.steps:
            return np.zeros((0, self.dim), HALF)
        tables = [step.read(name) for step in self.steps for name in step.tables]
        vectors = np.concatenate([matrix(table["vector"], self.dim) for table in tables])
        if not self.refilled:
            return vectors
        counts = np.concatenate([table["count"].to_numpy() for table in tables])
        return kmeans.refill(vectors, counts, _read_drawn(self.steps[-1], "spare", self.dim))


@dataclass(frozen=True)
class Fitted:
    """A finished k-means.

    Attributes:
        step: with `centroids.parquet`, and the cost of all that it took.
        clusters: how many there are.
        dim: width.
        similarity: mean similarity of rows to their centroids, before each iteration.
    """

    step: Step
    clusters: int
    dim: int
    similarity: tuple[float, ...]

    @property
    def key(self) -> str:
        """Of the settings and rows."""
        return self.step.key

    def centroids(self) -> Halves:
        """Half [k, d]."""
        return matrix(self.step.read("centroids", ["vector"])["vector"], self.dim)


def device_of(out: Output) -> str:
    """The torch device of a task's products; empty: numpy makes them."""
    return "cuda" if out.gpu else ""


def fit_task(out: Output, _: None, rows: RowSet, settings: KMeans) -> Account:
    """The whole fit in one task."""
    points = rows.source.read_all(rows.names)
    fit = kmeans.fit_local(points.ids, points.vectors, settings, device_of(out))
    out.table(pa.table({"vector": list_array(fit.centroids)}))
    return {"rows": len(points.rows), "similarity": fit.similarity}


def draw_task(
    out: Output,
    files: Sequence[str],
    rows: RowSet,
    before: Step | None,
    new: CentroidFiles,
    draw: Pass,
) -> Account:
    """Brings the distances to the nearest seed up to date, and draws from a part of the rows.

    Args:
        out: of the step.
        files: the part.
        rows: all of them.
        before: the last pass, which has the distances so far.
        new: the seeds of the last pass.
        draw: this pass.
    """
    seeds = Centres(new.load(), device_of(out))
    known = before.read(f"{out.name}.closest")["closest"].to_numpy() if before else None
    drawn, closest, at = none_drawn(new.dim), [], 0
    for file in files:
        points = rows.source.read(file)
        mine = np.full(len(points.rows), np.inf)
        if known is not None:
            mine = np.asarray(known[at : at + len(points.rows)])
        at += len(points.rows)
        closest.append(kmeans.closer(mine, points.vectors, seeds))
        here = kmeans.draw_seeds(closest[-1], points.ids, points.vectors, draw)
        drawn = drawn.merged(here, draw.count)
    out.table(pa.table({"closest": np.concatenate(closest)}), f"{out.name}.closest")
    out.table(_drawn_table(drawn))
    return {"rows": at}


def merge_drawn(out: Output, count: int, drawn: Step, dim: int) -> None:
    """The earliest of all parts: the seeds of a pass."""
    seeds = none_drawn(dim)
    for part in drawn.tables:
        seeds = seeds.merged(_read_drawn(drawn, part, dim), count)
    out.table(_drawn_table(seeds))


def sum_task(
    out: Output, files: Sequence[str], rows: RowSet, centroids: CentroidFiles, seed: int, turn: int
) -> Account:
    """Adds up a part of the rows by their nearest centroids."""
    centres = Centres(centroids.load(), device_of(out))
    total, count = Sums.zero(len(centres), centroids.dim), 0
    for file in files:
        points = rows.source.read(file)
        total.add(points.ids, points.vectors, centres, seed, turn)
        count += len(points.rows)
    present = np.flatnonzero(total.counts)
    columns = {
        "cluster": present,
        "count": total.counts[present],
        "sum": list_array(total.sums[present]),
    }
    written = write_table(pa.table(columns), out.folder, out.name, row_group_size=SUM_ROWS)
    out.table(_drawn_table(total.spare), f"{out.name}.spare")
    out.account["bytes"] += written
    return {"rows": count, "similarity": total.similarity}


def merge_sums(
    out: Output, clusters: tuple[int, int], summed: Step, before: CentroidFiles
) -> Account:
    """Adds up the sums of a range of clusters; the first brings the spare rows together.

    Args:
        out: of the step.
        clusters: the first, and the one after the last.
        summed: step of `sum_task`.
        before: the centroids so far.
    """
    (low, high), dim = clusters, before.dim
    sums, counts = np.zeros((high - low, dim)), np.zeros(high - low, np.int64)
    for part in summed.tables:
        table = summed.read(part, filters=[("cluster", ">=", low), ("cluster", "<", high)])
        cluster = np.asarray(table["cluster"].to_numpy()) - low
        values = table["sum"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        sums[cluster] += np.asarray(values, np.float64).reshape(-1, dim)
        counts[cluster] += table["count"].to_numpy()
    old = before.load()[low:high]
    new = kmeans.means(sums, counts, old)
    out.table(pa.table({"vector": list_array(new), "count": pa.array(counts)}))
    spare = none_drawn(dim)
    if low == 0:
        for part in summed.tables:
            spare = spare.merged(_read_drawn(summed, f"{part}.spare", dim), kmeans.SPARE)
        out.table(_drawn_table(spare), "spare")
    return {
        "rows": int(counts.sum()),
        "changed": int((new != old).any(1).sum()),
        "empty": int((counts == 0).sum()),
        "spare": len(spare.times),
    }


def assign_task(out: Output, files: Sequence[str], rows: RowSet, fitted: Fitted) -> Account:
    """The nearest centroid of each row of some files, and how many rows each has."""
    centres = Centres(fitted.centroids(), device_of(out))
    counts, count = np.zeros(max(1, len(centres)), np.int64), 0
    for file in files:
        points = rows.source.read(file)
        labels, similarity = centres.nearest_one(points.vectors)
        counts += np.bincount(labels, minlength=len(counts))
        columns = [points.rows, id_array(points.ids), labels, similarity]
        out.table(pa.table(columns, schema=ASSIGNED), file)
        count += len(points.rows)
    present = np.flatnonzero(counts)
    out.table(pa.table({"cluster": present, "count": counts[present]}), f"{out.name}.counts")
    return {"rows": count}


def _drawn_table(drawn: Drawn) -> pa.Table:
    ids, vectors = id_array(drawn.ids), list_array(drawn.vectors)
    return pa.table({"time": drawn.times, "image_id": ids, "vector": vectors})


def _read_drawn(step: Step, name: str, dim: int) -> Drawn:
    table = step.read(name)
    times = np.asarray(table["time"].to_numpy(), np.float64)
    return Drawn(times, ids_of(table["image_id"]), matrix(table["vector"], dim))
