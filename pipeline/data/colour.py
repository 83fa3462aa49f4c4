"""Colour operations and blur on batches of float images, each crop with its own strength.

They compute what `torchvision.transforms.v2.functional` computes for one image, on all crops at
once: no loop over crops, and nothing that makes the host wait for the device.

Shapes: N crops, C channels, H x W pixels, values in [0, 1]; one factor [N] per crop.
"""

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


def luminance(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H, W]: luma of three channels, the mean of any other number."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    grey: Tensor = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return grey


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


def rotate_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` [N] (1 = the whole circle) to the hue of [N, 3, H, W] in [0, 1].

    The hexagon of HSV without its sectors. With t the largest and b the smallest channel,
    c = t - b and hues in sixths, the distance of a hue from red is 1 + (G + B - R - b) / c in
    [0, 3], on green's side where G > B; and a channel is t - c (d - 1) with d its distance from
    the hue, clamped to [1, 2].
    """
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    top = torch.maximum(torch.maximum(red, green), blue)
    bottom = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - bottom
    from_red = (green + blue - red - bottom) / chroma.clamp(min=NO_CHROMA) + 1
    hue = torch.copysign(from_red, green - blue)
    # From -3 for a hue as far as it gets on one side: folded twice, any hue in [-3, 3] then gives
    # its distance from the centre of a channel.
    centres = torch.arange(0, 6, 2, device=x.device)
    offsets = (6 * turn[:, None] - centres).remainder(6) - 3
    distance = ((hue + offsets[:, :, None, None]).abs() - 3).abs()
    return torch.addcmul(top + chroma, chroma, distance.clamp(1, 2), value=-1)


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
