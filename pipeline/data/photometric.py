"""Colour, blur and solarize, drawn as numbers on the CPU and applied in batches on any device.

`draw_photometric` turns uniform numbers into one row of parameters per crop; the rows travel with
the uint8 crops. `apply_photometric` does the pixel work where the crops are. Order of DINOv2's
`data/augmentations.py`: colour jitter (four operations in a drawn order), greyscale, blur,
solarize, normalise. The operations are those of torchvision on float images in [0, 1], without the
rounding to 8 bits between operations that the Pillow path has.

Three of the four jitter operations are the same formula with other numbers, where grey(x) is the
luminance of each pixel and every result is clamped to [0, 1]:

    brightness  f x
    contrast    f x + (1 - f) mean(grey(x))
    saturation  f x + (1 - f) grey(x)

so one position of the order costs one such blend and, for the crops that ask for it, a hue
rotation.

Channels that are not three are not colours: their grey is the mean of all channels, alpha counts as
any other, and `skipped_operations` are left out. What is drawn does not depend on the channels.

Shapes: N crops, C channels, H x W pixels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    blur,
    luminance,
    per_crop,
    rotate_hue,
)
from pipeline.data.colour_crop import (
    blur_,
    brightness_,
    contrast_,
    greyscale_,
    hue_,
    saturation_,
    solarize_,
)

# Columns of the parameters.
BRIGHTNESS = 0  # factor, 1 changes nothing
CONTRAST = 1  # factor, 1 changes nothing
SATURATION = 2  # factor, 1 changes nothing
HUE = 3  # turn of the colour circle in [-0.5, 0.5], 0 changes nothing
ORDER = 4  # row of ORDERS, 0..23
JITTER = 5  # 1 where the four columns above apply
GREY = 6  # 1 where the crop loses its colour
BLUR_SIGMA = 7  # pixels, 0 = no blur
SOLARIZE = 8  # 1 where bright pixels are inverted
PARAMS = 9

PHOTOMETRIC_DRAWS = 10  # one for each column and a second one for the blur (whether, how much)

# Entry [row][position] is the column of the operation done there.
ORDERS: tuple[tuple[int, ...], ...] = tuple(itertools.permutations(range(4)))

RGB = 3  # channels in which hue, saturation and greyscale mean something

NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # of the first four columns: changes nothing


@dataclass(frozen=True)
class PhotometricSpec:
    """Strengths and probabilities; triples are for (first global, second global, local) crops."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_probability: float = 0.8
    greyscale_probability: float = 0.2
    # The paper says (1, .1, .5). The released models were trained with (0, .9, .5): GaussianBlur
    # hands 1 - p to RandomApply (measured, golden/aug/op_probabilities.json).
    blur_probability: tuple[float, float, float] = (0.0, 0.9, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int = 9  # taps, odd
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    solarize_threshold: int = 128  # of 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def draw_photometric(u: npt.NDArray[np.float64], spec: PhotometricSpec) -> npt.NDArray[np.float32]:
    """Turn uniform numbers into parameters.

    Args:
        u: float64 [..., V, PHOTOMETRIC_DRAWS] in [0, 1); views 0 and 1 are the global crops.
        spec: strengths and probabilities.

    Returns:
        float32 [..., V, PARAMS], columns as named at the top of this file.
    """
    views = np.minimum(np.arange(u.shape[-2]), 2)
    out = np.zeros((*u.shape[:-1], PARAMS), np.float32)
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    for column, strength in enumerate(strengths):
        low, high = max(0.0, 1.0 - strength), 1.0 + strength  # torchvision ColorJitter
        out[..., column] = low + (high - low) * u[..., column]
    out[..., HUE] = spec.hue * (2 * u[..., HUE] - 1)
    out[..., ORDER] = np.floor(u[..., ORDER] * len(ORDERS))
    out[..., JITTER] = u[..., JITTER] < spec.jitter_probability
    out[..., GREY] = u[..., GREY] < spec.greyscale_probability
    low, high = spec.blur_sigma
    blurred = u[..., 7] < np.asarray(spec.blur_probability)[views]
    out[..., BLUR_SIGMA] = np.where(blurred, low + (high - low) * u[..., 8], 0.0)
    out[..., SOLARIZE] = u[..., 9] < np.asarray(spec.solarize_probability)[views]
    return out


def skipped_operations(channels: int) -> tuple[str, ...]:
    """Names of the operations that images of so many channels do not get: those of colours."""
    return () if channels == RGB else ("saturation", "hue", "greyscale")


def apply_photometric(
    crops: Tensor,
    params: Tensor,
    spec: PhotometricSpec,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply the drawn parameters to crops of one size and normalise.

    The arithmetic is float32 whatever `dtype` is. With the parameters on the CPU each operation
    runs on the crops that ask for it only (the crops may be anywhere; nothing waits for the
    device). With the parameters on an accelerator, or under `torch.compile`, every operation runs
    on all crops with neutral numbers where it is off: more arithmetic, fixed shapes, and fit to be
    fused.

    Args:
        crops: uint8 [N, H, W, C].
        params: float32 [N, PARAMS] from `draw_photometric`.
        spec: the one the parameters were drawn with.
        dtype: of the result.

    Returns:
        [N, C, H, W] contiguous, normalised by spec.mean and spec.std.
    """
    if params.device.type != "cpu" or torch.compiler.is_compiling():
        return _normalised(_apply_to_all(_floats(crops), params.to(crops.device), spec), spec, dtype)
    if crops.device.type != "cpu":
        return _normalised(_apply_to_some(_floats(crops), params, spec), spec, dtype)
    return _apply_to_each(crops, params, spec, dtype)


def _floats(crops: Tensor) -> Tensor:
    # Planes and not interleaved pixels: every operation below works on whole channels.
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255)


def _normalised(x: Tensor, spec: PhotometricSpec, dtype: torch.dtype) -> Tensor:
    mean, std = (_constant(v, torch.float32, x)[:, None, None] for v in (spec.mean, spec.std))
    return x.sub_(mean).div_(std).to(dtype)


def _apply_to_all(x: Tensor, params: Tensor, spec: PhotometricSpec) -> Tensor:
    """No shape depends on the parameters."""
    coloured = x.shape[1] == RGB
    jitter = params[:, JITTER] > 0
    orders = _constant(ORDERS, torch.int64, x)[params[:, ORDER].long()]
    for position in range(4):
        column = torch.where(jitter, orders[:, position], -1)
        factor = params.gather(1, column.clamp(min=0)[:, None])[:, 0]
        if coloured:
            x = _blend(x, column, factor)
            x = torch.where(per_crop(column == HUE), rotate_hue(x, factor), x)
        else:
            x = _blend(x, torch.where(column == SATURATION, -1, column), factor)
    if coloured:
        x = torch.where(per_crop(params[:, GREY] > 0), luminance(x), x)
    x = blur(x, params[:, BLUR_SIGMA], spec.blur_kernel)
    solarized = per_crop(params[:, SOLARIZE] > 0) & (x >= spec.solarize_threshold / 255)
    return torch.where(solarized, 1 - x, x)


def _apply_to_some(x: Tensor, params: Tensor, spec: PhotometricSpec) -> Tensor:
    """Each operation on the crops that ask for it; changes x in place."""
    coloured = x.shape[1] == RGB
    jitter = params[:, JITTER] > 0
    orders = torch.tensor(ORDERS)[params[:, ORDER].long()]
    for position in range(4):
        column = torch.where(jitter, orders[:, position], -1)
        factor = params.gather(1, column.clamp(min=0)[:, None])[:, 0]
        for operation in range(4 if coloured else SATURATION):  # hue is behind saturation
            chosen = (column == operation) & (factor != NEUTRAL[operation])
            rows = _rows(chosen, x)
            if rows is None:
                continue
            f = factor[chosen].to(x.device, non_blocking=True)
            x[rows] = _OPERATIONS[operation](x[rows], f)
    if coloured and (rows := _rows(params[:, GREY] > 0, x)) is not None:
        x[rows] = luminance(x[rows]).expand(-1, x.shape[1], -1, -1)
    blurred = params[:, BLUR_SIGMA] > 0
    if (rows := _rows(blurred, x)) is not None:
        sigma = params[blurred, BLUR_SIGMA].to(x.device, non_blocking=True)
        x[rows] = blur(x[rows], sigma, spec.blur_kernel)
    if (rows := _rows(params[:, SOLARIZE] > 0, x)) is not None:
        part = x[rows]
        x[rows] = torch.where(part >= spec.solarize_threshold / 255, 1 - part, part)
    return x


def _apply_to_each(
    crops: Tensor, params: Tensor, spec: PhotometricSpec, dtype: torch.dtype
) -> Tensor:
    """One crop after the other, each staying in the cache from the first operation to the last."""
    count, height, width, channels = crops.shape
    out = torch.empty((count, channels, height, width), dtype=dtype)
    buffer = torch.empty(out.shape[1:]) if dtype != torch.float32 else None
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    for crop, row, result in zip(crops, params.tolist(), out, strict=True):
        x = result if buffer is None else buffer
        x.copy_(crop.permute(2, 0, 1)).div_(255)
        if row[JITTER]:
            for column in ORDERS[int(row[ORDER])]:
                if row[column] != NEUTRAL[column] and (channels == RGB or column < SATURATION):
                    _IN_PLACE[column](x, row[column])
        if row[GREY] and channels == RGB:
            greyscale_(x)
        if row[BLUR_SIGMA]:
            blur_(x, row[BLUR_SIGMA], spec.blur_kernel)
        if row[SOLARIZE]:
            solarize_(x, spec.solarize_threshold / 255)
        x.sub_(mean).div_(std)
        if buffer is not None:
            result.copy_(buffer)
    return out


def _constant(
    values: Sequence[float] | Sequence[Sequence[int]], dtype: torch.dtype, x: Tensor
) -> Tensor:
    # Not torch.tensor(..., device=): that would make the host wait for the device.
    return torch.tensor(values, dtype=dtype).to(x.device, non_blocking=True)


def _rows(chosen: Tensor, x: Tensor) -> Tensor | None:
    rows = chosen.nonzero()[:, 0]
    return rows.to(x.device, non_blocking=True) if len(rows) else None


def _blend(x: Tensor, column: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast or saturation per crop, by `column`; x itself for any other column."""
    grey = luminance(x)
    is_contrast, is_saturation = per_crop(column == CONTRAST), per_crop(column == SATURATION)
    f = per_crop(torch.where((column >= 0) & (column != HUE), factor, 1.0))
    other = torch.where(is_contrast, grey.mean((2, 3), keepdim=True), grey)
    other = torch.where(is_contrast | is_saturation, other, 0.0)
    return (f * x + (1 - f) * other).clamp(0, 1)


_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, rotate_hue)
_IN_PLACE = (brightness_, contrast_, saturation_, hue_)
