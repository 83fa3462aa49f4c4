"""Encoded bytes to uint8 pixels, in one way for every stage. The rules: docs/decoding.md.

The rules, in order:

* only the first image of a file (frame, page) is read; only the formats in `FORMATS`;
* the size is read from the header, and refused there if it is over `max_pixels`;
* a file that ends early is refused as `truncated`, even where a decoder could fill the rest;
* EXIF orientation is applied; ICC profiles are not (as in every training pipeline we know);
* 1-bit, grey and palette images are expanded;
* of samples of more than 8 bits a range of values becomes 0 to 255 (`value_range`): by default all
  values of 16 bits, which is the high byte; signed, 32-bit and float samples need a range;
* CMYK and YCCK are converted without a profile (JPEG: inverted, as Adobe writes it and all
  browsers read it); Lab goes through littleCMS to sRGB;
* transparency, also of palettes and colour keys, is laid over white, which is what a reader of a
  web page saw. (Dropping alpha would show whatever an editor left under it.)

That is RGB, the default. Of the other numbers of channels, 1 is the luminance of that RGB, 2 and 4
are luminance and RGB beside straight alpha, and any number can come from a numpy file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import shortened
from pipeline.images.bad_image import (
    MAX_PIXELS,
    REASONS,
    BadImage,
    cut_short,
    pixel_limit,
    unidentified,
)
from pipeline.images.dicom import DICOM, decode_dicom, dicom_size, dicom_span, is_dicom
from pipeline.images.jpeg import JpegHeader, decode_plain, jpeg_header
from pipeline.images.npy import MAGIC, decode_npy, npy_size, npy_values
from pipeline.images.pillow import (
    FORMATS,
    MODES,
    convert,
    decode_picture,
    deep_picture,
    deep_pixels,
    picture_format,
    picture_size,
)
from pipeline.images.value_range import AUTO, FULL, Span, ValueRange, range_alone, span_of

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "NPY",
    "REASONS",
    "BadImage",
    "decode",
    "decode_image",
    "decode_measured",
    "decode_rgb",
    "decode_shrunk",
    "image_format",
    "image_size",
    "value_span",
]

NPY = "NPY"  # our name for numpy files, which Pillow does not read

UInt8Array = np.ndarray[Any, np.dtype[np.uint8]]


def decode_image(
    encoded: bytes,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange = FULL,
) -> UInt8Array:
    """Decode an image to uint8[H, W, channels], writable, rows in reading order.

    Args:
        encoded: a file of one of FORMATS, or a numpy file (.npy) with exactly these channels.
        channels: 3 is RGB, 1 luminance, 2 luminance and alpha, 4 RGB and alpha (straight, opaque
            where a file has none); other numbers come from numpy files only.
        max_pixels: H x W; files with more are refused by their header.
        value_range: what becomes 0 and 255 where samples have more than 8 bits.

    Raises:
        BadImage: empty, not_an_image, undecodable, truncated or too_large (pixels), with a detail.
    """
    return _decode(encoded, max_pixels, channels, 1, value_range)[0]


def decode_rgb(encoded: bytes, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """`decode_image` with three channels."""
    return decode_image(encoded, 3, max_pixels)


def decode_shrunk(
    encoded: bytes,
    shrink: int,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange = FULL,
) -> tuple[UInt8Array, int]:
    """`decode_image` at 1/shrink of the size where that is cheaper, and the shrink that it is.

    A plain JPEG leaves out the high frequencies of its cosine transform: ceil(H / shrink) rows of
    ceil(W / shrink) pixels. Any other file comes in full size, with a shrink of 1.

    Args:
        encoded: as for `decode_image`; `max_pixels` counts the full size.
        shrink: 1, 2, 4 or 8, as `crops.decode_shrink` chooses it.
        channels: as for `decode_image`.
        max_pixels: as for `decode_image`.
        value_range: as for `decode_image`.

    Raises:
        BadImage: as `decode_image`.
    """
    pixels, _, shrink = _decode(encoded, max_pixels, channels, shrink, value_range)
    return pixels, shrink


def image_size(encoded: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that `decode_image` will give, read from the header.

    Raises:
        BadImage: what the header and the end of the file show, for the reason that decoding gives.
    """
    with _reasons(encoded):
        if encoded.startswith(MAGIC):
            return npy_size(encoded, max_pixels, channels)
        if is_dicom(encoded):
            return dicom_size(encoded, max_pixels)
        header = jpeg_header(encoded)
        if header.plain and _allowed(header, max_pixels, channels):
            return header.upright_size
        return picture_size(encoded, max_pixels, channels)


def image_format(encoded: bytes) -> str:
    """The format that `decode` gives, from the header alone: NPY, DICOM, or as Pillow names it.

    Raises:
        BadImage: no format that is read.
    """
    with _reasons(encoded):
        if encoded.startswith(MAGIC):
            return NPY
        if is_dicom(encoded):
            return DICOM
        return "JPEG" if jpeg_header(encoded).plain else picture_format(encoded)


def decode(
    encoded: bytes,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
    value_range: ValueRange = FULL,
) -> tuple[UInt8Array, str]:
    """Like `decode_image`, and the format of the file: NPY, or as Pillow names it (JPEG, ...)."""
    return _decode(encoded, max_pixels, channels, 1, value_range)[:2]


def value_span(encoded: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Span | None:
    """The values that an image of more than 8 bits a sample uses; None for any other.

    Raises:
        BadImage: as `decode_image`.
    """
    with _reasons(encoded):
        if encoded.startswith(MAGIC):
            values = npy_values(encoded, max_pixels, channels)
        elif is_dicom(encoded):
            return dicom_span(encoded, max_pixels)
        elif (deep := deep_picture(encoded, max_pixels, channels)) is not None:
            values = deep.samples.colour_values
        else:
            return None
        return _span(values)


def decode_measured(
    encoded: bytes,
    max_pixels: int,
    channels: int,
    setting: ValueRange | Literal["auto-from-sample"],
) -> tuple[UInt8Array, str, Span | None]:
    """`decode` and `value_span` in one; where the range of the set is not known yet, the image is
    decoded with its own.

    Raises:
        BadImage: as `decode_image`.
    """
    with _reasons(encoded):
        deep = None
        if encoded.startswith(MAGIC):
            span = _span(npy_values(encoded, max_pixels, channels))  # a view: nothing is decoded
        elif is_dicom(encoded):
            span = dicom_span(encoded, max_pixels)
        else:
            deep = deep_picture(encoded, max_pixels, channels)
            span = _span(deep.samples.colour_values) if deep is not None else None
        value_range = range_alone(span) if setting == AUTO else setting
        if deep is not None and not (value_range == FULL and deep.plain):
            return deep_pixels(deep, channels, value_range), deep.name, span
    return *decode(encoded, max_pixels, channels, value_range), span


def _span(values: np.ndarray[Any, np.dtype[Any]]) -> Span | None:
    return None if values.dtype == np.uint8 else span_of(values)


def _decode(
    encoded: bytes, max_pixels: int, channels: int, shrink: int, value_range: ValueRange
) -> tuple[UInt8Array, str, int]:
    """Pixels, format and the shrink that was used: by the fast road where that is open."""
    with _reasons(encoded):
        if encoded.startswith(MAGIC):
            return decode_npy(encoded, max_pixels, channels, value_range), NPY, 1
        if is_dicom(encoded):
            return decode_dicom(encoded, max_pixels, channels, value_range), DICOM, 1
        header = jpeg_header(encoded)
        if header.plain and _allowed(header, max_pixels, channels):
            grey = channels == 1 and header.components == 1
            if plain := decode_plain(encoded, header, grey=grey, shrink=shrink):
                pixels, shrink = plain
                if pixels.shape[2] != channels:
                    other = np.array(convert(Image.fromarray(pixels), "JPEG", channels))
                    pixels = other.reshape(*pixels.shape[:2], channels)
                return pixels, "JPEG", shrink
        return *decode_picture(encoded, max_pixels, channels, value_range), 1


def _allowed(header: JpegHeader, max_pixels: int, channels: int) -> bool:
    """Whatever is not, the general road refuses, in its own order and words."""
    limit = pixel_limit(max_pixels, 3 + header.held_bytes)
    return header.width * header.height <= limit and channels in MODES


@contextmanager
def _reasons(encoded: bytes) -> Iterator[None]:
    """What decoders raise, as one of the documented reasons."""
    if not encoded:
        raise BadImage("empty", "0 bytes")
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise unidentified(encoded) from error
    except MemoryError as error:
        raise BadImage("too_large", "not enough memory to decode") from error
    # Decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError, ... on bad bytes.
    except Exception as error:
        detail = shortened(f"{type(error).__name__}: {error}")
        cut = isinstance(error, EOFError) or "truncated" in detail.lower() or cut_short(encoded)
        raise BadImage("truncated" if cut else "undecodable", detail) from error
