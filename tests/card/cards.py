"""Cards for tests: contenders whose hits are planted, and cards of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.card.card import Card, Confusion, Contender, Result, Role, SetFacts
from pipeline.evaluate.score import Score

KNN = "knn20_top1"
IMAGES = 2000


def ids_of(images: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8 [n, 16], all different."""
    return np.random.default_rng([seed, images]).integers(0, 256, (images, 16), np.uint8)


def hits(share: float, images: int = IMAGES, seed: int = 0) -> np.ndarray[Any, Any]:
    """bool [n], right for exactly this share of the images; others of other seeds."""
    right = np.zeros(images, bool)
    right[: round(share * images)] = True
    return np.random.default_rng(seed).permutation(right)


def contender(
    role: Role,
    share: float | None,
    name: str = "",
    of: str = "",
    images: int = IMAGES,
    numbers: Mapping[str, float] | None = None,
    **facts: Any,
) -> Contender:
    """One with k-NN right for a share of the images, and with numbers without an interval."""
    seed = sum(map(ord, role + name))
    results = {name: Result.alone(value) for name, value in (numbers or {}).items()}
    if share is not None:
        right = hits(share, images, seed)
        results = {KNN: Result.of(Score.of_hits(KNN, right, ids_of(images)))} | results
    return Contender(role, name or role, of, results, facts)


def confused(counts: Any) -> Confusion:
    """Of a matrix [classes, classes], rows the truth."""
    cells = [
        (truth, answer, int(count))
        for truth, row in enumerate(counts)
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    return Confusion(
        tuple(int(sum(row)) for row in counts),
        tuple(int(row[i]) for i, row in enumerate(counts)),
        tuple(sorted(cells, key=lambda cell: -cell[2])),
    )


def card_of(
    *contenders: Contender, images: int = IMAGES, labelled: int | None = None, **fields: Any
) -> Card:
    """A card of two sets."""
    known = images if labelled is None else labelled
    reference = SetFacts("photos/train", "aa", 4 * images, 4 * known, ("cat", "dog", "owl"))
    queries = SetFacts("photos/val", "bb", images, known, ("cat", "dog", "owl"))
    values = {
        "title": "photos",
        "made": "2026-11-30T12:00:00+00:00",
        "score": KNN,
        "reference": reference,
        "queries": queries,
        "contenders": contenders,
    }
    return Card(**(values | fields))
