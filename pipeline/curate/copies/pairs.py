"""From vectors to the pairs that are alike, in steps each of which resumes.

The items are put into buckets (`placing`), each bucket is joined, and the pairs are reduced to the
edges of a forest.
"""

from __future__ import annotations

from pipeline.curate.copies import edges, join
from pipeline.curate.copies.items import Visiting
from pipeline.curate.copies.put_in_cells import placed
from pipeline.curate.copies.stored_copies import STORED, Copies
from pipeline.curate.rows.tables import Inputs, Vectors
from pipeline.curate.steps.steps import Result, Task, run_step
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_mark
from pipeline.uri import Place
from pipeline.uri import join as join_place


def find_pairs(
    root: Place,
    inputs: Inputs,
    vectors: Vectors,
    *,
    lowest: float,
    probes: int,
    exact: tuple[str, str] = ("", ""),
    cell_images: int | None = None,
    visiting: Visiting | None = None,
    penalty: float = 0.0,
    seed: int = 0,
    gpus: float = 0.0,
    compare: bool = True,
    suffices: float = -1.0,
    _buckets: int | None = None,
    _portion_rows: int | None = None,
    _shards: int | None = None,
) -> Copies:
    """All pairs of images that are alike, as the edges of a maximum spanning forest.

    Args:
        root: folder of the curation that all nodes reach.
        inputs: the images.
        vectors: of them.
        lowest: similarity that pairs must be above.
        probes: cells in which an image is compared.
        exact: folder of `tables.EXACT` and key of its step: rows with another keeper are not
            joined; empty: all rows are.
        cell_images: mean images in a cell; default: what costs least.
        visiting: further items of an image with views (`descriptor.visiting`); needed where
            `vectors.views`.
        penalty: that the similarity of a crop is reduced by.
        seed: of the sample and of the cells.
        gpus: of the tasks that compare.
        compare: the images with each other; else they are only put into their buckets, which is
            what other sets are compared with.
        suffices: where an earlier run compared the same items with a `lowest` that is not above
            this, its pairs are taken as they are: those above any threshold are the same.
    """
    buckets, copies, where, steps = placed(
        root,
        inputs,
        vectors,
        exact,
        probes,
        cell_images,
        visiting,
        seed,
        gpus,
        _buckets,
        "near",
        _portion_rows,
    )
    made: tuple[Result, ...] = ()
    if compare:
        known = _lowest_of(root, steps[-1].key, penalty)
        if known is not None and known <= suffices:
            lowest = known
        names = [f"{b:05d}" for b in range(buckets)]
        pairs = run_step(
            root,
            "copies/pairs",
            [steps[-1].key, lowest, penalty],
            [Task(name, (where, b, lowest, penalty)) for b, name in enumerate(names)],
            join.join_task,
            gpus=gpus,
        )
        of_equals = next(step for step in steps if step.step == "copies/collapse")
        made = (pairs, *edges.reduce(root, pairs, names, of_equals, copies[1], lowest, _shards))
    steps = (*steps, *made)
    found = Copies(
        root=str(root),
        rows=inputs.rows,
        penalty=penalty,
        cells=next(step.folder for step in steps if step.step == "copies/cells"),
        buckets=buckets,
        shuffled=where,
        copies=copies,
        edges=made[-1].folder if made else "",
        edge_names=tuple(f"{s:05d}" for s in range(len(made[-1].accounts))) if made else (),
        lowest=lowest,
        portion_rows=_portion_rows,
        keys={step.step: step.key for step in steps},
        steps=steps,
    )
    found.save()
    return found


def _lowest_of(root: Place, items_key: str, penalty: float) -> float | None:
    """The `lowest` that these items were compared with by the last run, if they were."""
    fs, path = resolve_uri(str(join_place(root, STORED)))
    value = read_mark(fs, path)
    keys = value.get("keys") or {}
    if value.get("penalty") != penalty or "copies/pairs" not in keys:
        return None
    return float(value["lowest"]) if keys.get("copies/shuffle") == items_key else None
