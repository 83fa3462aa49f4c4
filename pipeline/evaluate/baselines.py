"""What a model must beat: small pixels, a colour histogram, and the most frequent class.

Shapes: B images, S side in pixels, C channels, N reference images, Q queries.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError

SIDE = 16  # of the small image, pixels
# Swain and Ballard, "Color indexing" (IJCV 1991), count colours jointly. 8 x 8 x 8 is the usual
# size (e.g. of scikit-image's and OpenCV's examples of retrieval by colour).
JOINT_BINS = 8  # of each of three channels
SINGLE_BINS = 64  # of each channel, where there are not three

Images = npt.NDArray[np.uint8]


def pixel_vectors(images: Images, device: torch.device | str = "cpu") -> Tensor:
    """Images averaged down to 16 x 16: float32 [B, 256 * C] in 0 to 1, on the device.

    Cosines of these are all near 1, so take the mean vector of the reference off both sets first
    (`without_mean`).

    Args:
        images: uint8 [B, S, S, C]; smaller ones than 16 x 16 are repeated up to it.
        device: where to compute.
    """
    pixels = _on(images, device).permute(0, 3, 1, 2).float()
    return functional.adaptive_avg_pool2d(pixels, SIDE).flatten(1) / 255


def pixel_width(channels: int) -> int:
    """Width of `pixel_vectors`."""
    return SIDE * SIDE * channels


def colour_vectors(images: Images, device: torch.device | str = "cpu") -> Tensor:
    """Colour histograms: the square root of each bin's share of the pixels, float32 [B, bins].

    Vectors have length 1, and a cosine is the Bhattacharyya coefficient of two histograms
    (Bhattacharyya 1943; for colours Comaniciu et al., "Kernel-based object tracking", 2003,
    section 4). Three channels are counted jointly in 8 x 8 x 8 bins. Other numbers of channels
    are counted each by itself, in 64 bins.

    Args:
        images: uint8 [B, S, S, C].
        device: where to compute.
    """
    levels = _on(images, device).flatten(1, 2)  # [B, S * S, C]
    count, channels = len(levels), levels.shape[2]
    if channels == 3:
        red, green, blue = (levels // (256 // JOINT_BINS)).int().unbind(2)
        bins = (red * JOINT_BINS + green) * JOINT_BINS + blue
    else:
        steps = SINGLE_BINS * torch.arange(channels, dtype=torch.int32, device=levels.device)
        bins = ((levels // (256 // SINGLE_BINS)).int() + steps).flatten(1)
    width = colour_width(channels)
    bins += width * torch.arange(count, dtype=torch.int32, device=levels.device)[:, None]
    counts = torch.bincount(bins.flatten(), minlength=count * width).view(count, width)
    return (counts / bins.shape[1]).sqrt()


def colour_width(channels: int) -> int:
    """Width of `colour_vectors`: the number of bins."""
    return JOINT_BINS**3 if channels == 3 else SINGLE_BINS * channels


def without_mean(reference: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets [N, D] and [Q, D] less the mean vector of the reference."""
    mean = reference.mean(0)
    return reference - mean, queries - mean.to(queries.device)


def majority_hits(
    reference_labels: npt.NDArray[np.int64], query_labels: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Which queries are of the reference's most frequent class, bool [Q]; the first of equal ones.

    With one set the queries are the reference. Then each image counts for its own class too. With
    its own count left out, as k-NN leaves out an image, the answer would be wrong for every image
    of a set with equal classes.

    Args:
        reference_labels: int64 [N], -1 where unknown: these do not count.
        query_labels: int64 [Q]; unknown ones are no hit.

    Raises:
        DataError: no image of the reference has a label.
    """
    known: Any = np.asarray(reference_labels)
    known = known[known >= 0]
    if not len(known):
        raise DataError(
            "no image of the reference has a label, so it has no most frequent class",
            "evaluate on shards with a label column",
        )
    hits: npt.NDArray[np.bool_] = np.asarray(query_labels) == np.bincount(known).argmax()
    return hits


def _on(images: Images, device: torch.device | str) -> Tensor:
    # A copy: arrays of an object store cannot be written to, which torch warns of.
    return torch.from_numpy(np.array(images)).to(device)
