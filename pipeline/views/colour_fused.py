"""Colour jitter of a whole batch in the form that a compiler turns into two passes over the pixels.

Every crop has its own order of the four operations, and no shape may depend on it. Done position
by position that means all four operations four times, and a mean over the crop each time. But each
operation comes once, and contrast is the only one that looks at more than its own pixel, hue the
only costly one. So the sequence is unrolled around these two, and each step is neutral for the
crops that do not take it:

    run, hue, run, contrast, run, hue, run        (run = brightness, saturation, brightness)

with hue left of contrast for some crops and right of it for the others. Channels are separate
tensors, so that all of it has one shape and stays in registers from one mean to the next.

Shapes: N crops, planes of H x W pixels with values in [0, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.views.colour import luma, rotate_hue


class Jitter(NamedTuple):
    """A number [N] for each operation: its strength, or its position 0..3."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor


def jitter_planes(planes: Sequence[Tensor], strength: Jitter, position: Jitter) -> list[Tensor]:
    """Brightness, contrast, saturation and hue of each crop in its own order.

    Args:
        planes: one [N, H, W] per channel; saturation and hue need three.
        strength: factors (1 changes nothing) and turns of the colour circle (0 changes nothing).
        position: integers 0..3, all different for each crop.

    Returns:
        The changed planes.
    """
    hue, contrast = position.hue, position.contrast
    first, last = torch.minimum(hue, contrast), torch.maximum(hue, contrast)

    def run(planes: Sequence[Tensor], after: Tensor, before: Tensor) -> list[Tensor]:
        return _run(planes, after, before, strength, position)

    changed = run(planes, torch.full_like(first, -1), first)
    changed = _hue(changed, hue < contrast, strength.hue)
    changed = run(changed, hue, contrast)
    changed = _contrast(changed, strength.contrast)
    changed = run(changed, contrast, hue)
    changed = _hue(changed, contrast < hue, strength.hue)
    return run(changed, last, torch.full_like(last, 4))


def _run(
    planes: Sequence[Tensor], after: Tensor, before: Tensor, strength: Jitter, position: Jitter
) -> list[Tensor]:
    """Brightness and saturation for the crops where they come between two positions."""

    def factor(values: Tensor, at: Tensor) -> Tensor:
        return torch.where((after < at) & (at < before), values, 1.0)

    brightness = factor(strength.brightness, position.brightness)
    saturation = factor(strength.saturation, position.saturation)[:, None, None]
    first = position.brightness < position.saturation
    changed = _brightness(planes, torch.where(first, brightness, 1.0))
    if len(planes) == 3:
        other = (1 - saturation) * luma(changed)
        changed = [(saturation * plane + other).clamp(0, 1) for plane in changed]
    return _brightness(changed, torch.where(first, 1.0, brightness))


def _brightness(planes: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    return [(factor[:, None, None] * plane).clamp(0, 1) for plane in planes]


def _contrast(planes: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    mean = luma(planes).mean((1, 2))
    f, other = factor[:, None, None], ((1 - factor) * mean)[:, None, None]
    return [(f * plane + other).clamp(0, 1) for plane in planes]


def _hue(planes: Sequence[Tensor], here: Tensor, turn: Tensor) -> list[Tensor]:
    if len(planes) != 3:
        return list(planes)
    chosen = (here & (turn != 0))[:, None, None]
    turned = rotate_hue(planes, turn)
    return [torch.where(chosen, new, old) for new, old in zip(turned, planes, strict=True)]
