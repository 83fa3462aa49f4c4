"""Features: images to features in batches, without gradients, and features with their labels.

Shapes: b images of a batch, N images in all, S side in pixels, C channels, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Images = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.uint8]  # [N, 16], see `data.columns.image_id`
# Batches whose features are copied together: a copy waits for the device, which is then idle.
AT_ONCE = 16


@dataclass
class LabelledFeatures:
    """N images: `features` [N, D], `labels` int64 [N], -1 where unknown, `ids` where known."""

    features: Tensor
    labels: Tensor
    ids: Ids | None = None

    def labelled(self) -> LabelledFeatures:
        """The rows that have a label."""
        known = self.labels >= 0
        ids = None if self.ids is None else self.ids[known.numpy()]
        return LabelledFeatures(self.features[known], self.labels[known], ids)


def embed(
    backbone: nn.Module,
    images: Iterable[Images],
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The CLS feature of every image, not normalised.

    Args:
        backbone: [b, C, S, S] -> [b, D], on `device`; its training mode is as before afterwards.
        images: batches uint8 [b, S, S, C]; sizes may differ between batches.
        mean: of each channel, for values in [0, 1].
        std: of each channel.
        device: where the backbone is.
        dtype: of the matrix products (autocast where it is not float32).

    Returns:
        float32 [N, D] on the CPU, in the order of the images.
    """
    features, waiting = [], []
    with inference(backbone, device, dtype):
        for batch in images:
            waiting.append(backbone(normalise(batch, mean, std, device)).float())
            if len(waiting) == AT_ONCE:
                features.append(torch.cat(waiting).cpu())
                waiting = []
        if waiting:
            features.append(torch.cat(waiting).cpu())
    return torch.cat(features) if features else torch.zeros(0, int(getattr(backbone, "width", 0)))


def normalise(
    images: Images, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:
    """uint8 [b, S, S, C] -> float32 [b, C, S, S] on the device, with mean 0 and deviation 1."""
    # Bytes travel, floats are made on the device: a quarter of the transfer.
    x = torch.from_numpy(np.array(images)).to(device, non_blocking=True)
    centre, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return x.permute(0, 3, 1, 2).float().div(255).sub(centre).div(scale)


@contextmanager
def inference(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """No gradients, evaluation mode, autocast; every sub-module gets its own mode back."""
    modes = [(part, part.training) for part in module.modules()]
    autocast: Any = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    module.eval()
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for part, training in modes:
            part.training = training


def as_array(features: Tensor) -> npt.NDArray[Any]:
    """As numpy has it, which knows no bfloat16."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return np.asarray(features.detach().cpu().to(wide).numpy())
