"""Which images of one labelled set are kept out of training: the same ones for every model.

Shapes: N images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError

SHARE = 0.2  # of a class
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
