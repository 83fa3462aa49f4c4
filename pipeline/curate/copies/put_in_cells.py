"""Vectors into buckets: collapse equal ones, fit cells, put items where their cells are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.curate.copies import cell_fit as cell_tasks
from pipeline.curate.copies import collapse, items
from pipeline.curate.copies.cells import buckets_for, cells_for, sample_share
from pipeline.curate.copies.items import Shuffled, Visiting
from pipeline.curate.rows.bucketed import written
from pipeline.curate.rows.read_rows import CROPS, Rows, portions
from pipeline.curate.rows.tables import Inputs, Vectors
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.uri import Place


def placed(
    root: Place,
    inputs: Inputs,
    vectors: Vectors,
    exact: tuple[str, str],
    probes: int,
    cell_images: int | None,
    visiting: Visiting | None,
    seed: int,
    gpus: float,
    wanted_buckets: int | None,
    bucketing: str,
    portion_rows: int | None,
) -> tuple[int, tuple[str, tuple[str, ...]], Shuffled, tuple[Result, ...]]:
    """The first half of `find_pairs`: the items in their buckets.

    Returns:
        The number of buckets, folder and tables of rows with equal vectors, the items, the steps.
    """
    assert visiting is not None or not vectors.views, "views need a function that makes the items"
    of = portions(inputs.files, vectors, portion_rows)
    crops = _crops(vectors, visiting)
    steps: list[Result] = []

    def step(name: str, settings: Any, tasks: Sequence[Task], function: Any, **more: Any) -> Result:
        steps.append(run_step(root, name, settings, tasks, function, **more))
        return steps[-1]

    hashed_buckets = collapse.buckets_for(inputs.rows)
    base = [vectors.key, exact[1], inputs.digest, portion_rows]
    hashed = step(
        "copies/hashes",
        [base, hashed_buckets],
        [Task(p.name, (vectors, p, exact[0], hashed_buckets)) for p in of],
        collapse.hash_task,
    )
    names = written(of, hashed)
    collapsed = step(
        "copies/collapse",
        [hashed.key],
        [Task(f"{b:05d}", (hashed.folder, names, b)) for b in range(hashed_buckets)],
        collapse.collapse_task,
    )
    copies = (collapsed.folder, tuple(f"{b:05d}" for b in range(hashed_buckets)))
    rows = int(collapsed.total("rows") - collapsed.total("copies"))
    cells = cells_for(rows, probes, vectors.dim, cell_images)
    share = sample_share(rows, cells, vectors.dim)
    sample = step(
        "copies/sample",
        [collapsed.key, seed, share],
        [Task(p.name, (vectors, p, exact[0], copies, seed, share)) for p in of],
        cell_tasks.sample_task,
    )
    buckets = wanted_buckets or buckets_for(rows, vectors.dim, len(crops))
    buckets = max(1, min(buckets, cells))
    arguments = (vectors.dim, cells, buckets, seed, bucketing)
    fitted = step(
        "copies/cells",
        [sample.key, arguments],
        [Task("fit", (sample.folder, tuple(p.name for p in of), *arguments))],
        cell_tasks.fit_task,
        cpus=_cpus_of_fit(),
        gpus=gpus,
    )
    shuffled = step(
        "copies/shuffle",
        [fitted.key, probes, crops],
        [Task(p.name, (vectors, p, exact[0], copies, fitted.folder, probes, visiting)) for p in of],
        items.shuffle_task,
        gpus=gpus,
    )
    where = Shuffled(shuffled.folder, written(of, shuffled), vectors.dim, probes, crops)
    return buckets, copies, where, tuple(steps)


def _crops(vectors: Vectors, visiting: Visiting | None) -> tuple[bool, ...]:
    if not vectors.views or visiting is None:
        return (False,)
    none = np.zeros((0, vectors.dim), np.float16)
    rows = Rows(
        np.zeros(0, np.int64),
        np.zeros((0, 16), np.uint8),
        none,
        np.zeros((0, CROPS, vectors.dim), np.float16),
    )
    _, crops = items.visiting_of(rows, visiting)
    return tuple(bool(crop) for crop in crops)


def _cpus_of_fit() -> float:
    """The fit is one task; it may have the CPUs of a small machine, for nothing else runs."""
    import ray

    return float(max(1, min(8, *(node["Resources"].get("CPU", 1) for node in ray.nodes()))))
