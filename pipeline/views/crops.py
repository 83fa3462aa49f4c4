"""Crop boxes from uniform numbers, and crops cut as uint8.

The law of the boxes is that of torchvision's `RandomResizedCrop` (Szegedy et al. 2014, the scales
of DINOv2's `data/augmentations.py`). The boxes of all images and views are computed at once with
numpy. Cutting stays in uint8 on channels-last tensors, for which torch has a SIMD kernel of the
antialiased bicubic filter that Pillow uses; colour is changed later and elsewhere (`photometric`).

Shapes: B images, V = 2 + L views (2 global crops, then L local crops), boxes are
(top, left, height, width) in pixels of the source.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import DataError
from pipeline.views.draws import uniforms

__all__ = [
    "DRAWS_PER_VIEW",
    "GLOBAL_CROPS",
    "CropSpec",
    "crop_boxes",
    "cut_crops",
    "decode_shrink",
    "empty_crops",
    "evaluation_resize",
    "resize_centre_crop",
    "scale_boxes",
    "uniforms",
]

GLOBAL_CROPS = 2
TRIES = 10  # torchvision RandomResizedCrop.get_params
SHRINK_MARGIN = 2.0  # nearer to whole decoding than bilinear is to bicubic (benchmarks/decode.py)
DRAWS_PER_VIEW = 2 * TRIES + 3  # areas, aspect ratios, then top, left and flip

Image = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CropSpec:
    """Sizes in pixels, scales as fractions of the image's area. Defaults: RECIPE of ViT-*/14."""

    global_size: int = 224
    local_size: int = 98  # 96 with patches of 16
    local_crops: int = 8
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    channels: int = 3

    @property
    def views(self) -> int:
        """Number of crops of an image."""
        return GLOBAL_CROPS + self.local_crops

    @property
    def draws(self) -> int:
        """Uniform numbers that the boxes and flips of one image use."""
        return self.views * DRAWS_PER_VIEW

    @property
    def bytes(self) -> int:
        """Of the uint8 crops of one image."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the global and of the local crops of one image."""
        large, small, channels = self.global_size, self.local_size, self.channels
        return (
            (GLOBAL_CROPS, large, large, channels),
            (self.local_crops, small, small, channels),
        )


def crop_boxes(
    u: npt.NDArray[np.float64],
    width: npt.ArrayLike,
    height: npt.ArrayLike,
    spec: CropSpec,
) -> tuple[Boxes, npt.NDArray[np.bool_]]:
    """Turn uniform numbers into crop boxes and flips.

    Ten tries of area ~ U(scale) and log aspect ratio ~ U(log ratio); the first that fits in the
    image is placed uniformly; where none fits, the largest centred box of an allowed ratio.

    Args:
        u: float64 [..., spec.draws] from `uniforms`.
        width: image widths, integers [...].
        height: image heights, integers [...].
        spec: sizes and scales.

    Returns:
        boxes int64 [..., V, 4] as (top, left, height, width), and flips bool [..., V].
    """
    u = u.reshape(*u.shape[:-1], spec.views, DRAWS_PER_VIEW)
    image_w = np.asarray(width, np.int64)[..., None, None]
    image_h = np.asarray(height, np.int64)[..., None, None]
    scales = [spec.global_scale] * GLOBAL_CROPS + [spec.local_scale] * spec.local_crops
    low, high = np.asarray(scales).T[:, :, None]
    log_low, log_high = math.log(spec.ratio[0]), math.log(spec.ratio[1])

    area = image_w * image_h * (low + (high - low) * u[..., :TRIES])
    aspect = np.exp(log_low + (log_high - log_low) * u[..., TRIES : 2 * TRIES])
    try_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    try_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (try_w > 0) & (try_w <= image_w) & (try_h > 0) & (try_h <= image_h)
    first = fits.argmax(-1)[..., None]
    fitted = np.take_along_axis(fits, first, -1)[..., 0]
    drawn_w = np.take_along_axis(try_w, first, -1)[..., 0]
    drawn_h = np.take_along_axis(try_h, first, -1)[..., 0]

    image_w, image_h = image_w[..., 0], image_h[..., 0]
    centre_w = np.minimum(image_w, np.rint(image_h * spec.ratio[1]).astype(np.int64))
    centre_h = np.minimum(image_h, np.rint(image_w / spec.ratio[0]).astype(np.int64))
    box_w = np.where(fitted, drawn_w, centre_w)
    box_h = np.where(fitted, drawn_h, centre_h)
    free_w, free_h = image_w - box_w, image_h - box_h
    u_top, u_left, u_flip = (u[..., 2 * TRIES + i] for i in range(3))
    top = np.where(fitted, np.floor(u_top * (free_h + 1)).astype(np.int64), free_h // 2)
    left = np.where(fitted, np.floor(u_left * (free_w + 1)).astype(np.int64), free_w // 2)
    return np.stack((top, left, box_h, box_w), -1), u_flip < spec.flip_probability


def decode_shrink(
    boxes: Boxes, spec: CropSpec, margin: float = SHRINK_MARGIN
) -> npt.NDArray[np.int64]:
    """The largest of 8, 4, 2 and 1 by which an image may be decoded smaller for these boxes.

    Args:
        boxes: int64 [..., V, 4] as (top, left, height, width) at full size.
        spec: sizes of the crops.
        margin: every side of every box, divided by the shrink and rounded down, is at least this
            many times the side of its crop. With 1 no crop is enlarged from the smaller image.

    Returns:
        int64 [...].
    """
    sides = np.where(np.arange(spec.views) < GLOBAL_CROPS, spec.global_size, spec.local_size)
    shorter = boxes[..., 2:].min(-1)
    shrink = np.ones(boxes.shape[:-2], np.int64)
    for factor in (2, 4, 8):
        shrink[(shorter // factor >= margin * sides).all(-1)] = factor
    return shrink


def scale_boxes(boxes: Boxes, shrink: int, height: int, width: int) -> Boxes:
    """Boxes at full size to boxes in the image that was decoded at 1/shrink of it.

    Rounded to whole pixels, inside the image and never empty. A side that `decode_shrink` found
    long enough stays so.

    Args:
        boxes: int64 [..., 4] as (top, left, height, width) at full size.
        shrink: what the image was decoded with (`decode.decode_shrunk`).
        height: rows of the smaller image.
        width: columns of the smaller image.

    Returns:
        int64 [..., 4]; the boxes themselves for a shrink of 1.
    """
    if shrink == 1:
        return boxes
    limit = np.array((height, width))
    sides = np.clip(np.rint(boxes[..., 2:] / shrink).astype(np.int64), 1, limit)
    corners = np.rint(boxes[..., :2] / shrink).astype(np.int64)
    return np.concatenate((np.minimum(corners, limit - sides), sides), -1)


_INTERPOLATE = torch.ops.aten._upsample_bicubic2d_aa


def _resize(image: npt.NDArray[Any], height: int, width: int) -> torch.Tensor:
    """Antialiased bicubic uint8 [H, W, C] -> [1, C, height, width], channels-last in memory."""
    channels = image.shape[2]
    if channels > 4:
        # The SIMD kernel has up to four channels. The same bits by threes, in half the time.
        parts = [image[..., c : c + 3] for c in range(0, channels, 3)]
        return torch.cat([_resize(part, height, width) for part in parts], 1)
    target = torch.empty((height, width, channels), dtype=torch.uint8).permute(2, 0, 1).unsqueeze(0)
    _resize_into(image, target)
    return target


def _resize_into(image: npt.NDArray[Any], target: torch.Tensor) -> None:
    """What `interpolate(mode="bicubic", antialias=True)` calls, writing where the crop belongs."""
    # The kernel reads three interleaved channels in place only where the whole input is dense, so a
    # copy of the crop (a few rows of memcpy) is faster than the strided view. It also frees us from
    # read-only arrays.
    dense = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0)
    _INTERPOLATE.out(dense, target.shape[2:], False, None, None, out=target)


Crops = tuple[Image, Image]


def empty_crops(images: int, spec: CropSpec) -> Crops:
    """Room for the crops of so many images: uint8 [B, 2, S, S, C] and [B, L, s, s, C], unset."""
    large, small = (np.empty((images, *shape), np.uint8) for shape in spec.shapes)
    return large, small


def cut_crops(
    image: Image,
    boxes: Boxes,
    flips: npt.NDArray[np.bool_],
    spec: CropSpec,
    out: Crops | None = None,
) -> Crops:
    """Cut the crops of one image.

    Args:
        image: uint8 [H, W, C].
        boxes: int64 [V, 4] as (top, left, height, width) inside the image.
        flips: bool [V].
        spec: sizes; V = 2 + spec.local_crops.
        out: where to write, as returned; default: new arrays.

    Returns:
        global crops uint8 [2, S, S, C] and local crops uint8 [L, s, s, C], contiguous.
    """
    if out is None:
        global_crops, local_crops = empty_crops(1, replace(spec, channels=image.shape[2]))
        out = global_crops[0], local_crops[0]
    views = [*torch.from_numpy(out[0]), *torch.from_numpy(out[1])]
    for view, (top, left, height, width), flip in zip(
        views, boxes.tolist(), flips.tolist(), strict=True
    ):
        part = image[top : top + height, left : left + width]
        target = view.permute(2, 0, 1).unsqueeze(0)  # [1, C, S, S], channels-last in memory
        if image.shape[2] > 4:
            target.copy_(_resize(part, *view.shape[:2]))
        else:
            _resize_into(part, target)
        if flip:
            target.copy_(target.flip(3))
    return out


def resized(image: Image, height: int, width: int) -> Image:
    """The whole image uint8 [H, W, C] at another size, with the kernel of every stage."""
    if min(image.shape[:2]) == 0:
        raise DataError(f"an image of {image.shape[0]} x {image.shape[1]} pixels has no size")
    return _resize(image, height, width)[0].permute(1, 2, 0).contiguous().numpy()


def evaluation_resize(size: int) -> int:
    """Side that an image is resized to before its centre of `size` pixels is cut out.

    256/224 of the crop, as the reference has it, with an even margin: libraries place an odd one
    differently.
    """
    return size + 2 * round(size / 14)


def resize_centre_crop(image: Image, size: int) -> Image:
    """Evaluation transform: the whole image to a square of `evaluation_resize`, then its centre.

    A square is what every image processor makes alike, whatever the image's sides. Where the longer
    side follows from the shorter one, Hugging Face and timm cut a pixel apart at every fourth
    length. Images that are square become what they are in the reference.

    Args:
        image: uint8 [H, W, C].
        size: side of the result in pixels.

    Returns:
        uint8 [size, size, C].
    """
    height, width = image.shape[:2]
    if min(height, width) == 0:
        raise DataError(f"an image of {height} x {width} pixels has nothing to crop")
    side = evaluation_resize(size)
    at = (side - size) // 2
    resized = _resize(image, side, side)[0].permute(1, 2, 0)
    return resized[at : at + size, at : at + size].contiguous().numpy()
