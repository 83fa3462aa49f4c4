"""Colour operations and blur on batches of float images, each crop with its own strength.

They compute what `torchvision.transforms.v2.functional` computes for one image, on all crops at
once: no loop over crops, and nothing that makes the host wait for the device.

Shapes: N crops, C channels, H x W pixels, values in [0, 1]; one factor [N] per crop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2 as torchvision rounds it
HUE_CENTRES = (0, 2, 4)  # of red, green and blue, in sixths of the circle
NO_CHROMA = 1e-30  # divides the zero of a grey pixel, which has no hue and keeps its value
_OFF_SIGMA = 0.05  # pixels; exp(-200) is 0 in float32, so that kernel changes nothing


def per_crop(values: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, 1]."""
    return values[:, None, None, None]


def luma(planes: Sequence[Tensor]) -> Tensor:
    """Luma of three channels, the mean of any other number; channels as separate tensors."""
    weights = LUMA if len(planes) == 3 else (1 / len(planes),) * len(planes)
    grey = weights[0] * planes[0]
    for weight, plane in zip(weights[1:], planes[1:], strict=True):
        grey = grey + weight * plane
    return grey


def luminance(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H, W], see `luma`."""
    return luma(x.unbind(1))[:, None]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """[N, C, H, W] in [0, 1] and a factor [N] -> the same shape."""
    return (per_crop(factor) * x).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luminance of each crop: [N, C, H, W] in [0, 1], factor [N]."""
    f = per_crop(factor)
    return (f * x).add_((1 - f) * luminance(x).mean((2, 3), keepdim=True)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luminance of each pixel: [N, C, H, W] in [0, 1], factor [N]."""
    f = per_crop(factor)
    return (f * x).add_((1 - f) * luminance(x)).clamp_(0, 1)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` [N] (1 = the whole circle) to the hue of [N, 3, H, W] in [0, 1]."""
    return torch.stack(rotate_hue(x.unbind(1), turn), 1)


def rotate_hue(planes: Sequence[Tensor], turn: Tensor) -> list[Tensor]:
    """Add `turn` [N] (1 = the whole circle) to the hue of red, green and blue [N, H, W].

    The hexagon of HSV without its sectors. With t the largest and b the smallest channel,
    c = t - b and hues in sixths, the distance of a hue from red is 1 + (G + B - R - b) / c in
    [0, 3], on green's side where G > B; and a channel is t - c (d - 1) with d its distance from
    the hue, clamped to [1, 2].
    """
    red, green, blue = planes
    top = torch.maximum(torch.maximum(red, green), blue)
    bottom = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - bottom
    from_red = (green + blue - red - bottom) / chroma.clamp(min=NO_CHROMA) + 1
    hue = torch.copysign(from_red, green - blue)
    turned = []
    for centre in HUE_CENTRES:
        # Hues are in [-3, 3]. Shifted by an offset in [-3, 3) and folded twice, each becomes its
        # distance from the centre of this channel.
        offset = (6 * turn - centre).remainder(6) - 3
        distance = ((hue + offset[:, None, None]).abs() - 3).abs()
        turned.append(top - chroma * (distance.clamp(1, 2) - 1))
    return turned


def blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Gaussian blur of [N, C, H, W] with a sigma [N] for each crop (pixels; 0 changes nothing).

    Separable, borders reflected as in torchvision's `gaussian_blur`; H and W must exceed taps // 2.
    """
    radius = taps // 2
    distance = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=_OFF_SIGMA)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    along = _convolve if on_cpu else _add_shifted
    for axis in (2, 3):
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        x = along(functional.pad(x, pad, mode="reflect"), weights, axis)
    return x


def _convolve(padded: Tensor, weights: Tensor, axis: int) -> Tensor:
    """One group per crop and channel: three to ten times faster than shifting on the CPU."""
    count, channels, height, width = padded.shape
    kernel = weights.repeat_interleave(channels, 0)
    kernel = kernel[:, None, :, None] if axis == 2 else kernel[:, None, None, :]
    with torch.autocast("cpu", enabled=False):
        flat = padded.view(1, count * channels, height, width)
        out = functional.conv2d(flat, kernel, groups=count * channels)
    return out.view(count, channels, *out.shape[2:])


def _add_shifted(padded: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Elementwise only: compilers fuse it, and neither autocast nor TF32 touches it."""
    radius = weights.shape[1] // 2
    size = padded.shape[axis] - 2 * radius
    out = per_crop(weights[:, radius]) * padded.narrow(axis, radius, size)
    for i in range(radius):  # the kernel is symmetric: two shifts share a weight
        pair = padded.narrow(axis, i, size) + padded.narrow(axis, 2 * radius - i, size)
        out = torch.addcmul(out, per_crop(weights[:, i]), pair)
    return out
