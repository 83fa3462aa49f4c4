"""Pixels as people see them: in three channels, and as a file that browsers show."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def three_channels(pixels: Pixels) -> Pixels:
    """[H, W, C] as [H, W, 3]: the first three channels, or the first one three times; in one
    block of memory.
    """
    if pixels.shape[2] != 3:
        pixels = pixels[..., :3] if pixels.shape[2] > 3 else pixels[..., [0, 0, 0]]
    return np.ascontiguousarray(pixels)


def png(pixels: Pixels) -> bytes:
    """A picture [H, W, 3] as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
