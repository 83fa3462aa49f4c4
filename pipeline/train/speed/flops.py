"""The floating-point operations of a step that it cannot do without, counted from its shapes.

A multiply-add is 2. Counted are matrix products and attention, forward and backward: what FLOP/s
of a device are spent on. Backward needs two products for each one of forward, the gradient of the
input and that of the weights; the images themselves need no gradient. Not counted is what a device
does beside that: attention and blocks that are computed again in the backward pass, and rows that
fill masked patches up to a fixed number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TRAIN, INFER = 3, 1  # products of a linear layer: with backward, without


class Group(NamedTuple):
    """The views of one crop size in a micro batch."""

    views: int
    side: int  # pixels


def kept_views(views: int, rate: float) -> int:
    """Views of a group that a branch of a block computes under stochastic depth: see
    `model.block.draw_subsets`.
    """
    return max(int(views * (1 - rate)), 1) if rate > 0 else views


def vit_tokens(backbone: Any, side: int) -> int:
    """Tokens of a view of `side` pixels in our ViT, CLS and registers included."""
    patch, registers = backbone.patch_size, backbone.registers
    return int((side // patch) ** 2 + 1 + registers)


def vit_flops(backbone: Any, groups: Sequence[Group], *, training: bool) -> float:
    """Of our ViT on the groups of one micro batch: forward, and backward when training."""
    blocks, width, patch = backbone.blocks, backbone.width, backbone.patch_size
    rate = backbone.drop_path if training else 0.0
    times = TRAIN if training else INFER
    total = 0.0
    for views, side in groups:
        tokens = vit_tokens(backbone, side)
        patches = views * (side // patch) ** 2
        total += 2 * patches * _weights(backbone.patch_embed) * (2 if training else 1)
        rows = kept_views(views, rate) * tokens
        # the scores, and the sum of the values by them
        attention = 2 * 2 * rows * tokens * width
        linear = 2 * rows * sum(_weights(block.attn) + _weights(block.mlp) for block in blocks)
        total += times * (len(blocks) * attention + linear)
    return total


def measured_flops(
    backbone: nn.Module, groups: Sequence[Group], channels: int, *, training: bool
) -> float:
    """Of any backbone, counted on a copy without memory with two views of each size."""
    probe = copy.deepcopy(backbone).to("meta").requires_grad_(training).train(training)
    total = 0.0
    for views, side in groups:
        counter = FlopCounterMode(display=False)
        # plain attention: a fused one computes its scores again in the backward pass
        with counter, torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
            with torch.set_grad_enabled(training):
                out = probe(torch.zeros(2, channels, side, side))
            if training:
                out.sum().backward()
        total += counter.get_total_flops() / 2 * views
    return total


def head_flops(head: nn.Module | None, rows: float, *, training: bool) -> float:
    """Of a head on so many rows: its layers and its prototypes."""
    return 2 * rows * _weights(head) * (TRAIN if training else INFER) if head else 0.0


def _weights(module: nn.Module) -> int:
    """Numbers in the matrices (and kernels) of a module; a column of lengths is no matrix."""
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and p.numel() > len(p))
