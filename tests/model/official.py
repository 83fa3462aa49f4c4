"""Weights in dinov2's official format, made up: names and shapes written out by hand, values drawn.

Independent of our model, so that it can be tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# width, depth, heads, feed-forward (hub names dinov2_vit{s,b,l,g}14 and their _reg4 versions)
OFFICIAL = {
    "S": (384, 12, 6, "mlp"),
    "B": (768, 12, 12, "mlp"),
    "L": (1024, 24, 16, "mlp"),
    "g": (1536, 40, 24, "swiglu"),
}


def shapes(
    width: int,
    depth: int,
    ffn: str = "mlp",
    registers: int = 0,
    patch: int = 14,
    grid: int = 37,
    channels: int = 3,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released file."""
    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        expected["register_tokens"] = (1, registers, width)
    hidden = 4096 if (ffn, width) == ("swiglu", 1536) else (int(4 * width * 2 / 3) + 7) // 8 * 8
    layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if ffn == "swiglu":
        layers |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
    else:
        layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            expected[f"blocks.{i}.{norm}.weight"] = expected[f"blocks.{i}.{norm}.bias"] = (width,)
        for name, shape in layers.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
        expected[f"blocks.{i}.ls1.gamma"] = expected[f"blocks.{i}.ls2.gamma"] = (width,)
    return expected


def draw(names: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Values with which every tensor matters: scales near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.empty(shape).normal_(
            1.0 if ("norm" in name and name.endswith("weight")) or "gamma" in name else 0.0,
            0.2 if len(shape) == 1 else 0.05,
            generator=generator,
        )
        for name, shape in names.items()
    }
