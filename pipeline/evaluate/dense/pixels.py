"""Raw pixels as patches: what colours and places say, without any network.

Shapes: B images, S side in pixels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SIDE = 4  # pixels of a patch


def pixel_patches(images: Sequence[npt.NDArray[np.uint8]], grid: int) -> tuple[Tensor, Tensor]:
    """The pixels of each patch with its row and column, and the mean colour of each image.

    The place is among them since a network knows it too, from its first step on.

    Args:
        images: B, uint8 [S, S, C] with S = 4 x `grid`.
        grid: h and w.

    Returns:
        float32 [B, h, w, 16 * C + 2] and float32 [B, C], from -1 to 1.
    """
    x = torch.from_numpy(np.stack(list(images))).float() / 127.5 - 1
    patches = x.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).flatten(3)  # [B, h, w, C * 16]
    line = torch.linspace(-1, 1, grid)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    return torch.cat([patches, places.expand(len(x), -1, -1, -1)], -1), x.mean((1, 2))
