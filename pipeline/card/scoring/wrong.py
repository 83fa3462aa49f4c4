"""What a card keeps of wrong answers: counts by class, the surest ones, samples of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.card.card import Confusion

SUREST = 24
PAIRS = 8  # of truth and answer that are confused most
SAMPLES = 3  # of each, the surest ones
CELLS = 10_000  # pairs that are kept; of 100 classes there are no more

Rows = npt.NDArray[np.int64]


def kept_wrong(truth: Rows, answers: Rows, share: npt.NDArray[Any]) -> list[int]:
    """Rows of wrong answers: first the surest ones, then samples of the most frequent pairs.

    Args:
        truth: int64 [Q], the class of each query, -1 where unknown.
        answers: int64 [Q], the class that won, -1 where nobody voted.
        share: [Q], of the votes that it won with.
    """
    wrong = np.flatnonzero((truth >= 0) & (answers >= 0) & (truth != answers))
    wrong = wrong[np.argsort(-share[wrong], kind="stable")]
    kept = dict.fromkeys(wrong[:SUREST].tolist())
    pairs, counts = np.unique(
        np.stack([truth[wrong], answers[wrong]], 1), axis=0, return_counts=True
    )
    for pair in pairs[np.argsort(-counts, kind="stable")[:PAIRS]]:
        same = (truth[wrong] == pair[0]) & (answers[wrong] == pair[1])
        kept.update(dict.fromkeys(wrong[same][:SAMPLES].tolist()))
    return list(kept)


def confusion_of(truth: Rows, answers: Rows, classes: int) -> Confusion:
    """Which classes are taken for which; memory grows with the queries, not with classes².

    Args:
        truth: int64 [Q], as `kept_wrong` takes it.
        answers: int64 [Q], likewise. A query that nobody answered counts as none.
        classes: more than any of both.
    """
    counted = (truth >= 0) & (answers >= 0)
    truth, answers = truth[counted], answers[counted]
    images = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[truth == answers], minlength=classes)
    wrong = truth != answers
    cells, counts = np.unique(truth[wrong] * classes + answers[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    cells, counts = cells[order], counts[order]
    kept = np.arange(len(cells)) < CELLS
    kept[np.unique(cells // classes, return_index=True)[1]] = True  # the first of each class
    pairs = np.stack([cells // classes, cells % classes, counts], 1)[kept]
    return Confusion(
        tuple(images.tolist()), tuple(right.tolist()), tuple(map(tuple, pairs.tolist()))
    )
