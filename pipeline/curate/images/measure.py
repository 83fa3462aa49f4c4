"""What is measured of one decoded image: light, detail, colour, a thumbnail, a hash of its pixels.

Large images are averaged down first by a whole number, so that an image of 20 megapixels costs
little more than one of a quarter of a megapixel; only the hash sees every pixel.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from PIL import Image

from pipeline.curate.images.descriptor import CELLS, SIDE, square
from pipeline.curate.rows.exact import Doubles
from pipeline.images.shown import three_channels

THUMBNAIL = 96  # longest side, pixels
QUALITY = 80  # of its JPEG
REDUCED = 256  # shorter side down to which images are averaged before they are measured
_STRIP = 2**22  # pixels that are averaged at once
# A clear edge: a cell of the grid that differs so much from its neighbours, of 255, and so many
# times as much as cells of this image usually do.
EDGE, EDGE_OVER_NOISE = 32.0, 8.0
EDGE_GRID = 128  # cells of a side, at most
# What sensor noise is like at 32 x 32 cells: hardly anything is left at 16 x 16 (a quarter, of
# pixels that are independent), values are spread like a Gaussian's (3), and a pixel deviates by
# no more than so much.
NOISE_KEPT, NOISE_PEAKS, NOISE_DEVIATION = 0.375, 4.5, 25.0

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Measured:
    """Of one image; the names are those of `tables.FINGERPRINT`. `square` is what is described."""

    height: int
    width: int
    pixel_hash: bytes
    brightness_p05: float
    brightness_p50: float
    brightness_p95: float
    contrast: float
    entropy: float
    sharpness: float
    edges: float
    saturation: float
    thumbnail: bytes
    square: Doubles


def measure(pixels: Pixels) -> Measured:
    """Measures an image, uint8 [H, W, C]; with other than three channels the first three are the
    colours, or the first is the grey.
    """
    height, width = pixels.shape[:2]
    cell = max(1.0, height / CELLS) * max(1.0, width / CELLS)
    small = Image.fromarray(_reduced(three_channels(pixels)))
    grey = small.convert("L")
    counts = np.asarray(grey.histogram(), np.float64)
    share = counts / counts.sum()
    levels = np.arange(256)
    mean = float(share @ levels)
    low, middle, high = np.searchsorted(np.cumsum(share), (0.05, 0.5, 0.95)).clip(max=255)
    used = share[share > 0]
    grid = square(grey)
    thumbnail, saturation = _thumbnail(small)
    return Measured(
        height=height,
        width=width,
        pixel_hash=pixel_hash(pixels),
        brightness_p05=float(low),
        brightness_p50=float(middle),
        brightness_p95=float(high),
        contrast=float(np.sqrt(share @ (levels - mean) ** 2)),
        entropy=float(-(used @ np.log2(used))) + 0.0,  # no negative zero
        sharpness=0.0 if _is_noise(grey, cell) else _sharpness(grid),
        edges=float(_edges(small)),
        saturation=saturation,
        thumbnail=thumbnail,
        square=grid,
    )


def pixel_hash(pixels: Pixels) -> bytes:
    """blake2b with a 128-bit digest of the shape and all pixels, in reading order."""
    hashed = blake2b(np.asarray(pixels.shape, "<i8").tobytes(), digest_size=16)
    hashed.update(np.ascontiguousarray(pixels).reshape(-1).data)
    return hashed.digest()


def _reduced(rgb: Pixels) -> Pixels:
    factor = min(rgb.shape[:2]) // REDUCED
    if factor < 2:
        return rgb
    rows = max(1, _STRIP // (rgb.shape[1] * factor)) * factor
    strips = [rgb[top : top + rows] for top in range(0, len(rgb), rows)]
    return np.concatenate([np.asarray(Image.fromarray(s).reduce(factor)) for s in strips])


def _sharpness(square: Doubles) -> float:
    """Variance of the Laplacian at 32 x 32 pixels.

    At this size it tells a picture of anything (60 and more in CIFAR-10, 430 in ImageNet) from a
    gradient or a blank scan (3 and less), however large or compressed they are.
    """
    cells = SIDE // CELLS
    return float(_laplacian(square.reshape(CELLS, cells, CELLS, cells).mean((1, 3))).var())


def _laplacian(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    curvature: np.ndarray[Any, Any] = (
        x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    )
    return curvature


def _is_noise(grey: Image.Image, cell: float) -> bool:
    """Whether all that is seen at 32 x 32 cells, of `cell` pixels each, is noise of the pixels.

    In doubt it is not: fine textures deviate by more or have larger structures.
    """
    fine, coarse = (
        _laplacian(np.asarray(grey.convert("F").resize((n, n), Image.Resampling.BOX), np.float64))
        for n in (CELLS, CELLS // 2)
    )
    variance = float(fine.var())
    if not 0 < variance <= 20 * NOISE_DEVIATION**2 / cell:  # 20: of the Laplacian's squares
        return False
    peaks = float(((fine - fine.mean()) ** 4).mean()) / variance**2
    return float(coarse.var()) < NOISE_KEPT * variance and peaks < NOISE_PEAKS


def _edges(rgb: Image.Image) -> int:
    """Cells, of 128 x 128 at most, in which a colour channel has a clear edge.

    Lines, letters and the outlines of a logo have them however much of the image is blank; blanks,
    gradients and noise have none.
    """
    size = (min(EDGE_GRID, rgb.width), min(EDGE_GRID, rgb.height))
    cells = np.asarray(rgb.resize(size, Image.Resampling.BOX), np.float32)
    curvature = np.abs(_laplacian(cells))
    if not curvature.size:
        return 0
    usual = 1.4826 * np.median(curvature.reshape(-1, 3), axis=0)  # deviation, of a Gaussian
    clear: np.ndarray[Any, Any] = curvature > np.maximum(EDGE, EDGE_OVER_NOISE * usual)
    return int(clear.any(axis=-1).sum())


def _thumbnail(image: Image.Image) -> tuple[bytes, float]:
    """A JPEG, and the mean saturation (of HSV) of its pixels."""
    scale = THUMBNAIL / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    colours = np.asarray(image)
    brightest = np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])
    darkest = np.minimum(np.minimum(colours[..., 0], colours[..., 1]), colours[..., 2])
    spread = (brightest - darkest) / np.maximum(brightest, 1).astype(np.float32)
    return stream.getvalue(), float(spread.mean(dtype=np.float64))
