"""Colour operations and blur on one float image in memory of the CPU, in place.

The same formulas as `colour`, for the case that a crop fits in the cache of a core: factors are
plain numbers, nothing is written that the next operation does not need, and what a factor cannot
cause is not done (a factor of at most 1 needs no clamp).

Shapes: C channels, H x W pixels, float32 in [0, 1]; each function changes `x` [C, H, W] and returns
nothing.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.views.colour import HUE_CENTRES, LUMA, NO_CHROMA

_NO_WEIGHT = 1e-9  # of the sum of a kernel; eight of them do not reach half a unit of float32


def brightness_(x: Tensor, factor: float) -> None:
    """Multiply; the factor is not negative."""
    x.mul_(factor)
    if factor > 1:
        x.clamp_max_(1)


def contrast_(x: Tensor, factor: float) -> None:
    """Blend with the mean luminance."""
    means = x.mean((1, 2)).tolist()
    luma = LUMA if len(means) == 3 else (1 / len(means),) * len(means)
    mean = sum(weight * value for weight, value in zip(luma, means, strict=True))
    x.mul_(factor).add_((1 - factor) * mean)
    if factor > 1:
        x.clamp_(0, 1)


def saturation_(x: Tensor, factor: float) -> None:
    """Blend with the luminance of each pixel; three channels."""
    torch.add(_grey(x, 1 - factor), x, alpha=factor, out=x)
    if factor > 1:
        x.clamp_(0, 1)


def hue_(x: Tensor, turn: float) -> None:
    """Add `turn` (1 = the whole circle) to the hue; three channels. See `colour.rotate_hue`."""
    red, green, blue = x
    top = torch.maximum(red, green)
    torch.maximum(top, blue, out=top)
    bottom = torch.minimum(red, green)
    torch.minimum(bottom, blue, out=bottom)
    hue = torch.add(green, blue).sub_(red).sub_(bottom)
    chroma = torch.sub(top, bottom, out=bottom)
    hue.div_(chroma.clamp_min(NO_CHROMA)).add_(1).copysign_(green - blue)
    for plane, centre in zip(x, HUE_CENTRES, strict=True):
        torch.add(hue, (6 * turn - centre) % 6 - 3, out=plane)
    x.abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(top.add_(chroma), chroma, x, value=-1, out=x)


def greyscale_(x: Tensor) -> None:
    """The luminance in all three channels."""
    x.copy_(_grey(x, 1.0).expand_as(x))


def blur_(x: Tensor, sigma: float, taps: int) -> None:
    """Gaussian blur, sigma in pixels, borders reflected; H and W must exceed taps // 2."""
    weights = _half_kernel(sigma, taps // 2)
    radius = len(weights) - 1
    if not radius:
        return
    height, width = x.shape[1:]
    padded = functional.pad(x, (radius,) * 4, mode="reflect")
    rows = torch.empty((len(x), height, width + 2 * radius))
    _add_shifted(padded, weights, 1, rows)
    _add_shifted(rows, weights, 2, x)


def solarize_(x: Tensor, threshold: float) -> None:
    """Invert values from the threshold on."""
    # lerp gives either end exactly for the weights 0 and 1, and is five times as fast as where.
    torch.lerp(x, 1 - x, x.clone().ge_(threshold), out=x)


def _grey(x: Tensor, scale: float) -> Tensor:
    red, green, blue = (scale * weight for weight in LUMA)
    return (x[0] * red).add_(x[1], alpha=green).add_(x[2], alpha=blue)


def _half_kernel(sigma: float, radius: int) -> list[float]:
    """Weights of the distances 0, 1, ...; the far ones that cannot be seen are left out."""
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(radius + 1)]
    total = 2 * sum(weights) - weights[0]
    return [weight / total for weight in weights if weight > _NO_WEIGHT * total]


def _add_shifted(padded: Tensor, weights: list[float], axis: int, out: Tensor) -> None:
    radius, size = len(weights) - 1, out.shape[axis]
    torch.mul(padded.narrow(axis, radius, size), weights[0], out=out)
    for distance, weight in enumerate(weights[1:], 1):
        for start in (radius - distance, radius + distance):
            out.add_(padded.narrow(axis, start, size), alpha=weight)
