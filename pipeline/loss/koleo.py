"""KoLeo: spread the features of a batch by pushing each away from its nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError

EPS = 1e-8


def koleo(features: Tensor, weights: Tensor | None = None) -> Tensor:
    """`-mean_i log(|x_i - nearest(x_i)| + eps)` of L2-normalised rows `[B, D]`, 0-d fp32 (DINOv2
    loss/koleo_loss.py). Tokens `[B, N, D]` are spread inside each image: the mean over the images.

    Computed in fp32 whatever the input: 1e-8 is 0 in fp16 and a duplicate then gives infinity. The
    gradient reaches both a row and its neighbour. Fewer than two rows have no neighbour: 0, still
    connected to the input.

    Args:
        features: rows or tokens.
        weights: `[B]` of rows, 1 for one that counts and 0 for another, which is nobody's neighbour
            and no part of the mean; None: all count.

    Raises:
        PipelineError: features that are neither, or weights that are not one a row.
    """
    if weights is not None and (features.ndim != 2 or weights.shape != features.shape[:1]):
        raise PipelineError(
            f"koleo got weights {list(weights.shape)} for features {list(features.shape)}",
            "give one weight for each row of features [B, D]",
        )
    if features.ndim == 3 and len(features):
        return torch.stack([koleo(tokens) for tokens in features]).mean()
    if features.ndim != 2:
        raise PipelineError(
            f"koleo got features {list(features.shape)}, expected rows [B, D] or tokens [B, N, D]",
            "for neighbours among all tokens flatten them: features.flatten(0, -2)",
        )
    if len(features) < 2:
        return features.float().sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = x @ x.T
            if weights is not None:
                similarity.masked_fill_(weights == 0, -2.0)
            similarity.fill_diagonal_(-2.0)
            nearest = similarity.argmax(dim=1)
        distance = torch.linalg.vector_norm(x - x[nearest] + EPS, dim=-1)
        each = -(distance + EPS).log()
        loss: Tensor = each.mean()
        if weights is not None:
            count = weights.sum()
            loss = (each * weights).sum() / count.clamp(min=1) * (count > 1)
    return loss
