"""Copy detection with planted copies: are changed copies of an image found among other images?

The copies are made by `curate/threshold/attacks.py`, the database is of the images themselves.

Shapes: N images of the database, n of them with copies, A copies of each, D width, k candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.features import Ids
from pipeline.evaluate.neighbours.nearest import SameImages, nearest
from pipeline.evaluate.score import Score

CANDIDATES = 10  # of each copy that precision is computed of
# Of similarity: precision is exact for up to so many right pairs, and within 0.0002 for 2,304.
STEPS = 1024

Bools = npt.NDArray[np.bool_]


def copy_scores(
    database: Tensor, database_ids: Ids, copies: Tensor, ids: Ids, names: Sequence[str]
) -> list[tuple[Score, dict[str, Any]]]:
    """`copies_recall1` and `copies_map`, each with what else is worth saying.

    `copies_recall1` is the share of copies whose nearest image is the one that they were made of.
    `copies_map` is the micro average precision of the image similarity challenge (Douze et al.,
    "The 2021 image similarity dataset and challenge", section 4.3): the pairs of each copy and its
    10 nearest images are taken together in one list by their cosine. So it asks beside recall
    whether one threshold tells copies from other images. An image that comes with a near copy of
    itself in the database counts as a mistake where that one is nearer.

    Both depend on how many images there are to be mixed up with, so compare at equal N.

    Args:
        database: [N, D], any scale; the work is done where it is, in blocks.
        database_ids: uint8 [N, 16], each once.
        copies: [n, A, D].
        ids: uint8 [n, 16] of the images that copies were made of; all are in the database.
        names: of the A ways in which copies were made.

    Raises:
        DataError: there are no copies, or of an image that is not in the database.
    """
    count, ways = copies.shape[:2]
    if not count * ways:
        raise DataError("there are no copies to be found", "evaluate on more images")
    missing = count - len(torch.unique(SameImages.of(database_ids, ids).queries))
    if missing:
        raise DataError(
            f"{missing} images that copies were made of are not in the database",
            "embed the images again",
        )
    similarities, rows = nearest(database, copies.flatten(0, 1), CANDIDATES)
    shape = (count, ways, rows.shape[1])
    right = (database_ids[rows.cpu().view(shape).numpy()] == ids[:, None, None]).all(-1)
    hits = right[:, :, 0].astype(np.float64)
    about = {"images": count, "copies": count * ways, "database": len(database)}
    each = {name: float(share) for name, share in zip(names, hits.mean(0), strict=True)}
    recall = Score.of_hits("copies_recall1", hits.mean(1), ids)
    terms = _precision_terms(similarities.cpu().view(shape).numpy(), right)
    precision = Score("copies_map", terms, ids, "average_precision")
    measure = f"micro average precision over the {shape[2]} nearest images of each copy"
    return [(recall, {**about, "attacks": each}), (precision, {**about, "measure": measure})]


def _precision_terms(
    similarities: npt.NDArray[np.float32], right: Bools
) -> npt.NDArray[np.float64]:
    """What each image adds to an average precision, [n, 2 K + 1], see `score.average_precision`.

    A step ends at the similarity of a right pair; with more right pairs than steps, at quantiles
    of these.

    Args:
        similarities: [n, A, k] of candidates.
        right: [n, A, k], which of them are of the image itself.
    """
    ends = np.unique(similarities[right])[::-1]
    if len(ends) > STEPS:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, STEPS).round().astype(int))]
    count, ways = similarities.shape[:2]
    steps = len(ends)
    image = np.broadcast_to(np.arange(count)[:, None, None], right.shape)
    step = np.searchsorted(-ends, -similarities)  # the first that ends at or below the similarity
    sums = []
    for kind in (right, ~right):
        counted = kind & (step < steps)
        cells = image[counted] * steps + step[counted]
        sums.append(np.bincount(cells, minlength=count * steps).reshape(count, steps))
    return np.concatenate([*sums, np.full((count, 1), ways)], 1).astype(np.float64)
