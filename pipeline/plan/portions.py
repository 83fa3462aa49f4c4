"""How many images are shuffled together, and how many make one block of crops: by their bytes."""

from __future__ import annotations

CHUNK_BYTES = 72 * 2**20  # of crops in one Ray Data block: 128 images at the usual sizes
ENCODED_BYTES = 16 * 2**20  # of encoded images that make one block of crops, where they are large
WINDOW_BYTES = 128 * 2**20  # of encoded images in one shuffle window: a read task holds two


def window_of(rows: int, batch: int, image_bytes: float) -> int:
    """Images that are shuffled together: about `rows`, fewer where they are large.

    The order of rows must not depend on the workers, so it is a multiple or a divisor of the global
    batch.

    Args:
        rows: wanted.
        batch: the global batch.
        image_bytes: mean size of an encoded image; 0 where it is not known.
    """
    if image_bytes:
        rows = max(1, min(rows, int(WINDOW_BYTES // image_bytes)))
    return max(1, rows // batch) * batch if batch <= rows else divisor(batch, rows)


def chunk_of(share: int, crop_bytes: int, image_bytes: float) -> int:
    """Images of one block of crops: it divides `share` and is small on both sides of the decoding.

    Args:
        share: what it must divide: images of a worker's step, of a window.
        crop_bytes: crops of one image.
        image_bytes: mean size of an encoded image; 0 where it is not known.
    """
    encoded = int(ENCODED_BYTES // image_bytes) if image_bytes else share
    return divisor(share, max(1, min(CHUNK_BYTES // crop_bytes, encoded)))


def divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is not above `limit`."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
