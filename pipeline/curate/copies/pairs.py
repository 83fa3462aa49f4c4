"""From vectors to the pairs that are alike, in steps each of which resumes.

vectors -> hashes -> collapse      equal vectors: one stands for all
-> sample -> cells         cells fitted on a sample
-> shuffle                 items in the buckets of their cells
-> pairs -> edges          each bucket joined, reduced to the edges of a forest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.curate.copies import cell_fit, collapse, edges, items, join
from pipeline.curate.copies.cells import buckets_for, cells_for, sample_share
from pipeline.curate.copies.items import ImageSet, Shuffled
from pipeline.curate.copies.stored_copies import STORED, Copies
from pipeline.curate.rows.bucketed import written
from pipeline.curate.rows.read_rows import CROPS, Rows
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_mark
from pipeline.uri import Place
from pipeline.uri import join as join_place


@dataclass(frozen=True)
class Search:
    """How pairs are looked for.

    Attributes:
        probes: cells in which an image is compared.
        cell_images: mean images in a cell; None: what costs least.
        penalty: that the similarity of a crop is reduced by.
        seed: of the sample and of the cells.
        gpus: of the tasks that compare.
        bucketing: see `cell_fit.fit_cells`.
        buckets: of the join; None: by the memory of its tasks.
        portion_rows: most rows of a task; None: by the bytes of their vectors.
        shards: of the forest; None: by the number of pairs.
    """

    probes: int
    cell_images: int | None = None
    penalty: float = 0.0
    seed: int = 0
    gpus: float = 0.0
    bucketing: str = "near"
    buckets: int | None = None
    portion_rows: int | None = None
    shards: int | None = None


def find_pairs(
    root: Place,
    images: ImageSet,
    search: Search,
    *,
    lowest: float,
    compare: bool = True,
    suffices: float = -1.0,
) -> Copies:
    """All pairs of images that are alike, as the edges of a maximum spanning forest.

    Args:
        root: folder of the curation that all nodes reach.
        images: to compare.
        search: how.
        lowest: similarity that pairs must be above.
        compare: the images with each other; else they are only put into their buckets, which is
            what other sets are compared with.
        suffices: where an earlier run compared the same items with a `lowest` that is not above
            this, its pairs are taken as they are: those above any threshold are the same.
    """
    in_cells = put_in_cells(root, images, search)
    joined: tuple[Result, ...] = ()
    if compare:
        items_key = in_cells.steps["copies/shuffle"].key
        known = _lowest_of(root, items_key, search.penalty)
        if known is not None and known <= suffices:
            lowest = known
        names = [f"{b:05d}" for b in range(in_cells.buckets)]
        pairs = run_step(
            root,
            "copies/pairs",
            [items_key, lowest, search.penalty],
            [
                Task(name, (in_cells.shuffled, b, lowest, search.penalty))
                for b, name in enumerate(names)
            ],
            join.join_task,
            gpus=search.gpus,
        )
        equals, equal_names = in_cells.steps["copies/collapse"], in_cells.copies[1]
        forest = edges.reduce(root, pairs, names, equals, equal_names, lowest, search.shards)
        joined = (pairs, *forest)
    steps = (*in_cells.steps.values(), *joined)
    copies = Copies(
        root=str(root),
        rows=images.inputs.rows,
        penalty=search.penalty,
        cells=in_cells.steps["copies/cells"].folder,
        buckets=in_cells.buckets,
        shuffled=in_cells.shuffled,
        copies=in_cells.copies,
        edges=joined[-1].folder if joined else "",
        edge_names=tuple(f"{s:05d}" for s in range(len(joined[-1].accounts))) if joined else (),
        lowest=lowest,
        portion_rows=search.portion_rows,
        keys={step.step: step.key for step in steps},
        steps=steps,
    )
    copies.save()
    return copies


def _lowest_of(root: Place, items_key: str, penalty: float) -> float | None:
    """The `lowest` that these items were compared with by the last run, if they were."""
    fs, path = resolve_uri(str(join_place(root, STORED)))
    value = read_mark(fs, path)
    keys = value.get("keys") or {}
    if value.get("penalty") != penalty or "copies/pairs" not in keys:
        return None
    return float(value["lowest"]) if keys.get("copies/shuffle") == items_key else None


# ---- Vectors into buckets: collapse equal ones, fit cells, put items where their cells are.


@dataclass(frozen=True)
class InCells:
    """Items in the buckets of their cells.

    Attributes:
        buckets: how many.
        copies: folder and tables of rows with equal vectors.
        shuffled: the items.
        steps: by name.
    """

    buckets: int
    copies: tuple[str, tuple[str, ...]]
    shuffled: Shuffled
    steps: dict[str, Result]


def put_in_cells(root: Place, images: ImageSet, search: Search) -> InCells:
    """The first half of `find_pairs`: the items in their buckets."""
    vectors, visiting, probes = images.vectors, images.visiting, search.probes
    assert visiting is not None or not vectors.views, "views need a function that makes the items"
    of = images.portions(search.portion_rows)
    crops = _crops(images)
    steps: dict[str, Result] = {}

    def step(name: str, settings: Any, tasks: Sequence[Task], function: Any, **more: Any) -> Result:
        steps[name] = run_step(root, name, settings, tasks, function, **more)
        return steps[name]

    hash_buckets = collapse.hash_buckets(images.inputs.rows)
    base = [vectors.key, images.exact[1], images.inputs.digest, search.portion_rows]
    hashed = step(
        "copies/hashes",
        [base, hash_buckets],
        [Task(p.name, (images.distinct(), p, hash_buckets)) for p in of],
        collapse.hash_task,
    )
    hash_names, copy_names = written(of, hashed), [f"{b:05d}" for b in range(hash_buckets)]
    collapsed = step(
        "copies/collapse",
        [hashed.key],
        [Task(name, (hashed.folder, hash_names, b)) for b, name in enumerate(copy_names)],
        collapse.collapse_task,
    )
    copies = (collapsed.folder, tuple(copy_names))
    distinct = images.distinct(copies)
    rows = int(collapsed.total("rows") - collapsed.total("copies"))
    cells = cells_for(rows, probes, vectors.dim, search.cell_images)
    share = sample_share(rows, cells, vectors.dim)
    sample = step(
        "copies/sample",
        [collapsed.key, search.seed, share],
        [Task(p.name, (distinct, p, search.seed, share)) for p in of],
        cell_fit.sample_task,
    )
    buckets = search.buckets or buckets_for(rows, vectors.dim, len(crops))
    buckets = max(1, min(buckets, cells))
    arguments = (vectors.dim, cells, buckets, search.seed, search.bucketing)
    fitted = step(
        "copies/cells",
        [sample.key, arguments],
        [Task("fit", (sample.folder, tuple(p.name for p in of), *arguments))],
        cell_fit.fit_cells_task,
        cpus=_cpus_of_fit(),
        gpus=search.gpus,
    )
    shuffled = step(
        "copies/shuffle",
        [fitted.key, probes, crops],
        [Task(p.name, (distinct, p, fitted.folder, probes, visiting)) for p in of],
        items.shuffle_task,
        gpus=search.gpus,
    )
    where = Shuffled(shuffled.folder, written(of, shuffled), vectors.dim, probes, crops)
    return InCells(buckets, copies, where, steps)


def _crops(images: ImageSet) -> tuple[bool, ...]:
    """Which items of an image are of crops."""
    vectors = images.vectors
    if not vectors.views or images.visiting is None:
        return (False,)
    none = Rows(
        np.zeros(0, np.int64),
        np.zeros((0, 16), np.uint8),
        np.zeros((0, vectors.dim), np.float16),
        np.zeros((0, CROPS, vectors.dim), np.float16),
    )
    _, crops = items.visiting_of(none, images.visiting)
    return tuple(bool(crop) for crop in crops)


def _cpus_of_fit() -> float:
    """The fit is one task; it may have the CPUs of a small machine, for nothing else runs."""
    import ray

    return float(max(1, min(8, *(node["Resources"].get("CPU", 1) for node in ray.nodes()))))
