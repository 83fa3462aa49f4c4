"""A small ViT with a stem of convolutions (Xiao et al. 2021, "Early convolutions help transformers
see better", section 4), whose feature is the mean over its patches.

    model.encoder=module:pipeline.model.encoders.stemmed:vit

It needs fewer passes than one that cuts its patches out by a single linear layer. The stem is one
convolution, then residual blocks, all of stride 2. There is no CLS token and no masking: it trains
with DINO and KoLeo.

B images, C channels, S side in pixels, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.block import LAYER_NORM_EPS, Block
from pipeline.model.encoders import residual


@dataclass(frozen=True)
class Shape:
    """Sizes; each stage of the stem halves the side."""

    stem: Sequence[int] = (64, 128, 192)  # widths
    width: int = 192
    depth: int = 2
    heads: int = 3


class StemmedVit(nn.Module):
    """`[B, C, S, S]` to `[B, D]`."""

    def __init__(self, shape: Shape, in_channels: int = 3, image_size: int = 32) -> None:
        """Random weights, from torch's global generator; positions are learnt for `image_size` and
        interpolated for others.
        """
        super().__init__()
        first, *others = shape.stem
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, first, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        ]
        layers += [residual.Block(before, after, 2) for before, after in pairwise([first, *others])]
        self.stem = nn.Sequential(*layers)
        for module in self.stem.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.stem.append(nn.Conv2d(shape.stem[-1], shape.width, 1))
        side = -(-image_size // 2 ** len(shape.stem))
        self.position = nn.Parameter(torch.zeros(1, shape.width, side, side))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, 4.0, "mlp", 1.0) for _ in range(shape.depth)
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.feature = nn.BatchNorm1d(shape.width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.stem(x)
        position: Tensor = self.position
        if x.shape[-2:] != position.shape[-2:]:
            position = functional.interpolate(position, x.shape[-2:], mode="bilinear")
        x = (x + position).flatten(2).mT
        views, tokens, width = x.shape
        x = x.reshape(views * tokens, width)
        for block in self.blocks:
            x = block(x, ((views, tokens),))
        patches = self.norm(x).view(views, tokens, width)
        # under autocast too in the type of the statistics
        mean = patches.mean(1, dtype=self.feature.running_mean.dtype)  # type: ignore[union-attr]
        feature: Tensor = self.feature(mean)
        return feature


def vit(in_channels: int = 3, image_size: int = 32) -> StemmedVit:
    """1.7 million parameters, D = 192, patches of 8 pixels: for images of 32 to 64 pixels."""
    return StemmedVit(Shape(), in_channels, image_size)
