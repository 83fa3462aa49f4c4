"""Which wrong answers a card keeps: the surest ones, and samples of what is confused most."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

SUREST = 24
PAIRS = 8  # of truth and answer that are confused most
SAMPLES = 3  # of each, the surest ones

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
