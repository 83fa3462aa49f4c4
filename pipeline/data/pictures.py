"""Pictures of every format through Pillow: the general road of `decode`."""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipeline.data.bad_image import BadImage, cut_short, too_large

# Formats with a signature. Without one (TGA) any file can pass for an image; EPS runs a program.
# MPO comes by way of JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # what a picture can give, by channels
_EXIF_ORIENTATION = 0x0112
_TIFF_SIZE = (257, 256)  # tags of height and width as stored

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_picture(encoded: bytes, max_pixels: int, channels: int) -> tuple[Pixels, str]:
    """Decode to uint8 [H, W, channels] and the format's name; `decode.decode_image` has the rules.

    Raises:
        BadImage: by what the header and the end of the file say.
        Exception: anything that a decoder makes of bad bytes.
    """
    with quiet():
        image, name = _open(encoded, max_pixels, channels)
        if name not in _LOADS_QUIETLY:
            image.load()
    image.load()  # the long part, outside the lock, so that threads can share the work
    with quiet():
        image = _upright(image)
    # np.array copies: the view that np.asarray gives is read-only and torch warns about those.
    pixels = np.array(convert(image, name, channels))
    return pixels.reshape(*pixels.shape[:2], channels), name


def picture_size(encoded: bytes, max_pixels: int, channels: int) -> tuple[int, int]:
    """(height, width) that `decode_picture` will give, and its refusals that need only a header."""
    with quiet():
        image, name = _open(encoded, max_pixels, channels)
        if name == "TIFF":  # Pillow gives the size before or after turning, by its version
            tags: Any = image
            height, width = (int(tags.tag_v2[tag]) for tag in _TIFF_SIZE)
        else:
            width, height = image.size
        if name == "PNG" and not any(mark in encoded for mark in _PNG_ORIENTED):
            return height, width  # Pillow would decode it all to look behind the pixels
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def _open(encoded: bytes, max_pixels: int, channels: int) -> tuple[Image.Image, str]:
    image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    name = image.format or "?"
    width, height = image.size
    if width * height > max_pixels:
        raise too_large(width, height, max_pixels)
    if channels not in MODES:
        detail = f"{name} cannot give {channels} channels, a .npy [H, W, {channels}] can"
        raise BadImage("undecodable", detail)
    if cut := cut_short(encoded):
        raise BadImage("truncated", cut)
    return image, name


def convert(image: Image.Image, name: str, channels: int) -> Image.Image:
    """To 8-bit samples of this many channels."""
    if channels == 3:
        return _to_rgb(image, name)
    if channels == 1:
        # Of equal R, G and B the luminance is that very value, so grey files lose nothing here.
        return image if _is_plain(image, "L") else _to_rgb(image, name).convert("L")
    deep = image.mode.startswith(("I", "F"))  # more than 8 bits: alpha is not kept
    layer = _to_rgb(image, name) if deep or not image.has_transparency_data else _straight(image)
    return layer.convert(MODES[channels])


def _is_plain(image: Image.Image, mode: str) -> bool:
    return image.mode == mode and "transparency" not in image.info


# Formats whose `load` raises no warning; the others are loaded inside `quiet`.
_LOADS_QUIETLY = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_lock = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from Pillow or numpy, and no pixel limit of its own: `max_pixels` is the limit.

    Both settings belong to the process, so only one thread may be in here.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_PNG_ORIENTED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")


def _orientation(image: Image.Image) -> int:
    """1 to 8."""
    try:
        found = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return found if found in range(1, 9) else 1


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image) -> Image.Image:
    # Not by ImageOps.exif_transpose: it writes the EXIF block anew, and fails where others of its
    # values are broken.
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if _is_plain(image, "RGB"):
        return image
    if mode.startswith("I;16") or (mode == "I" and name in ("PNG", "PPM")):
        # 16 bits a sample; older versions of Pillow give them in 32-bit integers.
        values = np.asarray(image)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise BadImage("undecodable", f"32-bit samples (mode {mode}) have no fixed range")
    if mode == "LAB":
        converted = ImageCms.applyTransform(image, _lab_to_srgb())
        if converted is None:
            raise BadImage("undecodable", "littleCMS could not convert Lab")
        return converted
    if image.has_transparency_data:
        layer = _straight(image)
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _straight(image: Image.Image) -> Image.Image:
    """RGBA with straight alpha."""
    # La and RGBa (premultiplied) reach RGBA only by way of LA and RGBA.
    return image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")


@functools.lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")  # D50, as in TIFF
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
