"""Other sets against the index of a curation: evaluation sets, new images, and single ones.

Whatever is compared is put into the buckets of the cells that are there, and joined with what is
there bucket by bucket.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.curate.copies.cell_items import (
    ImageSet,
    StoredItems,
    Visiting,
    items_of,
    place,
    write_items,
)
from pipeline.curate.copies.cells import Cells
from pipeline.curate.copies.join import pairs_between
from pipeline.curate.copies.pairs import Index
from pipeline.curate.rows.exact import Halves
from pipeline.curate.rows.read_rows import Rows
from pipeline.curate.steps.steps import Resources, Steps
from pipeline.errors import DataError


def place_others(
    steps: Steps, name: str, index: Index, images: ImageSet, gpus: float
) -> StoredItems:
    """The items of another set in the buckets of the cells that are there.

    Args:
        steps: of the curation that the step belongs to.
        name: of the step.
        index: whose cells.
        images: the other set.
        gpus: of a task.

    Raises:
        DataError: the vectors have another width.
    """
    stored = index.items
    _check_dim(stored, images.vectors.dim, name)
    items = steps.run(name, write_items, images.portions(index.portion_rows), Resources(1.0, gpus),
                      distinct=images.distinct(), cells=index.cells, probes=stored.probes,
                      visiting=images.visiting)  # fmt: skip
    return StoredItems(items, images.vectors.dim, stored.probes, stored.crops)


@dataclass(frozen=True)
class Match:
    """A stored image that is like the one that was looked up."""

    row: int
    image_id: str
    similarity: float


def look_up(
    index: Index,
    vector: Halves,
    crops: Halves | None = None,
    visiting: Visiting | None = None,
    *,
    threshold: float,
    most: int = 10,
) -> list[Match]:
    """Stored images that one image is like, the most similar first; opens the buckets of its cells.

    Rows with equal vectors are found by the one that stands for them (the smallest image id).

    Args:
        index: of the stored images.
        vector: [d] of unit length.
        crops: [9, d] where the stored images have views.
        visiting: as of the stored images.
        threshold: similarity that a match must be above.
        most: matches returned.
    """
    stored = index.items
    _check_dim(stored, len(vector), "the image")
    ids = np.zeros((1, 16), np.uint8)
    rows = Rows(np.zeros(1, np.int64), ids, vector[None], None if crops is None else crops[None])
    placed = place(rows, Cells.load(index.cells, stored.dim), stored.probes, visiting)
    matches: dict[int, Match] = {}
    for bucket in np.unique(placed.bucket).tolist():
        tables = [
            (member, placed.table.filter(pa.array(here)))
            for member in (True, False)
            if (here := (placed.bucket == bucket) & (placed.visitor != member)).any()
        ]
        other = items_of(tables, stored.dim, stored.probes)
        crops_of = np.array(stored.crops)
        pairs = pairs_between(stored.read(bucket), other, threshold, crops_of, index.penalty)
        for one in pairs.to_pylist():
            row, similarity = one["row"], one["similarity"]
            if row not in matches or matches[row].similarity < similarity:
                matches[row] = Match(row, one["image_id"].hex(), min(1.0, similarity))
    return sorted(matches.values(), key=lambda match: (-match.similarity, match.image_id))[:most]


def _check_dim(stored: StoredItems, dim: int, who: str) -> None:
    if dim != stored.dim:
        raise DataError(
            f"vectors of {who} have {dim} numbers, those of the curated set {stored.dim}",
            "embed both with the same curate.copy_embedder",
        )
