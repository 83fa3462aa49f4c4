"""Which images train a classifier, which choose its settings, which are asked: the same ones for
every model.

Shapes: N images of the reference, Q queries.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.features import LabelledFeatures

SHARE = 0.2  # of a class, where there is no second set
CHOOSING_SHARE = 0.1  # of the training images, as DINOv2 eval/log_regression.py
CHOOSING_SEED = 1
Labels = Tensor | npt.NDArray[np.int64]


def held_out(
    labels: Labels, ids: npt.NDArray[np.uint8], share: float = SHARE, seed: int = 0
) -> npt.NDArray[np.bool_]:
    """The images that are held out: in each class, those whose ids have the lowest hashes.

    It depends on labels, ids and seed alone, not on the order of the rows. Copies of an image (rows
    with one id) stay on one side. A class of two images or more has at least one on each side; the
    image of a class of one stays in training (`classes_of_one` counts them).

    Args:
        labels: int64 [N], -1 where unknown; such rows are not held out, nor of use in training.
        ids: uint8 [N, 16].
        share: of the images of each class, more than 0 and less than 1; rounded.
        seed: another seed holds out others.

    Returns:
        bool [N].

    Raises:
        DataError: the share is none, or there are not as many ids as labels.
    """
    if not 0 < share < 1:
        raise DataError(
            f"a share of {share:g} of the images cannot be held out",
            "hold out more than 0 and less than 1, e.g. 0.2",
        )
    images = _Images(labels, ids)
    order = np.lexsort((_hashes(images.ids, seed), images.classes))
    counts = images.counts
    first = np.cumsum(counts) - counts
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(first, counts)
    most = np.where(counts > 1, np.clip(np.rint(share * counts), 1, np.maximum(1, counts - 1)), 0)
    out = np.zeros(len(images.known), np.bool_)
    out[images.known] = (rank < most[images.classes])[images.of_row]
    return out


def classes_of_one(labels: Labels, ids: npt.NDArray[np.uint8]) -> int:
    """How many classes have one image only, of which none can be held out."""
    return int((_Images(labels, ids).counts == 1).sum())


@dataclass(frozen=True)
class Counts:
    """What became of the images.

    Attributes:
        trained_on: images that train, those that choose not counted.
        chosen_on: images of the reference that choose the settings.
        asked: images that the score is of.
        classes: of training.
        classes_of_one: classes of which no image can choose, nor be held out.
        unlabelled: images of both sets that have no label, so are not used.
        asked_too: images of the reference that are also asked, so do not train.
        unanswerable: asked images of a class without an image in training; they count as wrong.
    """

    trained_on: int
    chosen_on: int
    asked: int
    classes: int
    classes_of_one: int
    unlabelled: int
    asked_too: int
    unanswerable: int


@dataclass(frozen=True)
class Split:
    """What each image is for.

    Attributes:
        training: bool [N], rows of the reference that train.
        choosing: bool [N], rows of the reference that choose the settings; none of them trains.
        asked: bool [Q], rows of the queries; where there are none bool [N], held out.
        counts: of them, and of what is left out.
    """

    training: npt.NDArray[np.bool_]
    choosing: npt.NDArray[np.bool_]
    asked: npt.NDArray[np.bool_]
    counts: Counts

    @classmethod
    def of(cls, reference: LabelledRows, queries: LabelledRows | None) -> Split:
        """Splits a labelled reference, and holds out a part of it where there are no queries.

        Raises:
            DataError: no image with a label is left to train with, or to ask.
        """
        known = reference.labels >= 0
        asked_set = reference if queries is None else queries
        if queries is None:
            asked = held_out(reference.labels, reference.ids)
            both = asked
        else:
            asked = queries.labels >= 0
            both = known & np.isin(reference.names, queries.names[asked])
        usable = known & ~both
        if not usable.any() or not asked.any():
            raise DataError(
                f"{usable.sum():,} labelled images are left to train a classifier and "
                f"{asked.sum():,} to ask it",
                "give images with labels, at least two of a class or a second set",
            )
        left = np.where(usable, reference.labels, -1)
        choosing = held_out(left, reference.ids, CHOOSING_SHARE, CHOOSING_SEED)
        training = usable & ~choosing
        unlabelled = (~known).sum() + (0 if queries is None else (~asked).sum())
        counts = Counts(
            trained_on=int(training.sum()),
            chosen_on=int(choosing.sum()),
            asked=int(asked.sum()),
            classes=len(np.unique(left[usable])),
            classes_of_one=classes_of_one(left, reference.ids),
            unlabelled=int(unlabelled),
            asked_too=0 if queries is None else int(both.sum()),
            unanswerable=int((~np.isin(asked_set.labels[asked], left[usable])).sum()),
        )
        return cls(training, choosing, asked, counts)

    def details(self) -> dict[str, int]:
        """The counts by name, as a card shows them."""
        return asdict(self.counts)


@dataclass(frozen=True)
class LabelledRows:
    """Labels int64 [N], -1 where unknown, and ids uint8 [N, 16] of the images of a set."""

    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, features: LabelledFeatures) -> LabelledRows:
        """Those of vectors.

        Raises:
            DataError: the vectors have no ids.
        """
        if features.ids is None:
            raise DataError(
                "the vectors have no image ids, so nobody knows which images are in both sets",
                "give the ids of the images with the vectors",
            )
        return cls(features.labels.cpu().numpy(), features.ids)

    @property
    def names(self) -> npt.NDArray[Any]:
        """The ids as S16 [N]."""
        return np.ascontiguousarray(self.ids).view("S16").ravel()


class _Images:
    """The different images among rows with labels.

    Attributes:
        known: bool [N], the rows that have a label.
        ids: S16 [n], sorted.
        of_row: int64, for each known row its image.
        classes: int64 [n], numbers of the classes that there are, counted from 0.
        counts: int64, images of each of these classes.
    """

    def __init__(self, labels: Labels, ids: npt.NDArray[np.uint8]) -> None:
        numbers = torch.as_tensor(labels).cpu().numpy()
        if ids.shape != (len(numbers), 16):
            raise DataError(
                f"{len(numbers):,} labels have ids of shape {list(ids.shape)}",
                "give one id of 16 bytes for each label",
            )
        self.known: npt.NDArray[np.bool_] = numbers >= 0
        names = np.ascontiguousarray(ids[self.known]).view("S16").ravel()
        self.ids, self.of_row = np.unique(names, return_inverse=True)
        # Copies of one image may have several labels: the lowest says where all of them go.
        lowest = np.full(len(self.ids), np.iinfo(np.int64).max)
        np.minimum.at(lowest, self.of_row, numbers[self.known])
        _, self.classes, self.counts = np.unique(lowest, return_inverse=True, return_counts=True)


def _hashes(ids: npt.NDArray[Any], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each id of 16 bytes, without order in ids that are counted up."""
    halves = ids.view("<u8").reshape(-1, 2)
    start = np.full(len(halves), seed, np.uint64)
    return _mixed(_mixed(_mixed(start) ^ halves[:, 0]) ^ halves[:, 1])


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of SplitMix64 (Steele et al. 2014, figure 16)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
