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
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

TRAIN, INFER = 3, 1  # products of a linear layer: with backward, without


def convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **_: Any
) -> int:
    """Of a convolution's backward pass, from shapes: once forward for each gradient that is asked
    for. torch's own count leaves out that channels are in groups: 40 times too many for depthwise
    networks.
    """
    transposed, gradients = bool(others[4]), others[7]
    once = int(conv_flop_count(list(x), list(weight), list(grad), transposed))
    return once * int(sum(gradients[:2]))


CORRECTED = {torch.ops.aten.convolution_backward: convolution_backward}


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
    """Of our ViT on the groups of one micro batch: forward, and backward when training, as far
    down as something learns.
    """
    width, patch = backbone.width, backbone.patch_size
    blocks = list(backbone.blocks)
    rate = backbone.drop_path if training else 0.0
    back = blocks[first_learning(backbone) :] if training else []  # blocks that gradients reach
    embedding = _weights(backbone.patch_embed)
    total = 0.0
    for views, side in groups:
        tokens = vit_tokens(backbone, side)
        patches = views * (side // patch) ** 2
        total += 2 * patches * embedding
        if training:
            total += 2 * patches * _weights(backbone.patch_embed, learning=True)
        rows = kept_views(views, rate) * tokens
        # the scores, and the sum of the values by them
        attention = 2 * 2 * rows * tokens * width
        total += (len(blocks) + 2 * len(back)) * attention
        # forward; gradients of the tokens; gradients of the weights that learn
        for part, learning in ((blocks, False), (back, False), (back, True)):
            layers = [layer for block in part for layer in (block.attn, block.mlp)]
            total += 2 * rows * sum(_weights(layer, learning) for layer in layers)
    return total


def first_learning(backbone: Any) -> int:
    """The first block of our ViT that a gradient reaches: 0 where something before the blocks
    learns, their number where no block does.
    """
    blocks = list(backbone.blocks)
    inside = {id(p) for block in blocks for p in block.parameters()}
    inside |= {id(p) for p in backbone.norm.parameters()}
    if any(p.requires_grad for p in backbone.parameters() if id(p) not in inside):
        return 0
    learns = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    return learns.index(True) if any(learns) else len(blocks)


def measured_flops(
    backbone: nn.Module, groups: Sequence[Group], channels: int, *, training: bool
) -> float:
    """Of any backbone, counted on a copy without memory with two views of each size."""
    probe = copy.deepcopy(backbone).to("meta").train(training)
    if not training:
        probe.requires_grad_(False)
    total = 0.0
    for views, side in groups:
        counter = FlopCounterMode(display=False, custom_mapping=CORRECTED)
        # plain attention: a fused one computes its scores again in the backward pass
        with counter, torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
            with torch.set_grad_enabled(training):
                out = probe(torch.zeros(2, channels, side, side))
            if out.requires_grad:
                out.sum().backward()
        total += counter.get_total_flops() / 2 * views
    return total


def head_flops(head: nn.Module | None, rows: float, *, training: bool) -> float:
    """Of a head on so many rows: its layers and its prototypes."""
    return 2 * rows * _weights(head) * (TRAIN if training else INFER) if head else 0.0


def _weights(module: nn.Module, learning: bool = False) -> int:
    """Numbers in the matrices (and kernels) of a module; a column of lengths is no matrix. All of
    them, or those that learn.
    """
    matrices = [p for p in module.parameters() if p.dim() > 1 and p.numel() > len(p)]
    return sum(p.numel() for p in matrices if p.requires_grad or not learning)
