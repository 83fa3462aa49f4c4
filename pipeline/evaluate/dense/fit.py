"""How heads on frozen patches are fitted: the same batches and steps for the same seed.

Shapes: n images, h x w patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

UPSAMPLING = 4  # of patches to where a loss is computed (DINOv2, section 7.4: depth)
UNKNOWN_CLASS = 255  # of a pixel in masks of class numbers


@dataclass(frozen=True)
class Schedule:
    """AdamW with a cosine from `lr` to 0.

    Attributes:
        steps: of the optimiser.
        batch: images of a step.
        lr: highest learning rate.
        weight_decay: of AdamW.
        warmup: part of the steps in which the rate rises.
        seed: of the batches and of weights that are drawn.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 1e-3
    warmup: float = 0.05
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Of everything that is drawn."""
        return torch.Generator().manual_seed(self.seed)


def fit(
    weights: Sequence[Tensor],
    images: int,
    loss: Callable[[Tensor], Tensor],
    schedule: Schedule,
    generator: torch.Generator,
) -> None:
    """Fits weights in place.

    Args:
        weights: leaves that need gradients.
        images: n.
        loss: of rows int64 [batch] of the images.
        schedule: of the rate and the batches.
        generator: of the order of images; each image once in a pass.
    """
    optimizer = torch.optim.AdamW(
        weights, lr=schedule.lr, weight_decay=schedule.weight_decay, betas=(0.9, 0.999)
    )
    order = torch.empty(0, dtype=torch.int64)
    batch = min(schedule.batch, images)
    for step in range(schedule.steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(images, generator=generator)])
        rows, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr * _share(step, schedule)
        optimizer.zero_grad()
        loss(rows).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for one in weights:
        one.requires_grad_(False)


def _parts(tokens: Tensor, rows: int) -> Iterator[Tensor]:
    return (tokens[at : at + rows] for at in range(0, len(tokens), rows))


def _share(step: int, schedule: Schedule) -> float:
    warmup = max(1, round(schedule.warmup * schedule.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, schedule.steps - warmup))


def sampled(values: Tensor, side: int, unknown: int = 0) -> Tensor:
    """A mask or a depth map [H, W] at a grid, float32 [1, side, side]: the pixel in the middle of
    each cell, for a mean of two classes is neither. Where it is unknown, which it mostly is in
    depths of few points, the first known pixel of the cell.

    Args:
        values: of each pixel.
        side: of the grid.
        unknown: the value of pixels that are not known.
    """
    x = values[None].float()
    middle: Tensor = F.interpolate(x[None], (side, side), mode="nearest-exact")[0]
    place = torch.arange(x.numel(), dtype=torch.float64, device=x.device).view(x.shape)
    last = float(x.numel())
    first = -F.adaptive_max_pool2d(-torch.where(x == unknown, last, place), (side, side))
    known = x.flatten()[first.clamp(max=last - 1).long()]
    return torch.where((middle == unknown) & (first < last), known, middle)


def moments(tokens: Tensor, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature over all patches [n, …, D], float32 [D] each.

    These are the statistics that a batch norm without affine weights ends with. A feature that is
    constant has the deviation 1.
    """
    width = tokens.shape[-1]
    total = torch.zeros(width, dtype=torch.float64, device=tokens.device)
    for part in _parts(tokens, rows):
        total += part.reshape(-1, width).double().sum(0)
    count = tokens.numel() / width
    mean = total / count
    squares = torch.zeros_like(total)
    for part in _parts(tokens, rows):
        squares += (part.reshape(-1, width).double() - mean).square().sum(0)
    deviation = (squares / count).sqrt()
    constant = deviation < 1e-6 * (1 + mean.abs())
    return mean.float(), torch.where(constant, torch.ones_like(deviation), deviation).float()
