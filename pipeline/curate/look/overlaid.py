"""A bar with text that was laid across a photo: the one difference that does not make two pictures.

It spans the picture, one of the two images has it, the other goes on below it. Anything smaller (a
plate, a label, a thing that was not there) may be what the picture is about.
"""

from __future__ import annotations

from typing import Any

import numpy as np

HEIGHT = (0.04, 0.25)  # of the bar, shares of the side
ACROSS = 0.5  # share of a row that must differ
GAP = 2  # rows in the bar that may differ less
FLAT = 14.0  # a value of the bar's colour may differ so much from it
MAIN, TEXT = 0.4, 0.62  # share of the bar that is of its colour, and of that and the text's
PURE, PURE_ROWS = 0.93, 0.06  # a row of the bar's colour, and share of such rows: text has margins
EVERYWHERE = 0.1  # share of its colour in each tenth of its length but one: it may end before
UNDER = 0.7  # share of what is below the bar that may be of the bar's colour
MARGIN = 2  # rows beside the bar that are not compared either
ONE_COLOUR, EVEN = 0.65, 0.75  # shares of one colour, and of equal neighbours, of what is no photo

Array = np.ndarray[Any, Any]


def rows_of_overlay(a: Array, b: Array, differs: Array, inside: Array) -> slice | None:
    """The rows of a bar, and a little more, or None where there is no such bar.

    Args:
        a: float32 [S, S, 3], as b sees it.
        b: float32 [S, S, 3].
        differs: [S, S], where they do.
        inside: [S, S], what is compared.
    """
    side = len(a)
    width = np.maximum(inside.sum(1), 0.3 * side)
    top, end = _longest(np.flatnonzero((differs & inside).sum(1) > ACROSS * width))
    if not HEIGHT[0] * side <= end - top <= HEIGHT[1] * side:
        return None
    rows = slice(top + 1, end - 1)
    use = inside[rows]
    over, under = _main(a[rows], use), _main(b[rows], use)
    bars = [_is_bar(x[rows], use, main) for x, main in ((a, over), (b, under))]
    if bars[0] == bars[1]:
        return None
    picture, colour = (b, over) if bars[0] else (a, under)
    below = float(_near(picture[rows], colour)[use].mean())
    if below > UNDER or _is_graphic(picture, inside):
        return None
    return slice(max(0, top - MARGIN), end + MARGIN)


def _longest(rows: Array) -> tuple[int, int]:
    """The longest run of rows, small gaps allowed: its first row, and the one after its last."""
    if not len(rows):
        return 0, 0
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > GAP + 1) + 1)
    longest = max(runs, key=len)
    return int(longest[0]), int(longest[-1]) + 1


def _is_bar(rows: Array, use: Array, main: Array) -> bool:
    """Whether rows [H, W, 3] are of one colour from side to side, with text of another one."""
    if use.sum() < 50:
        return False
    near = _near(rows, main)
    share = float(near[use].mean())
    text = rows[use & ~near]
    both = share
    if len(text) > 20:
        second = np.median(
            text[np.abs(text - main).sum(-1) >= np.abs(text - main).sum(-1).mean()], 0
        )
        both += (1 - share) * float((np.abs(text - second).max(-1) < 4 * FLAT).mean())
    pure = (near & use).sum(1) >= PURE * np.maximum(use.sum(1), 1)
    parts = np.array_split(np.arange(rows.shape[1]), 10)
    each = sorted(float(near[:, p][use[:, p]].mean()) for p in parts if use[:, p].any())
    return (
        share > MAIN
        and both > TEXT
        and float(pure.mean()) > PURE_ROWS
        and each[min(1, len(each) - 1)] > EVERYWHERE
    )


def _is_graphic(image: Array, inside: Array) -> bool:
    """Whether it is drawn: mostly of one colour, or mostly of exactly equal neighbours."""
    steps = np.abs(np.diff(image, axis=1)).max(-1)
    even = float((steps < 1)[inside[:, 1:]].mean())
    return even > EVEN or float(_near(image, _main(image, inside))[inside].mean()) > ONE_COLOUR


def _near(values: Array, colour: Array) -> Array:
    return np.asarray(np.abs(values - colour).max(-1) < FLAT)


def _main(image: Array, use: Array) -> Array:
    """The most frequent colour of what is used of [H, W, 3]."""
    values = image[use]
    if not len(values):
        return np.zeros(3, np.float32)
    codes = (values / 16).astype(np.int64) @ np.array([256, 16, 1])
    number, count = np.unique(codes, return_counts=True)
    return np.asarray(np.median(values[codes == number[count.argmax()]], 0))
