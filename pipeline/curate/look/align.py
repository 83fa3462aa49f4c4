"""How one image lies in another: mirrored or not, and the affine map between them.

Both are squares, so that a stretched copy is nothing special. Details without the slow changes of
light are compared at 64 pixels: first as the images are, then at several scales and angles, all
places at once (Fourier transform). What fits best is refined by least squares (Lucas and Kanade
1981), robustly: what one image has and the other has not pulls little.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.fft import irfft2, rfft2
from scipy.ndimage import map_coordinates, uniform_filter

FIRST = 64  # pixels of the squares in which the place is looked for
LAST = 128  # and of the squares in which it is refined: a twentieth of a pixel is found there
SEARCHED = 32  # and of those in which all places are
SCALES = (0.78, 0.86, 0.93, 1.0, 1.08, 1.17, 1.28)  # a crop to 60 % of the area is 1.29
ANGLES = (-5.0, 0.0, 5.0)  # degrees
GOOD = 0.8  # agreement at which no other place is looked for
LEAST_OVERLAP = 0.45  # of either image
AGREED = 0.3  # agreement of the details from which on images lie over each other
NO_DETAILS = -0.5  # agreement of images that have none
STEPS = 12  # of the refinement at a size, at most

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Alignment:
    """Where the pixels of b are in a: `matrix` [2, 3] maps (x, y, 1) of b, from -1 to 1 across the
    image, to (x, y) of a; b is mirrored first.
    """

    mirrored: bool
    matrix: Array
    agreement: float


def align(a: Array, b: Array) -> Alignment:
    """The best alignment of two grey squares float32 [S, S] of one size, S at least 64."""
    levels = [(a, b)]
    while len(levels[-1][0]) > FIRST:
        levels.append((halved(levels[-1][0]), halved(levels[-1][1])))
    small_a, small_b = detail(levels[-1][0]), detail(levels[-1][1])
    tried = []
    for mirrored in (False, True):
        turned = small_b[:, ::-1] if mirrored else small_b
        tried.append(_refined(small_a, turned, mirrored, np.eye(2, 3)))
    best = max(tried, key=lambda one: one.agreement)
    if best.agreement < GOOD:
        for mirrored, matrix in _searched(small_a, small_b):
            turned = small_b[:, ::-1] if mirrored else small_b
            tried.append(_refined(small_a, turned, mirrored, matrix))
        best = max(tried, key=lambda one: one.agreement)
    for one, other in levels[-2::-1]:
        if len(one) > LAST:
            break
        turned = other[:, ::-1] if best.mirrored else other
        best = _refined(detail(one), detail(turned), best.mirrored, best.matrix)
    return best


def realigned(a: Array, b: Array, where: Alignment, allowed: Array) -> Alignment:
    """Once more where some pixels of b, mirrored as it may be, show something else.

    Args:
        a: grey [S, S], S at most LAST.
        b: likewise, mirrored already.
        where: the alignment so far.
        allowed: pixels of b that count.
    """
    again = _refined(detail(a), detail(b), where.mirrored, where.matrix, allowed)
    return again if again.agreement > AGREED else where


def halved(image: Array) -> Array:
    """Means of 2 x 2 pixels of [S, S] or [S, S, channels]."""
    means: Array = image[::2, ::2] + image[1::2, ::2]
    means += image[::2, 1::2]
    means += image[1::2, 1::2]
    means *= 0.25
    return means


def detail(image: Array) -> Array:
    """A grey image without its slow changes, of about the same contrast everywhere."""
    side = len(image)
    sharp = image - uniform_filter(uniform_filter(image, side // 8 + 1), side // 8 + 1)
    local = uniform_filter(sharp * sharp, side // 4 + 1)
    floor = 16.0 + 0.15 * float(local.mean())
    sharpened: Array = sharp / np.sqrt(local + floor)
    return sharpened


@lru_cache(maxsize=8)
def grid(side: int) -> tuple[Array, Array]:
    """X and y of each pixel, from -1 to 1 across the image."""
    line = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def warped(image: Array, matrix: Array, side: int) -> tuple[Array, Array]:
    """A square [S, S] as the pixels of the other see it, and which of them are inside of it."""
    x, y = grid(side)
    m = matrix.astype(np.float32)
    u = (m[0, 0] * x + m[0, 1] * y + m[0, 2] + 1) * (side / 2) - 0.5
    v = (m[1, 0] * x + m[1, 1] * y + m[1, 2] + 1) * (side / 2) - 0.5
    inside = (u > 0) & (u < side - 1) & (v > 0) & (v < side - 1)
    seen: Array = map_coordinates(image, [v, u], order=1, mode="nearest", output=np.float32)
    return seen, inside


def _refined(
    a: Array, b: Array, mirrored: bool, matrix: Array, allowed: Array | None = None
) -> Alignment:
    """Least squares from a start; `b` is mirrored already."""
    side = len(a)
    x, y = grid(side)
    best, best_matrix = -1.0, matrix
    for step in range(STEPS):
        seen, inside = warped(a, matrix, side)
        inside = inside if allowed is None else inside & allowed
        agreement = _agreement(seen, b, inside)
        if agreement > best:
            best, best_matrix = agreement, matrix
        elif agreement < best - 0.05 or step > 4:
            break
        if inside.mean() < LEAST_OVERLAP:
            break
        dy, dx = np.gradient(seen)
        error = (b - seen)[inside]
        scale = 1.5 * np.median(np.abs(error)) + 1e-3
        weight = 1 / (1 + (error / scale) ** 2)
        gx, gy, px, py = dx[inside], dy[inside], x[inside], y[inside]
        # Of the picture as it is seen: derivatives are those of b's pixels.
        jacobian = np.stack([gx * px, gx * py, gx, gy * px, gy * py, gy], 1) * (side / 2)
        weighted = jacobian * weight[:, None]
        normal = (weighted.T @ jacobian).astype(np.float64)
        normal += np.eye(6) * (1e-6 * np.trace(normal) + 1e-9)
        p = np.linalg.solve(normal, (weighted.T @ error).astype(np.float64))
        move = np.array([[1 + p[0], p[1], p[2]], [p[3], 1 + p[4], p[5]], [0, 0, 1]])
        matrix = (np.vstack([matrix, [0, 0, 1]]) @ move)[:2]
        if not 0.5 < abs(np.linalg.det(matrix[:, :2])) < 2 or np.abs(matrix).max() > 1.7:
            break
        if np.abs(p).max() * side / 2 < 0.02:
            seen, inside = warped(a, matrix, side)
            inside = inside if allowed is None else inside & allowed
            agreement = _agreement(seen, b, inside)
            if agreement > best:
                best, best_matrix = agreement, matrix
            break
    return Alignment(mirrored, best_matrix, best)


def _agreement(a: Array, b: Array, inside: Array) -> float:
    """Median of the correlations of blocks of 8 x 8, of those that have details."""
    block = len(a) // 8

    def sums(values: Array) -> Array:
        values = np.where(inside, values, 0)
        return np.asarray(values.reshape(8, block, 8, block).sum((1, 3)), np.float64)

    full = sums(np.ones_like(a))
    use = full >= 0.6 * block * block
    if use.sum() < 64 * LEAST_OVERLAP * 0.8:
        return -1.0
    aa, bb, ab = (sums(v)[use] for v in (a * a, b * b, a * b))
    strong = np.maximum(aa, bb) > 0.05 * full[use]
    if strong.sum() < 4:
        return NO_DETAILS
    each = ab[strong] / np.sqrt(np.maximum(aa * bb, 1e-9))[strong]
    weight = np.sqrt(np.maximum(aa, bb))[strong]
    order = np.argsort(each)
    place = np.searchsorted(np.cumsum(weight[order]), weight.sum() * 0.4)
    return float(each[order[min(place, len(order) - 1)]])


def _searched(a: Array, b: Array) -> list[tuple[bool, Array]]:
    """The best places of a and b in each other, one for each way round."""
    a, b = halved(a), halved(b)
    side, full = SEARCHED, 2 * SEARCHED
    matrices = [_turned(scale, angle) for scale in SCALES for angle in ANGLES]
    seen, masks = [], []
    for matrix in matrices:
        one, inside = warped(a, matrix, side)
        seen.append(np.where(inside, one, 0))
        masks.append(inside.astype(np.float32))
    stack, mask = np.stack(seen), np.stack(masks)
    of_a = [rfft2(values, (full, full)) for values in (stack, stack * stack, mask)]
    starts = []
    reach = side // 3
    near = np.r_[0 : reach + 1, full - reach : full]
    for mirrored in (False, True):
        turned = b[:, ::-1] if mirrored else b
        of_b = [rfft2(v, (full, full)) for v in (turned, turned * turned, np.ones_like(turned))]
        # d: b's pixel x shows what a has at x + d.
        both = irfft2(of_a[0] * np.conj(of_b[0]), (full, full))[:, near][:, :, near]
        ours = irfft2(of_a[1] * np.conj(of_b[2]), (full, full))[:, near][:, :, near]
        theirs = irfft2(of_a[2] * np.conj(of_b[1]), (full, full))[:, near][:, :, near]
        area = irfft2(of_a[2] * np.conj(of_b[2]), (full, full))[:, near][:, :, near]
        score = both / np.sqrt(np.maximum(ours * theirs, 1e-3))
        score = np.where(area >= LEAST_OVERLAP * side * side, score, -1)
        which, dy, dx = np.unravel_index(int(score.argmax()), score.shape)
        shift = [near[n] - full * (near[n] >= side) for n in (dx, dy)]
        matrix = matrices[which].copy()
        matrix[:, 2] += matrix[:, :2] @ (np.array(shift) * 2 / side)
        starts.append((mirrored, matrix))
    return starts


def _turned(scale: float, angle: float) -> Array:
    s, c = np.sin(np.radians(angle)) * scale, np.cos(np.radians(angle)) * scale
    return np.array([[c, -s, 0.0], [s, c, 0.0]])
