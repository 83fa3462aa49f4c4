"""The nearest centroid of every row, over files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose.kmeans import Centroids
from pipeline.curate.choose.lloyd import ONE_CPU, Fitted, Resources
from pipeline.curate.rows.read_rows import RowSet, Source
from pipeline.curate.rows.tables import ID, ROW, id_array, read_table, write_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.uri import Place

Array = np.ndarray[Any, Any]

ASSIGNED = pa.schema(
    [("row", ROW), ("image_id", ID), ("leaf", pa.int64()), ("similarity", pa.float64())]
)


def assign(
    root: Place,
    name: str,
    rows: RowSet,
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
