"""Encoded bytes to RGB uint8, in one way for every stage. The rules are listed in docs/data.md.

The rules, in order:

* only the first image of a file (frame, page) is read; only the formats in `FORMATS`;
* the size is read from the header, and refused there if it is over `max_pixels`;
* a file that ends early is refused as `truncated`, even where a decoder could fill the rest;
* EXIF orientation is applied; ICC profiles are not (as in every training pipeline we know);
* 1-bit, grey and palette images are expanded; 16 bits become 8 by dropping the low byte;
* CMYK and YCCK are converted without a profile (JPEG: inverted, as Adobe writes it and all
  browsers read it); Lab goes through littleCMS to sRGB;
* transparency, also of palettes and colour keys, is laid over white, which is what a reader of a
  web page saw. (Dropping alpha would show whatever an editor left under it.)
"""

from __future__ import annotations

import functools
import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 200_000_000
# Formats with a signature. Without one (TGA) any file can pass for an image; EPS runs a program.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # MPO by way of JPEG
_EXIF_ORIENTATION = 0x0112
REASONS = ("empty", "not_an_image", "undecodable", "truncated", "too_large")

UInt8Array = np.ndarray[Any, np.dtype[np.uint8]]


class BadImage(Exception):
    """An image that cannot be used: `reason` is one of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode_rgb(encoded: bytes, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Decode an image to RGB: uint8[H, W, 3], writable, rows in reading order.

    Raises:
        BadImage: empty, not_an_image, undecodable, truncated or too_large (pixels), with a detail.
    """
    return decode(encoded, max_pixels)[0]


def decode(encoded: bytes, max_pixels: int = MAX_PIXELS) -> tuple[UInt8Array, str]:
    """Like `decode_rgb`, and the format of the file as Pillow names it (JPEG, PNG, MPO, ...)."""
    if not encoded:
        raise BadImage("empty", "0 bytes")
    try:
        return _decode(encoded, max_pixels)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(encoded) from error
    except MemoryError as error:
        raise BadImage("too_large", "not enough memory to decode") from error
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, ... on bad bytes.
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"[:200]
        cut = isinstance(error, EOFError) or "truncated" in detail.lower() or _cut_short(encoded)
        raise BadImage("truncated" if cut else "undecodable", detail) from error


def _decode(encoded: bytes, max_pixels: int) -> tuple[UInt8Array, str]:
    """The one place to make decoding faster (a plain JPEG can take another road here)."""
    with _quiet_pillow():
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        name = image.format or "?"
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage("too_large", f"{width}x{height} pixels, at most {max_pixels} are read")
        if cut := _cut_short(encoded):
            raise BadImage("truncated", cut)
        if name not in _LOADS_QUIETLY:
            image.load()
    image.load()  # the long part, outside the lock, so that threads can share the work
    with _quiet_pillow():
        image = _upright(image)
    # np.array copies: the view that np.asarray gives is read-only and torch warns about those.
    return np.array(_to_rgb(image, name)), name


# Formats whose `load` raises no warning; the others are loaded inside `_quiet_pillow`.
_LOADS_QUIETLY = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_lock = threading.RLock()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """No warnings from Pillow, and no pixel limit of its own: `max_pixels` is the limit.

    Both settings belong to the process, so only one thread may be in here.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
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
        # La and RGBa (premultiplied) reach RGBA only by way of LA and RGBA.
        straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
        layer = straight.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


@functools.lru_cache(maxsize=1)
def _lab_to_srgb() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")  # D50, as in TIFF
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


def _unidentified(encoded: bytes) -> BadImage:
    """Tell a file of a known kind whose header is broken from a file that is no image."""
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"):
        if encoded.startswith(signature):
            cut = _cut_short(encoded)
            return BadImage("truncated" if cut else "undecodable", cut or "broken header")
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        cut = _cut_short(encoded)
        return BadImage("truncated" if cut else "undecodable", cut or "broken header")
    return BadImage("not_an_image", f"no format that is read starts with {encoded[:8]!r}")


def _cut_short(encoded: bytes) -> str:
    """Say how a file ends early by what its container promises; "" where it does not.

    Decoders differ here: some fill the missing rows with grey and call it a success, and none
    notices a tail of zeros, which is what an interrupted copy leaves behind.
    """
    if encoded.startswith(b"\xff\xd8"):
        scan = _jpeg_scan(encoded)
        if scan < 0 or encoded.rfind(b"\xff\xd9", scan) < 0:
            return "the JPEG has no end marker"
    elif encoded.startswith(b"\x89PNG"):
        if b"IEND" not in encoded:
            return "the PNG has no end chunk"
    elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        promised = struct.unpack("<I", encoded[4:8])[0] + 8
        if len(encoded) < promised:
            return f"{len(encoded)} of {promised} bytes"
    return ""


def _jpeg_scan(encoded: bytes) -> int:
    """Offset of the first scan, or -1; steps over segments, so an embedded preview is no match."""
    at = 2
    while at + 4 <= len(encoded):
        if encoded[at] != 0xFF:
            at += 1  # junk between segments, which decoders step over as well
            continue
        marker = encoded[at + 1]
        if marker == 0xDA:
            return at
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker == 0 or marker == 1 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return -1
