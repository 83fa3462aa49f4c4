"""From vectors to the pairs of images that are alike, in steps each of which resumes.

vectors -> hashes -> collapse      equal vectors: one stands for all
-> sample -> cells         cells fitted on a sample
-> shuffle                 items in the buckets of their cells
-> pairs -> edges          each bucket joined, reduced to the edges of a forest
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipeline.curate.copies.cell_items import ImageSet, StoredItems, write_items
from pipeline.curate.copies.cells import buckets_for, cells_for, sample_share
from pipeline.curate.copies.equal_vectors import find_equal
from pipeline.curate.copies.fit_cells import CellPlan, draw_sample, fit_sample
from pipeline.curate.copies.forest import Alike, edges_of
from pipeline.curate.copies.join import join_bucket
from pipeline.curate.steps.steps import Resources, Step, Steps, numbered
from pipeline.errors import DataError
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_json, read_mark, write_bytes_atomic
from pipeline.uri import Place, join, public

STORED = "copies.json"
INDEX_STEPS = ("copies/collapse", "copies/cells", "copies/shuffle")  # that an index is made of


@dataclass(frozen=True)
class Search:
    """How pairs are looked for.

    Attributes:
        probes: cells in which an image is compared.
        cell_images: mean images in a cell; None: what costs least.
        penalty: that the similarity of a crop is reduced by.
        seed: of the sample and of the cells.
        gpus: of the tasks that compare.
        bucketing: see `fit_cells.CellPlan`.
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


@dataclass(frozen=True)
class Index:
    """Images in the buckets of their cells: what they, and others, are compared in.

    Attributes:
        rows: of the images.
        buckets: how many there are.
        penalty: that the similarity of a crop is reduced by.
        portion_rows: most rows of a task, or None.
        equal: rows with equal vectors (`equal_vectors.EQUAL`).
        cells: that were fitted.
        items: of the images.
    """

    rows: int
    buckets: int
    penalty: float
    portion_rows: int | None
    equal: Step
    cells: Step
    items: StoredItems

    def save(self, root: Place, lowest: float | None) -> None:
        """Writes what a later run needs beside the tables: `lowest`, if all pairs above it were
        looked for, and numbers. No place is in it, so the folder may be moved.
        """
        numbers = {name: getattr(self, name) for name in NUMBERS}
        items = {name: getattr(self.items, name) for name in ITEMS}
        keys = {step.name: step.key for step in (self.equal, self.cells, self.items.step)}
        value = numbers | items | {"keys": keys, "lowest": lowest}
        fs, path = resolve_uri(str(join(root, STORED)))
        write_bytes_atomic(json.dumps(value).encode(), fs, path)

    @classmethod
    def open(cls, root: Place) -> Index:
        """That of an earlier run.

        Raises:
            DataError: there is none, it was written by another version, or its tables are not those
                that it was written of.
        """
        fs, path = resolve_uri(str(join(root, STORED)))
        value = read_json(fs, path)
        if value is None:
            raise DataError(
                f"{public(str(root))} holds no curation with copies: {STORED} is missing",
                "name the folder of a curation that is finished and had dedup.enabled=true",
            )
        if not isinstance(value, dict) or set(value) != {*NUMBERS, *ITEMS, "keys", "lowest"}:
            raise DataError(
                f"{public(str(root))} was curated by another version: {STORED} has other fields",
                "curate it again",
            )
        equal, cells, items = (Steps(root).stored(name) for name in INDEX_STEPS)
        if {step.name: step.key for step in (equal, cells, items)} != value["keys"]:
            raise DataError(
                f"{public(str(root))} lacks tables of its copies, or has those of another start",
                "delete its curate/_done.json and curate it again",
            )
        stored = StoredItems(items, value["dim"], value["probes"], tuple(value["crops"]))
        numbers = {name: value[name] for name in NUMBERS}
        return cls(**numbers, equal=equal, cells=cells, items=stored)


NUMBERS = ("rows", "buckets", "penalty", "portion_rows")
ITEMS = ("dim", "probes", "crops")


@dataclass(frozen=True)
class Pairs:
    """Pairs of images that are alike.

    Attributes:
        index: that they were found in.
        edges: of a maximum spanning forest of all pairs (`tables.EDGES`).
        lowest: similarity that all edges are above.
    """

    index: Index
    edges: Step
    lowest: float


def put_in_cells(steps: Steps, images: ImageSet, search: Search) -> Index:
    """Images in the buckets of their cells."""
    vectors, probes, seed = images.vectors, search.probes, search.seed
    portions, crops = images.portions(search.portion_rows), images.crops
    # Equal vectors first: all would be in one cell, which has the square of their number of pairs.
    equal = find_equal(steps, images.distinct(), portions, images.inputs.rows)
    distinct = images.distinct(equal)
    rows = int(equal.total("rows") - equal.total("copies"))
    # Cells are fitted on a sample, for one task holds it; each image then visits its nearest ones.
    cells = cells_for(rows, probes, vectors.dim, search.cell_images)
    sample = steps.run("copies/sample", draw_sample, portions, distinct=distinct, seed=seed,
                       share=sample_share(rows, cells, vectors.dim))  # fmt: skip
    buckets = search.buckets or buckets_for(rows, vectors.dim, len(crops))
    buckets = max(1, min(buckets, cells))
    plan = CellPlan(cells, buckets, search.bucketing)
    # The fit is one task; it may have the CPUs of a small machine, for nothing else runs.
    fitted = steps.run("copies/cells", fit_sample, {"fit": vectors.dim},
                       Resources(_cpus_of_fit(), search.gpus),
                       sample=sample, plan=plan, seed=seed)  # fmt: skip
    items = steps.run("copies/shuffle", write_items, portions, Resources(1.0, search.gpus),
                      distinct=distinct, cells=fitted, probes=probes,
                      visiting=images.visiting)  # fmt: skip
    stored = StoredItems(items, vectors.dim, probes, crops)
    index = Index(images.inputs.rows, buckets, search.penalty, search.portion_rows, equal, fitted,
                  stored)  # fmt: skip
    # What an earlier run compared of the same items stays known, until it is compared anew.
    if _lowest_of(steps.root, index) is None:
        index.save(steps.root, None)
    return index


def find_pairs(
    steps: Steps, index: Index, search: Search, lowest: float, suffices: float = -1.0
) -> Pairs:
    """All pairs of images of an index that are alike, as the edges of a maximum spanning forest.

    Args:
        steps: of the curation.
        index: of the images.
        search: how.
        lowest: similarity that pairs must be above.
        suffices: where an earlier run compared the same items with a `lowest` that is not above
            this, its pairs are taken as they are: those above any threshold are the same.
    """
    known = _lowest_of(steps.root, index)
    if known is not None and known <= suffices:
        lowest = known
    joined = steps.run("copies/pairs", join_bucket, numbered(index.buckets),
                       Resources(1.0, search.gpus), stored=index.items, lowest=lowest,
                       penalty=search.penalty)  # fmt: skip
    edges = edges_of(steps, Alike(joined, index.equal, lowest), search.shards)
    index.save(steps.root, lowest)
    return Pairs(index, edges, lowest)


def _lowest_of(root: Place, index: Index) -> float | None:
    """The `lowest` that these items were compared with by the last run, if they were."""
    fs, path = resolve_uri(str(join(root, STORED)))
    value = read_mark(fs, path)
    keys = value.get("keys") or {}
    same = keys.get("copies/shuffle") == index.items.step.key
    if not same or value.get("penalty") != index.penalty or value.get("lowest") is None:
        return None
    return float(value["lowest"])


def _cpus_of_fit() -> float:
    import ray

    return float(max(1, min(8, *(node["Resources"].get("CPU", 1) for node in ray.nodes()))))
