"""Few-shot classification: how good a class is known from 1, 5 or 10 of its images.

The classifier is the nearest class mean of SimpleShot (Wang et al. 2019, arXiv 1911.04623, CL2N):
vectors less the mean of the reference, scaled to unit length, then the class whose mean is nearest
by Euclidean distance. It has nothing to tune, so a draw costs a product of queries and classes.

The mean that is taken off is of the images of the reference that are not asked, as theirs is of all
base classes. It needs no labels.

Memory: 512 MiB of class means, and under 512 MiB of work. Features are gone through in blocks, so
those that are read from a table (`card/inputs/stored.py`) are never in memory as a whole.

Shapes: N reference images, Q queries, D width, C classes, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.blocks import in_blocks
from pipeline.evaluate.classifiers.split import held_out
from pipeline.evaluate.features import LabelledFeatures, as_array
from pipeline.evaluate.score import Score

SHOTS = (1, 5, 10)
DRAWS = 5
AT_ONCE = 1 << 22  # products or values of vectors in doubles: 32 MiB
MEANS_AT_ONCE = 1 << 26  # values of class means: 512 MiB in doubles

Details = dict[str, Any]
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def few_shot_scores(
    reference: LabelledFeatures,
    queries: LabelledFeatures | None = None,
    shots: Sequence[int] = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[tuple[Score, Details]]:
    """Top-1 accuracy from so many images a class: `few_shot5_top1`, mean over draws.

    The images of a draw follow from the ids, so all models learn from the same ones. Those of one
    shot are among those of five. No image is learnt from that is also asked.

    Args:
        reference: images to learn from; rows without a label only count in the mean.
        queries: None: a part of the reference is held out (`split.held_out`) and asked.
        shots: images a class; a class that has fewer gives those it has.
        draws: how often images are drawn.
        seed: another one draws others.

    Returns:
        for each number of shots the score, of each image the share of draws in which it was right,
        and `draws` (accuracy of each), `spread` (their standard deviation), `classes`,
        `classes_with_fewer` images than shots, how many images were `learnt_from` and `asked`, and
        of these `unanswerable`, of a class that none is learnt from.

    Raises:
        DataError: no image with a label is left to learn from, or to ask; no ids.
    """
    pool, asked, others = _split(reference, queries)
    labels, classes = np.unique(_labels(reference)[pool], return_inverse=True)
    asked_set = reference if queries is None else queries
    assert reference.ids is not None and asked_set.ids is not None
    names = _names(reference.ids[pool])
    truth = _labels(asked_set)[asked]
    centre = _mean(reference.features, others)
    sizes = np.bincount(classes, minlength=len(labels))
    ranks = [_ranks(names, classes, [seed, draw]) for draw in range(draws)]
    draws_of = [(shot, rank) for shot in shots for rank in ranks]
    answers = np.empty((len(draws_of), len(asked)), np.int64)
    together = max(1, MEANS_AT_ONCE // (len(labels) * max(1, len(centre))))
    for start in range(0, len(draws_of), together):
        group = slice(start, start + together)
        chosen = [rank < shot for shot, rank in draws_of[group]]
        means = _class_means(reference.features, centre, pool, classes, chosen)
        answers[group] = labels[_nearest(asked_set.features, centre, asked, means)]
    hits = (answers == truth).reshape(len(shots), draws, len(asked))
    scores = []
    for shot, hit in zip(shots, hits, strict=True):
        each = hit.mean(1)
        details = {
            "draws": [float(x) for x in each],
            "spread": float(each.std(ddof=1)) if draws > 1 else 0.0,
            "classes": len(labels),
            "classes_with_fewer": int((sizes < shot).sum()),
            "learnt_from": int(np.minimum(sizes, shot).sum()),
            "asked": len(asked),
            "unanswerable": int((~np.isin(truth, labels)).sum()),
        }
        name = f"few_shot{shot}_top1"
        scores.append((Score.of_hits(name, hit.mean(0), asked_set.ids[asked]), details))
    return scores


def _split(
    reference: LabelledFeatures, queries: LabelledFeatures | None
) -> tuple[Rows, Rows, Rows]:
    """Rows of the reference to draw from, rows that are asked, and rows of the reference that show
    no image which is asked.
    """
    if reference.ids is None or (queries is not None and queries.ids is None):
        raise DataError("the images have no ids, which tell one image from another")
    known = _labels(reference) >= 0
    if queries is None:
        asked = held_out(reference.labels, reference.ids)
        names = _names(reference.ids)[asked]
    else:
        asked = _labels(queries) >= 0
        assert queries.ids is not None
        names = _names(queries.ids[asked])
    others = ~np.isin(_names(reference.ids), names)
    pool = known & others
    if not (pool.any() and asked.any()):
        raise DataError(
            f"few-shot classification has {pool.sum():,} labelled images to learn from and "
            f"{asked.sum():,} others to ask",
            "give images with labels, at least two of a class or a second set",
        )
    return np.flatnonzero(pool), np.flatnonzero(asked), np.flatnonzero(others)


def _labels(features: LabelledFeatures) -> Rows:
    return np.asarray(features.labels.cpu().numpy())


def _names(ids: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(ids).view("S16").ravel()


def _ranks(names: npt.NDArray[Any], classes: Rows, key: Sequence[int]) -> Rows:
    """The place of each image in the order in which its class is drawn, from 0."""
    order = np.random.default_rng([*key, len(names)]).permutation(np.argsort(names, kind="stable"))
    order = order[np.argsort(classes[order], kind="stable")]
    counts = np.bincount(classes)
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names)) - np.repeat(np.cumsum(counts) - counts, counts)
    return rank


def _mean(features: Tensor, rows: Rows) -> Doubles:
    total = np.zeros(features.shape[1])
    for _, vectors in in_blocks(features, rows, AT_ONCE):
        total += as_array(vectors).astype(np.float64).sum(0)
    return total / len(rows)


def _units(vectors: Tensor, centre: Doubles) -> Tensor:
    """Vectors less the centre, of unit length. In doubles: the features of an untrained backbone
    differ from their mean by a small part of their length.
    """
    wide = as_array(vectors).astype(np.float64)
    wide -= centre
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    wide /= np.where(lengths > 0, lengths, 1)
    return torch.from_numpy(wide).to(vectors.device)


def _class_means(
    features: Tensor,
    centre: Doubles,
    pool: Rows,
    classes: Rows,
    chosen: Sequence[npt.NDArray[np.bool_]],
) -> list[Tensor]:
    """Means of the unit vectors of each class, float64 [C, D] of each choice from the pool."""
    count, device = int(classes.max()) + 1, features.device
    shape = (count, features.shape[1])
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in chosen]
    drawn = np.flatnonzero(np.any(chosen, 0))  # places in the pool
    for part, vectors in in_blocks(features, pool[drawn], AT_ONCE):
        units, places = _units(vectors, centre), drawn[part]
        for total, one in zip(sums, chosen, strict=True):
            inside = np.flatnonzero(one[places])
            numbers = torch.from_numpy(classes[places[inside]]).to(device)
            total.index_add_(0, numbers, units[torch.from_numpy(inside).to(device)])
    for total, one in zip(sums, chosen, strict=True):
        images = np.bincount(classes[one], minlength=count)
        total /= torch.from_numpy(images).to(device)[:, None]
    return sums


def _nearest(features: Tensor, centre: Doubles, rows: Rows, means: Sequence[Tensor]) -> Rows:
    """The class whose mean is nearest, for each of several sets of means, int64 [means, Q]; of
    equals the lowest.
    """
    answers = np.empty((len(means), len(rows)), np.int64)
    halves = [(mean * mean).sum(1) / 2 for mean in means]
    for part, vectors in in_blocks(features, rows, AT_ONCE):
        units = _units(vectors, centre)
        step = max(1, AT_ONCE // len(means[0]))
        for i, (mean, half) in enumerate(zip(means, halves, strict=True)):
            # |x - c|^2 / 2 less what depends on x alone
            answers[i, part] = np.concatenate(
                [
                    (block @ mean.T - half).argmax(1).cpu().numpy()
                    for block in torch.split(units, step)
                ]
            )
    return answers
