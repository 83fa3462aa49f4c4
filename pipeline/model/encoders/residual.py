"""Residual networks for small images and few minutes (He et al. 2016, ResNet, section 4.2).

A stem of stride 2 and stages of basic blocks, all but the first of stride 2; so images of 32 pixels
become 4 x 4 places with three stages. BatchNorm everywhere, and on the feature too, which is the
mean over places: then KoLeo and the neighbours of an evaluation see dimensions of equal spread.

    model.encoder=module:pipeline.model.encoders.residual:small

B images, C channels, S side in pixels, D width of the feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions and a way around them; a 1 x 1 convolution where shapes change."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        same = stride == 1 and before == after
        self.around: nn.Module = nn.Identity()
        if not same:
            self.around = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, before, h, w]` to `[B, after, h / stride, w / stride]`."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.around(x))


class Residual(nn.Module):
    """`[B, C, S, S]` to the feature `[B, D]`, D the last of `widths`; or to tokens, the feature and
    the places of the last stage row by row.
    """

    def __init__(
        self, widths: Sequence[int], in_channels: int = 3, strides: int = 1, tokens: bool = False
    ) -> None:
        """Random weights, from torch's global generator.

        Args:
            widths: of the stages; the stem has the first.
            in_channels: C.
            strides: convolutions of stride 2 in the stem; each halves the side.
            tokens: whether it gives the places too.
        """
        super().__init__()
        stem: list[nn.Module] = []
        for number in range(strides):
            before = widths[0] if number else in_channels
            stem += [
                nn.Conv2d(before, widths[0], 3, 2, padding=1, bias=False),
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(),
            ]
        self.stem = nn.Sequential(*stem)
        stages: list[nn.Module] = []
        for number, (before, after) in enumerate(pairwise([widths[0], *widths])):
            stages.append(Block(before, after, 2 if number else 1))
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm1d(widths[-1], affine=False)
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        places: Tensor = self.stages(self.stem(x))
        # under autocast too in the type of the statistics
        mean = places.mean((2, 3), dtype=self.norm.running_mean.dtype)  # type: ignore[union-attr]
        feature: Tensor = self.norm(mean)
        if not self.tokens:
            return feature
        return torch.cat([feature[:, None], places.flatten(2).mT.to(feature.dtype)], 1)


def small(in_channels: int = 3) -> Residual:
    """1.2 million parameters, D = 256: for images of 32 to 64 pixels."""
    return Residual((64, 128, 256), in_channels)


def small_map(in_channels: int = 3) -> Residual:
    """As `small`, with patches of 8 pixels (model.patch_size=8) for pictures of what it sees; none
    can be hidden, so iBOT has no use for them.
    """
    return Residual((64, 128, 256), in_channels, tokens=True)


def photos(in_channels: int = 3) -> Residual:
    """1.3 million parameters, D = 256: for images of 64 to 128 pixels. Its stem makes a quarter of
    their side, so an image of 96 pixels costs what one of 48 costs with `small`.
    """
    return Residual((64, 128, 256), in_channels, strides=2)
