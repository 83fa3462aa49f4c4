"""Components of edges, each called by its smallest row, and the tasks that components go to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.exact import Ints
from pipeline.curate.tables import ROW, read_table, write_table

LABELS = pa.schema([("row", ROW), ("label", ROW)])


def connected(a: Ints, b: Ints) -> tuple[Ints, Ints]:
    """Rows that are in an edge, and the smallest row of the component of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    row, node = np.unique(np.concatenate([a, b]), return_inverse=True)
    ones = np.ones(len(a), np.int8)
    graph = coo_array((ones, (node[: len(a)], node[len(a) :])), shape=(len(row), len(row)))
    _, label = connected_components(graph, directed=False)
    smallest = np.full(label.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, label, row)
    return row, smallest[label]


def label_task(folder: str, edges: str, name: str, threshold: float) -> dict[str, Any]:
    """Writes the component of each row that is in an edge above the threshold.

    Args:
        folder: of the step.
        edges: folder of `tables.EDGES`; components are in one table each.
        name: of a table.
        threshold: of the similarity.
    """
    table = read_table(edges, name, filters=[("similarity", ">", threshold)])
    row, label = connected(table.column("a").to_numpy(), table.column("b").to_numpy())
    size = write_table(pa.table({"row": row, "label": label}).cast(LABELS), folder, name)
    return {"rows": len(row), "bytes": size, "components": len(np.unique(label))}


def part_of(label: Ints, parts: int) -> Ints:
    """Which task a component goes to: mixed, since labels of files are near each other."""
    mixed = label.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(parts)).astype(np.int64)
