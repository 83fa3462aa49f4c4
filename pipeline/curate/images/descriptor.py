"""A descriptor that finds copies without trained weights: low frequencies of a small grey image.

The image is made grey and 128 x 128 pixels, averaged to 32 x 32, and its cosine transform taken. Of
that the 12 x 12 lowest frequencies without the mean are kept (143 numbers), as perceptual hashes do
(Zauner 2010), but as numbers: the sign and the fourth root of each, scaled to length one. The root
evens out that natural images have most of their energy in few frequencies; it and the slight
preference for low frequencies were chosen by `benchmarks/copies.py`, where the fourth root finds
more than the square root.

A mirrored image has the same frequencies with the sign of the odd horizontal ones turned, so it
needs no second look. Nine crops are described beside the whole, so that a cropped or framed copy is
like one of them: eight of 86 % of the side along the border, and the middle 92 %.

Every step but the last roots is exact in doubles (grey values are multiples of 1/4, the transform's
numbers of 2^-18), so the descriptor does not depend on the machine or on the size of a batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from pipeline.curate.rows.exact import Doubles, Halves, dots

VERSION = 1  # raised where the numbers become others
SIDE = 128  # of the grey image, pixels
CELLS = 32  # of the averaged image
LOW = 12  # frequencies kept in each direction
DIM = LOW * LOW - 1
CROP, INNER = 0.86, 0.92  # sides of the crops at the border and of the one in the middle
VIEWS = 9
VISITORS = 1 + 2 * VIEWS  # what an image shows to others: see `visiting`
ROOT_OF_LOW = 1 / 3  # weight of a frequency f is f to minus this
FLAT = 1.0  # deviation of the grey values, of 255, below which there is nothing to compare
_BITS = 2.0**18
_BATCH = 256  # grey images transformed at once

_HORIZONTAL = np.tile(np.arange(LOW), LOW)[1:]
_VERTICAL = np.repeat(np.arange(LOW), LOW)[1:]
MIRROR = np.where(_HORIZONTAL % 2, -1.0, 1.0).astype(np.float16)
_WEIGHTS = (np.hypot(_HORIZONTAL, _VERTICAL) ** -ROOT_OF_LOW).astype(np.float32).astype(np.float64)

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def describe(rgb: Pixels) -> tuple[Halves, Halves]:
    """Of one image, uint8 [H, W, 3]: of the whole [143] and of nine crops [9, 143].

    Unit length; zero where the image or a crop shows nothing (deviation below FLAT), and zeros are
    like nothing.
    """
    full, crops = describe_grey(square(Image.fromarray(rgb).convert("L"))[None])
    return full[0], crops[0]


def square(grey: Image.Image) -> Doubles:
    """A grey image of any shape as [128, 128], multiples of 1/4."""
    whole: Doubles = averaged(_resized(grey)[None])[0]
    return whole


def twice(rgb: Pixels) -> Pixels:
    """An image [H, W, 3] as the grey [256, 256] that a descriptor is made of."""
    return _resized(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))


def averaged(grey: Pixels) -> Doubles:
    """Grey images [n, 256, 256] as [n, 128, 128], multiples of 1/4."""
    wide = grey.astype(np.uint16)
    rows = wide[:, ::2] + wide[:, 1::2]
    return (rows[:, :, ::2] + rows[:, :, 1::2]) / 4.0


def _resized(grey: Image.Image) -> Pixels:
    return np.asarray(grey.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BILINEAR))


def describe_grey(squares: Doubles) -> tuple[Halves, Halves]:
    """Of grey images [n, 128, 128], multiples of 1/4: wholes [n, 143] and crops [n, 9, 143]."""
    descriptors = np.empty((len(squares), 1 + VIEWS, DIM), np.float16)
    for at in range(0, len(squares), _BATCH):
        descriptors[at : at + _BATCH] = _described(squares[at : at + _BATCH])
    return descriptors[:, 0], descriptors[:, 1:]


def _described(squares: Doubles) -> Halves:
    operators, down, across = _operators()
    rows = np.matmul(operators, squares)  # [n, windows * LOW, SIDE]
    both = np.matmul(rows, operators.T)
    windows = len(operators) // LOW
    blocks = both.reshape(-1, windows, LOW, windows, LOW)
    waves = blocks[:, down, :, across, :].transpose(1, 0, 2, 3)  # [n, 1 + VIEWS, LOW, LOW]
    waves = waves.reshape(len(squares), 1 + VIEWS, LOW * LOW)[..., 1:]
    seen = np.einsum("nvd,nvd->nv", waves, waves) >= (FLAT * CELLS) ** 2
    roots = np.sign(waves) * np.sqrt(np.sqrt(np.abs(waves))) * _WEIGHTS
    length = np.sqrt(np.einsum("nvd,nvd->nv", roots, roots))
    scaled = roots / np.where(seen, length, 1.0)[..., None]
    return np.where(seen[..., None], scaled, 0.0).astype(np.float16)


@lru_cache(maxsize=1)
def _operators() -> tuple[Doubles, list[int], list[int]]:
    """From rows of pixels to low frequencies, [windows * LOW, SIDE], for every window of a view;
    and which window each view has down and across.
    """
    windows: list[tuple[float, float]] = [(0.0, 1.0)]
    down, across = [0], [0]
    places = [(y, x, CROP) for y in (0, 0.5, 1) for x in (0, 0.5, 1) if (y, x) != (0.5, 0.5)]
    for y, x, side in [*places, (0.5, 0.5, INNER)]:
        for place, chosen in ((y, down), (x, across)):
            window = (place * (1 - side), place * (1 - side) + side)
            if window not in windows:
                windows.append(window)
            chosen.append(windows.index(window))
    return np.concatenate([_operator(*window) for window in windows]), down, across


def _operator(start: float, end: float) -> Doubles:
    """Averages the pixels from start to end (of 1) to CELLS, and takes the LOW lowest frequencies
    of the orthonormal cosine transform.
    """
    edges = SIDE * (start + (end - start) * np.arange(CELLS + 1) / CELLS)
    pixels = np.arange(SIDE)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    average = np.maximum(covered, 0) * CELLS / (SIDE * (end - start))
    place = np.pi * (np.arange(CELLS) + 0.5) / CELLS
    waves = np.cos(np.arange(LOW)[:, None] * place) * np.sqrt(2 / CELLS)
    waves[0] /= np.sqrt(2)
    rounded = np.rint(waves @ average * _BITS)
    # A flat image must give zeros. Rows of odd frequencies add up to zero by their symmetry.
    for row in rounded[2::2]:
        used = np.flatnonzero(row)
        each, remainder = divmod(int(row.sum()), len(used))
        row[used] -= each
        row[used[:remainder]] -= 1
    for row in rounded[1::2]:
        row[np.flatnonzero(row)[0]] -= row.sum()
    operator: Doubles = rounded / _BITS
    return operator


def visiting(full: Halves, crops: Halves) -> tuple[Halves, Bools]:
    """What images show to others, which compare it with their own wholes: the whole mirrored, the
    crops, and the crops mirrored. (The whole itself is compared by the one or the other anyway.)

    Args:
        full: [n, 143].
        crops: [n, 9, 143].

    Returns:
        [n, 19, 143], and bool [19]: whether it is one of the crops, to which the penalty applies.
    """
    visitors = np.concatenate([(full * MIRROR)[:, None], crops, crops * MIRROR], 1)
    return visitors, np.arange(VISITORS) > 0


def similarity(
    a_full: Halves, a_crops: Halves, b_full: Halves, b_crops: Halves, penalty: float
) -> Doubles:
    """How much images a are like the images b of the same rows, exactly.

    The highest dot product of the two wholes, of one whole with the other mirrored, and, less a
    penalty because there are many of them, of either whole with the other's crops, also mirrored.

    Args:
        a_full: [n, 143].
        a_crops: [n, 9, 143].
        b_full: [n, 143].
        b_crops: [n, 9, 143].
        penalty: of crops, from the calibration.

    Returns:
        float64 [n].
    """
    plain, crop = similarities(a_full, a_crops, b_full, b_crops)
    return np.maximum(plain, crop - penalty)


def similarities(
    a_full: Halves, a_crops: Halves, b_full: Halves, b_crops: Halves
) -> tuple[Doubles, Doubles]:
    """The two that `similarity` is made of, before the penalty: of the wholes, and of a whole with
    crops; exactly.
    """
    highest = [dots(a_full, b_full), np.full(len(a_full), -1.0)]
    for full, (other, crops) in ((a_full, (b_full, b_crops)), (b_full, (a_full, a_crops))):
        visitors, is_crop = visiting(other, crops)
        for view in range(VISITORS):
            best = highest[int(is_crop[view])]
            np.maximum(best, dots(full, visitors[:, view]), out=best)
    return highest[0], highest[1]
