"""The score that chooses the best checkpoint while training, and whether labels allow one."""

from __future__ import annotations

import torch

from pipeline.evaluate.knn import TEMPERATURE, LabelledFeatures, knn_classify
from pipeline.evaluate.unlabelled import rank_me

RANK_ME = "rank_me"  # needs no labels
FEWEST = 0.5  # of the labelled images must have another one of their class


def deciding_score(
    name: str,
    reference: LabelledFeatures,
    queries: LabelledFeatures,
    temperature: float = TEMPERATURE,
) -> float:
    """One score by its name; all of them are better where they are higher.

    Args:
        name: `knn20_top1` with any number, or `rank_me`, which is that of the queries.
        reference: those that vote or are learnt from.
        queries: those that are asked; the reference itself: each of its images by the others.
        temperature: of the votes of a k-NN.

    Raises:
        DataError: nothing is labelled.
    """
    if name == RANK_ME:
        # features that are all 0 have none; the evaluation goes on, for its alarm says what that is
        return rank_me(queries.features) if queries.features.any() else 0.0
    classes = max(int(reference.labels.max()), int(queries.labels.max())) + 1
    k = int(name.removeprefix("knn").removesuffix("_top1"))
    # where both sets are one, equal ids keep each image from voting for itself
    return knn_classify(reference, queries, classes, k, temperature)[k]


def why_unusable(labels: torch.Tensor) -> str:
    """Why labels of one set say nothing about a backbone; empty where they do.

    Args:
        labels: int64 [N], -1 where unknown.
    """
    counts = labels[labels >= 0].bincount()
    counts = counts[counts > 0]
    labelled = int(counts.sum())
    if len(counts) < 2:
        one = f"all {labelled:,} labelled images are of one class"
        return one if labelled else "no image has a label"
    others = int(counts[counts > 1].sum())
    if others < FEWEST * labelled:
        return f"only {others:,} of {labelled:,} labelled images have another one of their class"
    return ""
