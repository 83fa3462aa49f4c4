"""Encoded bytes to uint8 pixels, in one way for every stage. The rules are listed in docs/data.md.

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

That is RGB, the default. Of the other numbers of channels, 1 is the luminance of that RGB, 2 and 4
are luminance and RGB beside straight alpha, and any number can come from a numpy file.
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
from numpy.lib import format as npy
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

MAX_PIXELS = 200_000_000
# Formats with a signature. Without one (TGA) any file can pass for an image; EPS runs a program.
# MPO comes by way of JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
NPY = "NPY"  # our name for numpy files, which Pillow does not read
_PICTURE_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # what a picture can give, by channels
_EXIF_ORIENTATION = 0x0112
REASONS = ("empty", "not_an_image", "undecodable", "truncated", "too_large")

UInt8Array = np.ndarray[Any, np.dtype[np.uint8]]


class BadImage(Exception):
    """An image that cannot be used: `reason` is one of REASONS, `detail` says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode_image(encoded: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """Decode an image to uint8[H, W, channels], writable, rows in reading order.

    Args:
        encoded: a file of one of FORMATS, or a numpy file (.npy) with exactly these channels.
        channels: 3 is RGB, 1 luminance, 2 luminance and alpha, 4 RGB and alpha (straight, opaque
            where a file has none); other numbers come from numpy files only.
        max_pixels: H x W; files with more are refused by their header.

    Raises:
        BadImage: empty, not_an_image, undecodable, truncated or too_large (pixels), with a detail.
    """
    return decode(encoded, max_pixels, channels)[0]


def decode_rgb(encoded: bytes, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """`decode_image` with three channels."""
    return decode(encoded, max_pixels)[0]


def decode(
    encoded: bytes, max_pixels: int = MAX_PIXELS, channels: int = 3
) -> tuple[UInt8Array, str]:
    """Like `decode_image`, and the format of the file: NPY, or as Pillow names it (JPEG, ...)."""
    if not encoded:
        raise BadImage("empty", "0 bytes")
    try:
        if encoded.startswith(npy.MAGIC_PREFIX):
            return _decode_npy(encoded, max_pixels, channels), NPY
        return _decode(encoded, max_pixels, channels)
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


def _decode(encoded: bytes, max_pixels: int, channels: int) -> tuple[UInt8Array, str]:
    """The one place to make decoding faster (a plain JPEG can take another road here)."""
    with _quiet():
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        name = image.format or "?"
        width, height = image.size
        if width * height > max_pixels:
            raise _too_large(width, height, max_pixels)
        if channels not in _PICTURE_MODES:
            detail = f"{name} cannot give {channels} channels, a .npy [H, W, {channels}] can"
            raise BadImage("undecodable", detail)
        if cut := _cut_short(encoded):
            raise BadImage("truncated", cut)
        if name not in _LOADS_QUIETLY:
            image.load()
    image.load()  # the long part, outside the lock, so that threads can share the work
    with _quiet():
        image = _upright(image)
    # np.array copies: the view that np.asarray gives is read-only and torch warns about those.
    pixels = np.array(_convert(image, name, channels))
    return pixels.reshape(*pixels.shape[:2], channels), name


def _convert(image: Image.Image, name: str, channels: int) -> Image.Image:
    """To 8-bit samples of this many channels."""
    if channels == 3:
        return _to_rgb(image, name)
    if channels == 1:
        # Of equal R, G and B the luminance is that very value, so grey files lose nothing here.
        return image if _is_plain(image, "L") else _to_rgb(image, name).convert("L")
    deep = image.mode.startswith(("I", "F"))  # more than 8 bits: alpha is not kept
    layer = _to_rgb(image, name) if deep or not image.has_transparency_data else _straight(image)
    return layer.convert(_PICTURE_MODES[channels])


def _is_plain(image: Image.Image, mode: str) -> bool:
    return image.mode == mode and "transparency" not in image.info


def _too_large(width: int, height: int, max_pixels: int) -> BadImage:
    return BadImage("too_large", f"{width}x{height} pixels, at most {max_pixels} are read")


def _decode_npy(encoded: bytes, max_pixels: int, channels: int) -> UInt8Array:
    """A numpy file with [H, W, channels], or [H, W] where one channel is asked for.

    8 bits are taken as they are, of 16 the high byte. The data is read where it lies by a plain
    dtype: nothing here can unpickle.
    """
    offset, shape, fortran, dtype = _npy_header(encoded)
    wanted = f"uint8 or uint16 [H, W, {channels}]" + (" or [H, W]" if channels == 1 else "")
    height, width, *rest = (*shape, 0, 0)[: max(2, len(shape))]
    fits = rest == [channels] or (not rest and channels == 1)
    plain = dtype.kind == "u" and dtype.itemsize in (1, 2)
    if not (plain and fits and height > 0 and width > 0):
        raise BadImage("undecodable", f"{dtype} {list(shape)}, expected {wanted}"[:200])
    if height * width > max_pixels:
        raise _too_large(width, height, max_pixels)
    count = height * width * channels
    promised = offset + count * dtype.itemsize
    if len(encoded) < promised:
        raise BadImage("truncated", f"{len(encoded)} of {promised} bytes")
    values = np.frombuffer(encoded, dtype, count, offset)
    pixels = values.reshape(height, width, channels, order="F" if fortran else "C")
    if dtype.itemsize == 2:
        pixels = pixels >> 8
    return np.array(pixels, np.uint8, order="C")


def _npy_header(encoded: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
    """Where the data starts, its shape, whether it is in Fortran order, and its dtype."""
    start = 8  # magic and version
    version = tuple(encoded[6:start])
    if len(version) < 2:
        raise BadImage("truncated", "the numpy header breaks off")
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise BadImage("undecodable", f"numpy format {version[0]}.{version[1]} is not known")
    length = 2 if version == (1, 0) else 4
    offset = start + length + int.from_bytes(encoded[start : start + length], "little")
    if len(encoded) < max(offset, start + length):
        raise BadImage("truncated", "the numpy header breaks off")
    # 3.0 is 2.0 with names of fields in UTF-8, and arrays with fields are refused anyway.
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        with _quiet():  # numpy warns about headers that Python 2 wrote
            return offset, *read(io.BytesIO(encoded[start:offset]))
    except Exception as error:  # what Python's parser makes of 10,000 bytes of anything
        detail = f"broken numpy header: {type(error).__name__}: {error}".splitlines()[0]
        raise BadImage("undecodable", detail[:200]) from error


# Formats whose `load` raises no warning; the others are loaded inside `_quiet`.
_LOADS_QUIETLY = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_lock = threading.RLock()


@contextmanager
def _quiet() -> Iterator[None]:
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


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image
    return ImageOps.exif_transpose(image) if orientation != 1 else image


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


def _unidentified(encoded: bytes) -> BadImage:
    """Tell a file of a known kind whose header is broken from a file that is no image."""
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*"):
        if encoded.startswith(signature):
            cut = _cut_short(encoded)
            found = "broken header" + ", or a TIFF of more than 4 bands" * (signature[0] in b"IM")
            return BadImage("truncated" if cut else "undecodable", cut or found)
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
