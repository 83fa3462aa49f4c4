"""Whether two images show the same picture, by matching their details: a second opinion.

It is independent of any descriptor and dear (some 20 ms a pair), so it is asked about few pairs:
those that look alike though they should not, when a threshold is calibrated.

Blocks of one image, without their slow changes, are looked for in the other at several scales and
mirrored. In a copy most of them are found, and all at one displacement; in two pictures that are
only alike (a sky over a beach) the details are not the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, uniform_filter

SIDE = 64  # of the grey images that are compared, pixels
BLOCK = 16
SCALES = (1.0, 1.07, 1.14, 1.21, 1.29)  # of the other image; a crop to 60 % of the area: 1.29
SLACK = 5  # pixels of the square in which a block may be off: rotation by 5 degrees moves it by 2
STRAY = 2  # pixels that the whole may stand outside of the other
FOUND = 0.6  # share of the blocks that must match
SAME = 0.6  # mean correlation of the best of these
_SMOOTH = 5  # pixels of the mean that is taken off
_PLACES = [(y, x) for y in range(0, SIDE, BLOCK) for x in range(0, SIDE, BLOCK)]

Floats = np.ndarray[Any, np.dtype[np.float32]]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def same_picture(a: Pixels, b: Pixels) -> bool:
    """Whether grey images uint8 [64, 64] are copies of each other."""
    return agreement(a, b) >= SAME


def agreement(a: Pixels, b: Pixels) -> float:
    """Mean correlation of the best-matching blocks of one in the other at the best displacement, 0
    to 1; either may be a crop of the other.
    """
    return max(_inside(a, b), _inside(b, a))


def _inside(a: Pixels, b: Pixels) -> float:
    """How well a, as it is or mirrored, is found in b enlarged."""
    details = [_detail(turned.astype(np.float32)) for turned in (a, a[:, ::-1])]
    blocks = _unit(
        np.stack([d[y : y + BLOCK, x : x + BLOCK].ravel() for d in details for y, x in _PLACES])
    )
    best = 0.0
    for scale in SCALES:
        side = round(SIDE * scale)
        larger = Image.fromarray(b).resize((side, side), Image.Resampling.BILINEAR)
        best = max(best, _matched(blocks, np.asarray(larger, np.float32)))
    return best


def _detail(image: Floats) -> Floats:
    smooth: Floats = uniform_filter(image, _SMOOTH, mode="nearest")
    return image - smooth


def _unit(rows: Floats) -> Floats:
    rows = rows - rows.mean(1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    # Below one grey value a pixel there is noise and nothing to find.
    return np.where(length > BLOCK, rows / np.maximum(length, 1e-6), 0).astype(np.float32)


def _matched(blocks: Floats, image: Floats) -> float:
    windows = np.lib.stride_tricks.sliding_window_view(_detail(image), (BLOCK, BLOCK))
    side = len(windows)
    found = _unit(windows.reshape(side * side, -1)) @ blocks.T
    maps = maximum_filter(found.T.reshape(-1, side, side), (1, SLACK, SLACK), mode="nearest")
    maps = np.pad(maps, ((0, 0), (STRAY, STRAY), (STRAY, STRAY)), mode="edge")
    # The same displacement for all blocks: each map is read from its own block's place on.
    reach = len(image) - SIDE + 2 * STRAY + 1
    own = zip(_PLACES + _PLACES, maps, strict=True)
    moved = np.stack([one[y : y + reach, x : x + reach] for (y, x), one in own])
    blocks_of = moved.reshape(2, len(_PLACES), reach, reach)  # as it is, and mirrored
    count = max(1, round(FOUND * len(_PLACES)))
    least = len(_PLACES) - count
    ranked = np.partition(blocks_of, least, axis=1)[:, least:]
    return float(ranked.mean(1).max())
