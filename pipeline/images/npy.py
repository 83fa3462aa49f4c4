"""Numpy files as images, for any number of channels. Nothing is ever unpickled."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from pipeline.errors import shortened
from pipeline.images.bad_image import BadImage, too_large
from pipeline.images.pillow import quiet
from pipeline.images.value_range import ValueRange, to_bytes

MAGIC = npy.MAGIC_PREFIX
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class _Layout(NamedTuple):
    """Where the values stand."""

    shape: tuple[int, int]  # height, width
    offset: int
    fortran: bool
    dtype: np.dtype[Any]


def decode_npy(encoded: bytes, max_pixels: int, channels: int, value_range: ValueRange) -> Pixels:
    """A numpy file with [H, W, channels], or [H, W] where one channel is asked for.

    uint8 is taken as it is, of other numbers the range becomes 0 to 255.
    """
    values = npy_values(encoded, max_pixels, channels)
    return np.array(to_bytes(values, value_range), np.uint8, order="C")


def npy_values(encoded: bytes, max_pixels: int, channels: int) -> np.ndarray[Any, np.dtype[Any]]:
    """[H, W, channels] of any type of numbers. The data is read where it lies by a plain dtype:
    nothing here can unpickle.
    """
    (height, width), offset, fortran, dtype = _layout(encoded, max_pixels, channels)
    values = np.frombuffer(encoded, dtype, height * width * channels, offset)
    return values.reshape(height, width, channels, order="F" if fortran else "C")


def npy_size(encoded: bytes, max_pixels: int, channels: int) -> tuple[int, int]:
    """(height, width) that `decode_npy` will give, with the same refusals."""
    return _layout(encoded, max_pixels, channels).shape


def _layout(encoded: bytes, max_pixels: int, channels: int) -> _Layout:
    offset, shape, fortran, dtype = _header(encoded)
    expected = f"uint8 or uint16 [H, W, {channels}]" + (" or [H, W]" if channels == 1 else "")
    height, width, *bands = (*shape, 0, 0)[: max(2, len(shape))]
    fits = bands == [channels] or (not bands and channels == 1)
    plain = dtype.kind in "iuf" and dtype.itemsize <= 8
    if not (plain and fits and height > 0 and width > 0):
        raise BadImage("undecodable", shortened(f"{dtype} {list(shape)}, expected {expected}"))
    if height * width > max_pixels:
        raise too_large(width, height, max_pixels)
    promised = offset + height * width * channels * dtype.itemsize
    if len(encoded) < promised:
        raise BadImage("truncated", f"{len(encoded)} of {promised} bytes")
    return _Layout((height, width), offset, fortran, dtype)


def _header(encoded: bytes) -> tuple[int, tuple[int, ...], bool, np.dtype[Any]]:
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
        with quiet():  # numpy warns about headers that Python 2 wrote
            return offset, *read(io.BytesIO(encoded[start:offset]))
    except Exception as error:  # what Python's parser makes of 10,000 bytes of anything
        detail = f"broken numpy header: {type(error).__name__}: {error}".splitlines()[0]
        raise BadImage("undecodable", shortened(detail)) from error
