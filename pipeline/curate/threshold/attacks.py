"""Copies of an image as the web makes them: nine ways, with strengths drawn for each image.

What happens to an image depends on its id and the seed alone, so a calibration is the same on every
machine and for any order of the images.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from pipeline.curate.rows.draws_by_id import ATTACKS as STREAM
from pipeline.views.draws import uniforms

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Strengths = np.ndarray[Any, np.dtype[np.float64]]  # in [0, 1), NUMBERS of them

NUMBERS = 8  # that decide what an attack does
CROP_AREA = (0.6, 0.9)  # share of the area that a crop keeps
LIGHT = (0.6, 1.5)  # factors of brightness and of contrast
BLUR = 0.012  # of the shorter side, standard deviation
BORDER = (0.02, 0.06)  # of the shorter side
BAR = 0.12  # of the height
TEXT = "SAMPLE TEXT example.com"
DEGREES = 5
SMALLEST = 8  # no copy has a side below this many pixels
LONGEST = 400  # pixels: larger images are made so small before they are attacked


def _jpeg(image: Image.Image, u: Strengths) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=30)
    return Image.open(stream).convert("RGB")


def _half(image: Image.Image, u: Strengths) -> Image.Image:
    size = (max(SMALLEST, image.width // 2), max(SMALLEST, image.height // 2))
    return image.resize(size, Image.Resampling.BICUBIC)


def _crop(image: Image.Image, u: Strengths) -> Image.Image:
    side = (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * u[0]) ** 0.5
    width, height = (min(n, max(SMALLEST, round(n * side))) for n in image.size)
    left = int(u[1] * (image.width - width + 1))
    top = int(u[2] * (image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def _mirror(image: Image.Image, u: Strengths) -> Image.Image:
    return ImageOps.mirror(image)


def _light(image: Image.Image, u: Strengths) -> Image.Image:
    brightness, contrast = (LIGHT[0] + (LIGHT[1] - LIGHT[0]) * float(x) for x in u[:2])
    brighter = ImageEnhance.Brightness(image).enhance(brightness)
    return ImageEnhance.Contrast(brighter).enhance(contrast)


def _blur(image: Image.Image, u: Strengths) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def _overlay(image: Image.Image, u: Strengths) -> Image.Image:
    share = BORDER[0] + (BORDER[1] - BORDER[0]) * u[4]
    border = max(1, round(share * min(image.size)))
    colour = tuple(int(256 * x) for x in u[:3])
    framed = ImageOps.expand(image, border=border, fill=colour)
    bar = max(6, round(image.height * BAR))
    top = round((0.1 + 0.65 * u[3]) * image.height)
    draw = ImageDraw.Draw(framed)
    draw.rectangle((border, top, image.width, top + bar), fill=(0, 0, 0))
    font = ImageFont.load_default(size=max(6.0, 0.7 * bar))
    draw.text((border + 4, top + 1), TEXT, fill=(255, 255, 255), font=font)
    return framed


def _grey(image: Image.Image, u: Strengths) -> Image.Image:
    return image.convert("L").convert("RGB")


def _rotate(image: Image.Image, u: Strengths) -> Image.Image:
    return image.rotate(DEGREES if u[0] < 0.5 else -DEGREES, Image.Resampling.BILINEAR)


ATTACKS: dict[str, Callable[[Image.Image, Strengths], Image.Image]] = {
    "jpeg": _jpeg,
    "half": _half,
    "crop": _crop,
    "mirror": _mirror,
    "light": _light,
    "blur": _blur,
    "overlay": _overlay,
    "grey": _grey,
    "rotate": _rotate,
}


def attack(rgb: Pixels, name: str, image_id: bytes, seed: int = 0) -> Pixels:
    """A copy of an image.

    Args:
        rgb: uint8 [H, W, 3].
        name: of ATTACKS: `jpeg` quality 30, `half` the size, `crop` to 60 to 90 % of the area,
            `mirror` left to right, `light` brightness and contrast by 0.6 to 1.5, `blur`, `overlay`
            with a frame and a line of text, `grey`, `rotate` by 5 degrees.
        image_id: 16 bytes; with the seed it decides all strengths and places.
        seed: of the run.

    Returns:
        uint8 [h, w, 3].
    """
    ids = np.frombuffer(image_id, np.uint8)[None]
    # One pass for each attack, so that the place of a crop says nothing about the brightness.
    u = uniforms(seed, list(ATTACKS).index(name), ids, NUMBERS, STREAM)[0]
    copy: Pixels = np.asarray(ATTACKS[name](Image.fromarray(rgb), u)).copy()
    return copy


def attacked_copies(rgb: Pixels, image_id: bytes, seed: int = 0) -> list[Pixels]:
    """An image and its nine copies, in the order of ATTACKS; the image at most LONGEST pixels long,
    and tiny sides enlarged to SMALLEST.

    Args:
        rgb: uint8 [H, W, 3].
        image_id: 16 bytes, as for `attack`.
        seed: of the run.
    """
    height, width = rgb.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(SMALLEST, round(width * scale)), max(SMALLEST, round(height * scale)))
    if size != (width, height):
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
    return [rgb, *(attack(rgb, name, image_id, seed) for name in ATTACKS)]
