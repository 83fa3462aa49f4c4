"""The patches that iBOT scores, as places in the packed views.

Their number changes from step to step, and every new shape costs: allocations, kernels of oneDNN,
which are kept by shape, and compiled ones. So places are filled up to a length that a micro batch
hardly ever exceeds. Masks come from the host, so they are looked at there, before they are copied:
a device would have to be waited for.

V global views, P patches of each.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.views.copies import sent
from pipeline.views.masks import MaskSpec

log = logging.getLogger("pipeline.views")

MULTIPLE = 32  # of lengths
DEVIATIONS = 3  # one micro batch in about 700 has more masked patches


class Masked(NamedTuple):
    """The patches that iBOT scores.

    `places` is filled up with the first patch; what the networks say after `rows` of them is used
    nowhere.
    """

    places: Tensor  # int64 [M or more], flat places in [V * P]
    rows: int  # M

    def to(self, device: torch.device) -> Masked:
        """On a device, by a copy that the host does not wait for."""
        return Masked(sent(self.places, device), self.rows)


def usual_length(micro_batch: int, global_batch: int, spec: MaskSpec) -> int:
    """The number of masked patches that a micro batch hardly ever exceeds: mean and three standard
    deviations, as a multiple of 32.

    `masks_for` cuts the shares of masked patches into bins, one for each masked view of the global
    batch, and deals them out; a micro batch is a sample of them without replacement. So the smaller
    its part of the global batch, the more their number varies.
    """
    views, total = (spec.global_crops * images for images in (micro_batch, global_batch))
    patches = spec.grid[0] * spec.grid[1]
    masked = int(total * spec.probability)
    low, high = spec.ratio
    middle, width = (low + high) / 2, high - low
    mean = masked / total * middle
    square = masked / total * (middle**2 + width**2 / 12)  # of the share of one view
    outside = (total - views) / max(total - 1, 1)  # the whole batch has each bin once
    inside = (
        width**2 / (12 * masked * total) if masked else 0.0
    )  # of the share of one view in its bin
    deviation = math.sqrt(views * (max(square - mean**2, 0) * outside + inside))
    length = patches * (views * mean + DEVIATIONS * deviation)
    return min(views * patches, _multiple(math.ceil(length), MULTIPLE))


def scored_patches(masks: Tensor, weights: Tensor | None, every: bool) -> Tensor:
    """Bool `[V, P]`, the patches that iBOT scores: of views that count, the masked ones or all.

    Args:
        masks: bool `[V, P]`, crop-major.
        weights: `[B]` of the images, 0 for one that does not count; None: all count.
        every: score every patch, as in distillation.
    """
    scored = torch.ones_like(masks) if every else masks
    if weights is None or not len(weights):
        return scored
    return scored & (weights > 0).repeat(len(masks) // len(weights))[:, None]


def masked_patches(scored: Tensor, length: int = 0, multiple: int = MULTIPLE) -> Masked:
    """The places of `scored` (bool `[V, P]`), filled up to `length`; or, where there are more, to
    the next multiple.
    """
    places = scored.flatten().nonzero().squeeze(1)
    rows = len(places)
    if rows > length:
        length = min(scored.numel(), _multiple(rows, multiple))
    return Masked(F.pad(places, (0, length - rows)), rows)


@dataclass
class PatchFinder:
    """Finds what iBOT scores in a run's masks, on the host."""

    length: int  # of the places of a micro batch; 0: iBOT has no weight
    every: bool = False  # all patches, in a distillation
    exceeded: bool = False  # whether it was said

    def __call__(self, masks: Tensor, weights: Tensor | None) -> Masked:
        """The places in masks (bool `[V, P]`, crop-major) of images with weights `[B]`."""
        if not self.length:
            return Masked(torch.zeros(0, dtype=torch.long), 0)
        masked = masked_patches(scored_patches(masks, weights, self.every), self.length)
        if masked.rows > self.length and not self.exceeded:
            self.exceeded = True
            log.info(
                "a micro batch has %d masked patches, more than the usual %d; it and others like it"
                " take a little longer",
                masked.rows,
                self.length,
            )
        return masked


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of
