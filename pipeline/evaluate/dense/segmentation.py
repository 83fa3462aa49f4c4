"""A linear layer from patches to classes, and what a mask adds to the mean IoU.

DINOv2 (Oquab et al. 2023), section 7.4 "linear": a linear layer on the patches of the last block,
its logits upsampled to pixels. Shapes: n images, h x w patches, D width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.evaluate.dense.fit import UNKNOWN_CLASS, Schedule, fit, moments

# AdamW and its weight decay as in the released settings of DINOv3 for segmentation; the rate is
# higher and the steps are fewer, for features of mean 0 and deviation 1 in a convex problem.
SCHEDULE = Schedule(steps=500, batch=16, lr=3e-2, weight_decay=1e-3)


@dataclass(frozen=True)
class LinearClasses:
    """Scores of classes for patches.

    Attributes:
        weight: float32 [K, D].
        bias: float32 [K].
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fitted(
        cls, tokens: Tensor, masks: Tensor, classes: int, schedule: Schedule = SCHEDULE
    ) -> LinearClasses:
        """By the cross entropy of pixels. The features are of mean 0 and deviation 1 over all
        patches, as after a batch norm without affine weights; no class weighs more.

        Args:
            tokens: [n, h, w, D].
            masks: uint8 [n, H, W], class numbers or `UNKNOWN_CLASS`; logits are upsampled to H x W.
            classes: K.
            schedule: of the fit.
        """
        device = tokens.device
        mean, deviation = moments(tokens)
        weight = torch.zeros(classes, tokens.shape[-1], device=device, requires_grad=True)
        bias = torch.zeros(classes, device=device, requires_grad=True)
        size = (masks.shape[-2], masks.shape[-1])

        def loss(rows: Tensor) -> Tensor:
            rows = rows.to(device)
            x = (tokens[rows].float() - mean) / deviation
            logits = F.interpolate(
                F.linear(x, weight, bias).permute(0, 3, 1, 2), size, mode="bilinear"
            )
            truth = masks[rows].long()
            known = (truth != UNKNOWN_CLASS).sum().clamp(min=1)
            summed = F.cross_entropy(logits, truth, ignore_index=UNKNOWN_CLASS, reduction="sum")
            return summed / known

        fit([weight, bias], len(tokens), loss, schedule, schedule.generator())
        folded = weight / deviation
        return cls(folded, bias - folded @ mean)

    def scores(self, tokens: Tensor) -> Tensor:
        """Of patches [..., D], float32 [..., K]."""
        return F.linear(tokens.float(), self.weight, self.bias)


def confusion(answer: Tensor, truth: Tensor, classes: int) -> npt.NDArray[np.int64]:
    """Pixels by class, int64 [K, K], rows the truth; pixels of `UNKNOWN_CLASS` do not count.

    Args:
        answer: class numbers of any shape.
        truth: likewise, or `UNKNOWN_CLASS`.
        classes: K.
    """
    known = truth != UNKNOWN_CLASS
    pairs = truth[known].long() * classes + answer[known].long()
    counts = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
    return np.asarray(counts.cpu().numpy(), np.int64)


def overlaps(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What a confusion [K, K] adds to the mean IoU: pixels of each class that are right, of its
    truth and of the answers, [3 * K].
    """
    return np.concatenate([np.diag(counts), counts.sum(1), counts.sum(0)]).astype(np.float64)


def class_ious(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU of each class of a confusion [K, K]; NaN where it is neither there nor answered."""
    both = np.diag(counts).astype(np.float64)
    either = counts.sum(0) + counts.sum(1) - both
    return np.asarray(np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0))
