"""iBOT: patches hidden from the student predict the teacher's target of the same patch."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.loss.form import Kernels
from pipeline.loss.prototypes import STUDENT_TEMPERATURE, Span, check_rows, cross_entropy
from pipeline.loss.target import Target


def patch_weights(masks: Tensor, masked: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weight `[M]` of each masked patch: 1 / (masked patches of its view) / (all views that count,
    masked or not).

    Args:
        masks: bool `[V, P]`.
        masked: int64 `[M]`, flat places of the masked patches.
        weights: `[V]`, 1 for a view that counts and 0 for another; None: all count.

    Raises:
        PipelineError: other shapes or dtypes.
    """
    if masks.ndim != 2 or masked.ndim != 1 or masked.dtype != torch.int64:
        raise PipelineError(
            f"masks {list(masks.shape)} and places {list(masked.shape)} of {masked.dtype}, "
            "expected masks [views, patches] and places [masked patches] of int64",
            "flatten images and crops into views; places are masks.flatten().nonzero().squeeze(1)",
        )
    views, patches = masks.shape
    if weights is not None and tuple(weights.shape) != (views,):
        raise PipelineError(
            f"weights {list(weights.shape)} for masks of {views} views, expected [{views}]",
            "give one weight for each view",
        )
    each = 1.0 / (masks.sum(dim=1).clamp(min=1) * views)
    if weights is not None:
        each = weights / (masks.sum(dim=1).clamp(min=1) * weights.sum().clamp(min=1))
    return each[torch.div(masked, patches, rounding_mode="floor")]


def ibot_loss(
    logits: Tensor,
    target: Target,
    weights: Tensor,
    temperature: float = STUDENT_TEMPERATURE,
    kernels: Kernels = "auto",
) -> Tensor:
    """`sum_i weights_i * CE(q_i, s_i)` over the masked patches, 0-d fp32 (DINOv2
    loss/ibot_patch_loss.py).

    0 without masked patches, and still connected to `logits`.

    Raises:
        PipelineError: the shapes do not fit each other.
    """
    rows = len(target.row)
    check_rows("ibot_loss", logits, target, rows)
    if tuple(weights.shape) != (rows,):
        raise PipelineError(
            f"ibot_loss got weights {list(weights.shape)}, expected [{rows}], one a masked patch",
            "take them from patch_weights of the same masks",
        )
    span = Span(target, weights, (0,))
    return cross_entropy(logits, [span], 1, temperature, kernels=kernels)[0]
