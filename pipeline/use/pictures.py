"""Maps over patches as pictures, uint8 `[H, W, 3]`.

h x w patches, H x W pixels, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.images.shown import Pixels

# From dark to light, so that grey prints and colour-blind eyes rank them: violet, red, yellow.
RAMP = np.array([(10, 8, 40), (92, 24, 110), (187, 55, 84), (249, 142, 8), (252, 226, 60)])
HEAT = 0.65  # opacity of a heat map over its picture
PAINT = 0.6  # of a class
FRAME = (255, 255, 255)
SMALLEST = 320  # pixels of the longer side that a picture is shown with at least
LARGEST = 1600
GAP = 4  # white between tiles


def shown_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that an image is shown with: small ones enlarged, large ones reduced."""
    longer = max(height, width)
    scale = max(1, math.ceil(SMALLEST / longer)) if longer < SMALLEST else min(1, LARGEST / longer)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resized(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """A picture at another size: bilinear, and pixel by pixel where it gets larger."""
    if pixels.shape[:2] == size:
        return pixels
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    larger = size[0] >= pixels.shape[0]
    how: dict[str, Any] = {"mode": "nearest"} if larger else {"mode": "bilinear", "antialias": True}
    return _bytes(F.interpolate(x, size=size, **how)[0].permute(1, 2, 0))


def heat(pixels: Pixels, values: Tensor, scale: tuple[float, float] | None = None) -> Pixels:
    """A map `[h, w]` in colours over the greys of its picture `[H, W, 3]`, dark to light.

    Args:
        pixels: the picture.
        values: of each patch.
        scale: values that are darkest and lightest; default: the map's own.
    """
    low, high = scale or (float(values.min()), float(values.max()))
    spread = (values.float().cpu() - low).div(high - low if high > low else 1.0).clamp(0, 1)
    wide = F.interpolate(spread[None, None], size=pixels.shape[:2], mode="bilinear")[0, 0].numpy()
    at = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(wide, at, RAMP[:, channel]) for channel in range(3)], -1)
    grey = pixels.mean(2, keepdims=True)
    return _bytes(torch.from_numpy(HEAT * colours + (1 - HEAT) * grey))


def patches(colours: Tensor, size: tuple[int, int]) -> Pixels:
    """Colours from 0 to 1 of each patch, `[h, w, 3]`, as squares."""
    x = colours.float().cpu().permute(2, 0, 1)[None]
    return _bytes(F.interpolate(x, size=size, mode="nearest")[0].permute(1, 2, 0) * 255)


def painted(pixels: Pixels, mask: npt.NDArray[np.int64], colours: Pixels) -> Pixels:
    """A picture with its classes in their colours `[K, 3]`; black ones, and void, as it is."""
    known = mask < len(colours)
    colour = colours[np.where(known, mask, 0)].astype(np.float32)
    shown = known[..., None] & (colour.sum(-1, keepdims=True) > 0)
    mixed = PAINT * colour + (1 - PAINT) * pixels
    return _bytes(torch.from_numpy(np.where(shown, mixed, pixels).astype(np.float32)))


def framed(pixels: Pixels, patch: tuple[int, int], grid: tuple[int, int]) -> Pixels:
    """A picture with a white frame, edged in black, around the patch at (row, column)."""
    height, width = pixels.shape[:2]
    (row, column), (rows, columns) = patch, grid
    out = pixels.copy()
    line = max(1, round(max(height, width) / 200))
    for colour, grown in (((0, 0, 0), 2 * line), (FRAME, line)):
        top, bottom = row * height // rows, (row + 1) * height // rows
        left, right = column * width // columns, (column + 1) * width // columns
        inside = out[top:bottom, left:right].copy()
        out[max(0, top - grown) : bottom + grown, max(0, left - grown) : right + grown] = colour
        out[top:bottom, left:right] = inside
    return out


def sheet(tiles: Sequence[Pixels], columns: int) -> Pixels:
    """Tiles of one size, row by row, on white."""
    height, width = tiles[0].shape[:2]
    rows = math.ceil(len(tiles) / columns)
    out = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        out[top : top + height, left : left + width] = tile
    return out


def reduced(pixels: Pixels, side: int) -> Pixels:
    """A picture whose longer side has `side` pixels."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(length * scale)) for length in pixels.shape[:2])
    return resized(pixels, (height, width))


def squared(pixels: Pixels, side: int) -> Pixels:
    """A picture as a square tile: the whole of it, with white around."""
    small = reduced(pixels, side)
    out = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - small.shape[0]) // 2, (side - small.shape[1]) // 2
    out[top : top + small.shape[0], left : left + small.shape[1]] = small
    return out


def _bytes(x: Tensor) -> Pixels:
    array: Pixels = x.round().clamp(0, 255).to(torch.uint8).numpy()
    return array
