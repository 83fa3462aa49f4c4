"""Depth maps in files: 16-bit PNG, TIFF of floats, or a numpy array.

H x W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError, one_line
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.npy import MAGIC, npy_values
from pipeline.images.pillow import deep_picture
from pipeline.use.masks import mask_ids

Depth = npt.NDArray[np.float32]

EXPECTED = "a depth map is a PNG of 16 bits, a TIFF of floats or a .npy, with one value a pixel"


def depth_map(name: str, content: bytes) -> Depth:
    """Depth float32 [H, W] in units of the file; 0 where it is unknown: 0, below or not finite.

    Raises:
        DataError: it cannot be read, or has several values a pixel.
    """
    try:
        if content.startswith(MAGIC):
            values: np.ndarray[Any, Any] = npy_values(content, MAX_PIXELS, 1)
        elif (deep := deep_picture(content, MAX_PIXELS, 1)) is not None:
            values = deep.samples.values
        else:
            values = mask_ids(name, content)[..., None]  # 8 bits, of few steps
    except DataError as error:
        raise DataError(error.what, EXPECTED) from error
    except BadImage as error:
        raise DataError(f"{name} cannot be read: {error.detail}", EXPECTED) from error
    except Exception as error:  # what decoders make of broken files
        raise DataError(f"{name} cannot be read: {one_line(error)}", EXPECTED) from error
    if values.ndim != 3 or values.shape[2] != 1:
        raise DataError(f"{name} has {list(values.shape)} values, expected one a pixel", EXPECTED)
    depth = np.array(values[..., 0], np.float32)
    depth[~np.isfinite(depth) | (depth < 0)] = 0
    return depth
