"""KoLeo: spread the features of a batch by pushing each away from its nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import PipelineError

EPS = 1e-8


def koleo(features: Tensor) -> Tensor:
    """`-mean_i log(|x_i - nearest(x_i)| + eps)` of L2-normalised rows `[B, D]`, 0-d fp32 (DINOv2
    loss/koleo_loss.py). Tokens `[B, N, D]` are spread inside each image: the mean over the images.

    Computed in fp32 whatever the input: 1e-8 is 0 in fp16 and a duplicate then gives infinity. The
    gradient reaches both a row and its neighbour. Fewer than two rows have no neighbour: 0, still
    connected to the input.

    Raises:
        PipelineError: features that are neither.
    """
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
            similarity.fill_diagonal_(-1.0)
            nearest = similarity.argmax(dim=1)
        distance = torch.linalg.vector_norm(x - x[nearest] + EPS, dim=-1)
        loss: Tensor = -(distance + EPS).log().mean()
    return loss
