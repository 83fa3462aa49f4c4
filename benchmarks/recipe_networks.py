"""The networks that `recipe_search.py` tries on small pictures: pictures to one feature each.

B pictures, C channels, S side in pixels, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.block import Block


def conv(before: int, after: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    layer = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return nn.Sequential(layer, nn.BatchNorm2d(after))


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a short cut (He et al. 2016, "basic block")."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(before, after, stride), conv(after, after)
        same = before == after and stride == 1
        self.short = nn.Identity() if same else conv(before, after, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.second(F.relu(self.first(x))), inplace=True)


class ConvNet(nn.Module):
    """`[B, C, S, S]` to `[B, widths[-1]]`: a 3 x 3 stem, residual stages, the mean over places."""

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        blocks: Sequence[int] = (1, 1, 1),
        stem_stride: int = 2,
        stem_size: int = 3,
        feature_norm: bool = True,
    ) -> None:
        """A stem of stride -2 puts each 2 x 2 pixels into one place first, then has stride 1."""
        super().__init__()
        self.unshuffle = max(1, -stem_stride)
        self.stem = conv(3 * self.unshuffle**2, widths[0], max(1, stem_stride), stem_size)
        stages: list[nn.Module] = []
        before = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stages.append(Residual(before, width, 2 if stage and not block else 1))
                before = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm1d(before, affine=False) if feature_norm else nn.Identity()
        self.width = before

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.unshuffle) if self.unshuffle > 1 else x
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stages(F.relu(self.stem(x), inplace=True))
        return self.norm(x.float().mean((2, 3)))


class ConvVit(nn.Module):
    """`[B, C, S, S]` to `[B, D]`: convolutions of stride 2 with BatchNorm (Xiao et al. 2021, "Early
    convolutions help transformers see better"), then blocks of a ViT, then the mean over patches.
    """

    def __init__(
        self,
        stem: Sequence[int] = (64, 128),
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1.0,
        side: int = 8,
        feature_norm: bool = True,
        residual: bool = False,
    ) -> None:
        """`side`: patches in a row of a picture, for the table of positions."""
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, after in enumerate(stem):
            if residual and number:
                layers.append(Residual(before, after, 2))
            else:
                layers += [conv(before, after, 2), nn.ReLU(inplace=True)]
            before = after
        layers.append(nn.Conv2d(before, width, 1))
        self.stem = nn.Sequential(*layers)
        self.position = nn.Parameter(torch.zeros(1, width, side, side))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, "mlp", layer_scale) for _ in range(depth)
        )
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.norm: nn.Module = nn.LayerNorm(width, eps=1e-6)
        self.feature = nn.BatchNorm1d(width, affine=False) if feature_norm else nn.Identity()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        place = self.position
        if x.shape[-2:] != place.shape[-2:]:
            place = F.interpolate(place, x.shape[-2:], mode="bilinear", align_corners=False)
        x = (x + place.to(x.dtype)).flatten(2).transpose(1, 2)
        views, tokens, width = x.shape
        x = x.reshape(views * tokens, width)
        for block in self.blocks:
            x = block(x, ((views, tokens),))
        return self.feature(self.norm(x).view(views, tokens, width).float().mean(1))
