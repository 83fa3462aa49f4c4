"""Small pictures of images, kept while there is room for them."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from PIL import Image

from pipeline.images.decode import decode_shrunk, image_size
from pipeline.images.shown import three_channels
from pipeline.serve.intake import Pixels

SIZES = range(16, 1025)  # pixels of the longer side that may be asked for
_QUALITY = 82


def thumbnail(encoded: bytes, size: int, pixels: Pixels, max_pixels: int) -> bytes:
    """A JPEG whose longer side has at most `size` pixels; small images are not enlarged.

    Raises:
        BadImage: it cannot be decoded.
    """
    longer = max(image_size(encoded, pixels.channels, max_pixels))
    # a JPEG of eight times the size is decoded at an eighth: at 64 times fewer pixels
    shrink = next((factor for factor in (8, 4, 2) if longer // factor >= size), 1)
    small, _ = decode_shrunk(encoded, shrink, pixels.channels, max_pixels, pixels.value_range)
    image = Image.fromarray(three_channels(small))
    image.thumbnail((size, size))
    return jpeg(image)


def jpeg(image: Image.Image) -> bytes:
    """A picture as bytes for a browser."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return out.getvalue()


class Cache:
    """Values of bytes by key, the last used ones up to a size; for many threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max, self._bytes = max_bytes, 0
        self._values: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """The value, made if it is not there; two threads may make the same one at once."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._bytes += len(value)
            while self._bytes > self._max and self._values:
                self._bytes -= len(self._values.popitem(last=False)[1])
        return value
