"""Backbones for tests: one drawn at random, and one that sees nothing but colours."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.vit import BackboneSpec, VisionTransformer

SPEC = BackboneSpec(
    image_size=28, patch_size=7, width=48, depth=3, heads=3, registers=2, layer_scale=1.0
)


def drawn(spec: BackboneSpec = SPEC, scale: float = 0.2) -> VisionTransformer:
    """A backbone whose tokens differ: every parameter is drawn."""
    generator = torch.Generator().manual_seed(5)
    backbone = spec.build()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return backbone


def images(n: int, height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Noise, float32 `[n, channels, height, width]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, height, width, generator=generator)


class Colours(nn.Module):
    """A patch's token is its mean colour: what a backbone for made shapes needs to tell."""

    def __init__(self, patch_size: int = 8) -> None:
        super().__init__()
        self.patch_size, self.has_patches, self.width = patch_size, True, 3

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """`[B, 3, H, W]` to tokens `[B, P, 3]`."""
        tokens = F.avg_pool2d(x, self.patch_size).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": tokens.mean(1), "x_norm_patchtokens": tokens}
