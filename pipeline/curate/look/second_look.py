"""A second look at two images that are alike: is there a place where they differ in content?

Vectors say that two images are alike as a whole. Two invoices of one layout are, and so are two
frames with another number plate; both are different images. So before one image goes for another,
both are laid over each other (`align`), brought to the same light and the same sharpness, and
compared place by place. What counts is the worst place: the difference there, against what
compression and a small shift explain. In doubt they differ, and both stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter

from pipeline.curate.look.align import (
    AGREED,
    LAST,
    NO_DETAILS,
    Alignment,
    align,
    halved,
    realigned,
    warped,
)
from pipeline.curate.look.light import LUMA, Blur, equal_blur, same_light, smoothed
from pipeline.curate.look.overlaid import rows_of_overlay

SIDES = (64, 128, 256, 512)  # of the squares that are compared, pixels
ENOUGH = 0.7  # a square may have so much less pixels on a side than the image
LIMIT = 5.0  # squared difference at a place, over what may be there
NOISE = (3.0, 12.0)  # grey values that may differ anywhere: in equal and in poor copies
SHIFT = (0.1, 0.35)  # share of the squared gradient that a shift explains, likewise
COLOUR_NOISE = (6.0, 16.0)
EXACT = {NOISE: 0.005, COLOUR_NOISE: 0.02}  # ratio at edges of compressed images, or more
EXACT_NOISE, EXACT_SHIFT = 1.0, 0.02  # what may differ where all edges are reproduced exactly
SOFT = (2.0, 2.0)  # blur before light is compared that sharpness has not been
GREY = 12.0  # difference of channels below which a pixel has no colour
COVERED = (0.45, 0.8)  # least share of both images, and of one of them, that must be compared

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Verdict:
    """What the second look says.

    Attributes:
        same: both show the same; only then one may go for the other.
        reason: "" where they do, else `differ` (in content), `colour`, or `undecided`: too little
            of both could be laid over each other, or an image could not be read.
        score: the worst place; LIMIT is where it counts as different.
        place: x and y of that place in the second image, shares of its sides.
    """

    same: bool
    reason: str
    score: float
    place: tuple[float, float]


def form_of(rgb: Array) -> Array:
    """An image uint8 [H, W, 3] as it is compared: a square of one of SIDES."""
    longest = max(rgb.shape[:2])
    side = next((side for side in SIDES if side >= ENOUGH * longest), SIDES[-1])
    square = Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square)


def second_look(one: Array, other: Array) -> Verdict:
    """Compares two forms (`form_of`); the same verdict whatever else is compared."""
    side = min(len(one), len(other))
    a, b = (_reduced(form.astype(np.float32), side) for form in (one, other))
    small_a, small_b = (_reduced(image, LAST) for image in (a, b))
    where = align(small_a @ LUMA, small_b @ LUMA)
    if where.mirrored:
        b, small_b = b[:, ::-1], small_b[:, ::-1]
    small_a, inside = _seen(small_a, where)
    covered = float(inside.mean())
    shares = sorted((covered, covered * abs(float(np.linalg.det(where.matrix[:, :2])))))
    if where.agreement < AGREED and where.agreement != NO_DETAILS:
        return Verdict(False, "differ", np.inf, (0.5, 0.5))
    if shares[0] < COVERED[0] or shares[1] < COVERED[1]:
        return Verdict(False, "undecided", np.inf, (0.5, 0.5))
    compared = _compared(a, b, small_a, small_b, where, inside)
    if compared.score > LIMIT:
        rows = rows_of_overlay(small_a, small_b, compared.differs, inside)
        if rows is not None:
            allowed = np.ones_like(inside)
            allowed[rows] = False
            raw = _reduced(_reduced(one.astype(np.float32), side), LAST)
            where = realigned(raw @ LUMA, small_b @ LUMA, where, allowed)
            small_a, inside = _seen(raw, where)
            inside &= allowed
            compared = _compared(a, b, small_a, small_b, where, inside)
    if compared.score <= LIMIT:
        return Verdict(True, "", compared.score, compared.place)
    x, y = compared.place
    reason = "colour" if compared.colour else "differ"
    return Verdict(False, reason, compared.score, (1 - x if where.mirrored else x, y))


@dataclass(frozen=True)
class _Compared:
    """The worst place, whether it is one of colour, and all that count as different."""

    score: float
    place: tuple[float, float]
    colour: bool
    differs: Array


def _compared(
    a: Array, b: Array, small_a: Array, small_b: Array, where: Alignment, inside: Array
) -> _Compared:
    """Compares what is inside; a is as it was, the small ones are laid over each other."""
    side, small = len(a), len(small_a)
    few = inside[::2, ::2]
    plain = [
        bool(np.quantile(np.ptp(x[::2, ::2][few], -1), 0.995) < GREY) for x in (small_a, small_b)
    ]
    if any(plain):
        a, b, small_a, small_b = ((x @ LUMA)[..., None] for x in (a, b, small_a, small_b))
    weights = LUMA if a.shape[-1] == 3 else np.ones(1, np.float32)
    soft_a, soft_b = (smoothed(x, SOFT) for x in (small_a, small_b))
    light = same_light(soft_a, soft_b, inside)
    blur = equal_blur(light.a(small_a) @ weights, light.b(small_b) @ weights, inside)
    small_a, small_b = blur.a(small_a), blur.b(small_b)
    light = same_light(small_a, small_b, inside)
    small_a, small_b = light.a(small_a), light.b(small_b)
    altered = light.changed or blur.down > 0
    inner = _inner(inside, blur)
    if small == side:
        grey_a, grey_b, inner_there = small_a @ weights, small_b @ weights, inner
    else:
        grey_a, inside_there = warped(light.a(a) @ weights, where.matrix, side)
        grey_a, grey_b = blur.a(grey_a), blur.b(light.b(b) @ weights)
        allowed = np.repeat(np.repeat(inside, side // small, 0), side // small, 1)
        inner_there = _inner(inside_there & allowed, blur)
    score = _differences(grey_a, grey_b, inner_there, light.gain, altered)
    y, x = np.unravel_index(int(score.argmax()), score.shape)
    worst, place = float(score[y, x]), (float((x + 0.5) / side), float((y + 0.5) / side))
    differs = _largest_of(score, small) > LIMIT
    if any(plain):
        return _Compared(worst, place, False, differs)
    colour = _colours(small_a, small_b, inner, altered)
    differs |= np.repeat(np.repeat(colour > LIMIT, 2, 0), 2, 1)
    y, x = np.unravel_index(int(colour.argmax()), colour.shape)
    if colour[y, x] <= max(worst, LIMIT) or worst > LIMIT:
        return _Compared(max(worst, min(LIMIT, float(colour[y, x]))), place, False, differs)
    place = (float((x + 0.5) / len(colour)), float((y + 0.5) / len(colour)))
    return _Compared(float(colour[y, x]), place, True, differs)


def _differences(a: Array, b: Array, inner: Array, gain: float, altered: bool) -> Array:
    """At each place the squared difference over what may be there; 0 outside of `inner`."""
    side = len(a)
    fine = side / 320  # compression is in the finest details
    a, b = (gaussian_filter(x, fine, truncate=2.5) for x in (a, b))
    return _over_noise([(a - b) * gain], [a * gain, b * gain], inner, NOISE, altered)


def _over_noise(
    differences: list[Array],
    images: list[Array],
    inner: Array,
    noise: tuple[float, float],
    altered: bool,
) -> Array:
    width = 2 * max(1, len(inner) // 128) + 1
    square = uniform_filter(sum(d * d for d in differences), width)
    steep = uniform_filter(sum(_steepness(x) for x in images) / 2, width)
    low, high = noise
    low = (low + high) / 2 if altered else low
    least = sum(SHIFT) / 2 if altered else SHIFT[0]
    usual = np.sort(square[inner][::5])
    middle = float(usual[len(usual) // 2]) if len(usual) else 0.0
    floor = min(max(3 * middle, low * low), high * high)
    edges = inner & (steep > floor)
    ratio = np.sort((square / (steep + floor))[edges][::3])
    if not altered and len(ratio):
        # A frame of a series, one digit of a table: all else is as it was, so little explains this.
        inexact = min(1.0, float(ratio[3 * len(ratio) // 4]) / EXACT[noise])
        low = EXACT_NOISE + inexact * (low - EXACT_NOISE)
        least = EXACT_SHIFT + inexact * (least - EXACT_SHIFT)
        floor = min(max(3 * middle, low * low), high * high)
    share = 4 * float(ratio[len(ratio) // 2]) if len(ratio) > 50 else least
    share = min(max(share, least), SHIFT[1])
    return np.where(inner, square / (floor + share * steep), 0)


def _steepness(image: Array) -> Array:
    dy, dx = np.gradient(image)
    return np.asarray(dx * dx + dy * dy)


def _colours(a: Array, b: Array, inner: Array, altered: bool) -> Array:
    """Likewise of the differences of channels, at half the size."""
    a, b = (halved(x) for x in (a, b))
    inner = halved(inner.astype(np.float32)) > 0.999
    both = [[x[..., 0] - x[..., 1], x[..., 2] - x[..., 1]] for x in (a, b)]
    differences = [one - other for one, other in zip(*both, strict=True)]
    images = [*both[0], *both[1], a.mean(-1), b.mean(-1)]
    return _over_noise(differences, images, inner, COLOUR_NOISE, altered)


def _seen(image: Array, where: Alignment) -> tuple[Array, Array]:
    channels = [warped(image[..., c], where.matrix, len(image)) for c in range(image.shape[-1])]
    return np.stack([one for one, _ in channels], -1), channels[0][1]


def _inner(inside: Array, blur: Blur) -> Array:
    """Without the pixels at the rim: there a frame or a resampled edge may show, and a blur sees
    what is outside.
    """
    side = len(inside)
    margin = max(1, side // 64)
    inner = uniform_filter(inside.astype(np.float32), 2 * margin + 1, mode="nearest") > 0.999
    for axis, size in enumerate((blur.down, blur.across)):
        rim = max(1, side // 100, round(2 * size * side / 256))
        view = np.moveaxis(inner, axis, 0)
        view[:rim] = view[-rim:] = False
    return np.asarray(inner)


def _reduced(image: Array, side: int) -> Array:
    while len(image) > side:
        image = halved(image)
    return image


def _largest_of(image: Array, side: int) -> Array:
    step = len(image) // side
    return np.asarray(image.reshape(side, step, side, step).max((1, 3)))
