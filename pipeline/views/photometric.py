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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.views.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    luma,
    luminance,
    per_crop,
)
from pipeline.views.colour_crop import (
    blur_,
    brightness_,
    contrast_,
    greyscale_,
    hue_,
    saturation_,
    solarize_,
)
from pipeline.views.colour_fused import Jitter, jitter_planes
from pipeline.views.copies import sent

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

# On the CPU: from how many values on a crop is worth calls of its own (about 52 x 52 pixels), and
# how many values of smaller crops are worked on at once.
_ALONE, _TOGETHER = 1 << 13, 1 << 19
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

    The arithmetic is float32 whatever `dtype` is. There are three roads with the same results:
    crops on the CPU are done one after the other in place; small ones, and crops on an accelerator
    with the parameters on the CPU, in groups that ask for the same operation, without the host ever
    waiting; and with the parameters on an accelerator, or under `torch.compile`, every operation
    runs on all crops with neutral numbers where it is off: more arithmetic, fixed shapes, and fit
    to be fused (see `compiled`).

    Args:
        crops: uint8 [N, H, W, C].
        params: float32 [N, PARAMS] from `draw_photometric`.
        spec: the one the parameters were drawn with.
        dtype: of the result.

    Returns:
        [N, C, H, W] contiguous, normalised by spec.mean and spec.std.

    Raises:
        DataError: the crops are too small for the blur's kernel to be reflected at the border.
    """
    if min(crops.shape[1:3]) <= spec.blur_kernel // 2 and any(spec.blur_probability):
        raise DataError(
            f"crops of {crops.shape[1]} x {crops.shape[2]} pixels are too small for a blur of "
            f"{spec.blur_kernel} pixels",
            f"make them at least {spec.blur_kernel // 2 + 1} pixels wide, or set augment.blur=none",
        )
    if params.device.type != "cpu" or torch.compiler.is_compiling():
        return _normalised(
            _apply_to_all(_floats(crops), params.to(crops.device), spec), spec, dtype
        )
    size = max(1, crops.shape[1:].numel())
    on_cpu = crops.device.type == "cpu"
    if on_cpu and size >= _ALONE:
        return _apply_to_each(crops, params, spec, dtype)
    part = max(1, _TOGETHER // size) if on_cpu else max(1, len(crops))
    return torch.cat(
        [
            _normalised(_apply_to_some(_floats(part_crops), p, spec), spec, dtype)
            for part_crops, p in zip(
                torch.split(crops, part), torch.split(params, part), strict=True
            )
        ]
    )


def _floats(crops: Tensor) -> Tensor:
    # Planes and not interleaved pixels: every operation below works on whole channels.
    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255)


def _threshold(spec: PhotometricSpec) -> float:
    # A little lower, so that a pixel of exactly this value is inverted however a device rounds.
    return (spec.solarize_threshold - 1e-4) / 255


def _normalised(x: Tensor, spec: PhotometricSpec, dtype: torch.dtype) -> Tensor:
    # The numbers of each channel are in the program: nothing to copy to the device.
    channels = zip(x.unbind(1), spec.mean, spec.std, strict=True)
    if torch.compiler.is_compiling():  # where writing in place would split what can be fused
        return torch.stack([((plane - mean) / std).to(dtype) for plane, mean, std in channels], 1)
    for plane, mean, std in channels:
        plane.sub_(mean).div_(std)
    return x.to(dtype)


def _apply_to_all(x: Tensor, params: Tensor, spec: PhotometricSpec) -> Tensor:
    """No shape depends on the parameters, and nothing is copied from the host."""
    jitter = params[:, JITTER] > 0
    strength = (torch.where(jitter, params[:, i], NEUTRAL[i]) for i in range(4))
    planes = jitter_planes(x.unbind(1), Jitter(*strength), _positions(params[:, ORDER]))
    if len(planes) == RGB:
        grey, chosen = luma(planes), params[:, GREY, None, None] > 0
        planes = [torch.where(chosen, grey, plane) for plane in planes]
    x = blur(torch.stack(planes, 1), params[:, BLUR_SIGMA], spec.blur_kernel)
    solarized = per_crop(params[:, SOLARIZE] > 0) & (x >= _threshold(spec))
    return torch.where(solarized, 1 - x, x)


def _positions(row: Tensor) -> Jitter:
    """Rows [N] of ORDERS -> the position of each operation, by arithmetic instead of a table."""
    row = row.long()
    first, second, third = row // 6, row % 6 // 2, row % 2
    second = second + (second >= first).long()
    third = third + (third >= torch.minimum(first, second)).long()
    third = third + (third >= torch.maximum(first, second)).long()
    # The fourth is at 3, which is what is missing to the sum of the others.
    columns = (first, second, third)
    done = [[(column == operation).long() for column in columns] for operation in range(4)]
    return Jitter(*(3 - 3 * at0 - 2 * at1 - at2 for at0, at1, at2 in done))


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
        x[rows] = torch.where(part >= _threshold(spec), 1 - part, part)
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
            solarize_(x, _threshold(spec))
        x.sub_(mean).div_(std)
        if buffer is not None:
            result.copy_(buffer)
    return out


def _rows(chosen: Tensor, x: Tensor) -> Tensor | None:
    rows = chosen.nonzero()[:, 0]
    return rows.to(x.device, non_blocking=True) if len(rows) else None


_OPERATIONS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
_IN_PLACE = (brightness_, contrast_, saturation_, hue_)


class CompiledPhotometric:
    """`apply_photometric` compiled, for an accelerator; parameters are moved to the crops.

    There is one graph for each shape, and compiling one takes a minute: batches have as many images
    in every step, whatever could be decoded (`Batch`).
    """

    def __init__(self, backend: str = "inductor"):
        self._compiled = torch.compile(
            apply_photometric, fullgraph=True, dynamic=False, backend=backend
        )

    def __call__(
        self,
        crops: Tensor,
        params: Tensor,
        spec: PhotometricSpec,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """See `apply_photometric`; the first call for a size of crops compiles."""
        params = sent(params.contiguous(), crops.device)
        if not len(crops):
            return apply_photometric(crops, params, spec, dtype)
        # Contiguous, as a change of strides would compile again.
        return self._compiled(crops.contiguous(), params, spec, dtype)
