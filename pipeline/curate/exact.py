"""Similarities that are exact, so that every machine and every order of work decides alike.

Vectors are kept in half precision. Their elements are multiples of 2^-24, so products are
multiples of 2^-48; vectors have unit length, so by Cauchy and Schwarz every partial sum of a dot
product stays below 2. Such numbers have at most 49 binary digits and double precision holds 53: a
dot product in doubles has no rounding at all, whatever the order of its sum. So fast single
precision finds the candidates with a margin, and doubles decide. The same holds for sums of vectors
(k-means): doubles add up to 2^28 of them without rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
Halves = np.ndarray[Any, np.dtype[np.float16]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]


def margin(dim: int) -> float:
    """More than a dot product of two unit vectors in single precision can be wrong, any order."""
    return 4.0 * dim * 2.0**-24


def unit_half(vectors: np.ndarray[Any, Any]) -> Halves:
    """[n, d] scaled to unit length and rounded to half precision; zero vectors stay zero."""
    wide = np.asarray(vectors, np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / np.where(length > 0, length, 1.0)).astype(np.float16)


def dots(a: Halves, b: Halves) -> Doubles:
    """Exact dot products of rows of a with the same rows of b, [n]."""
    found: Doubles = np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
    return found


def nearest(vectors: Halves, centres: Halves, count: int) -> tuple[np.ndarray[Any, Any], Doubles]:
    """The `count` centres with the highest dot product of each vector, exactly ordered.

    Equal products are ordered by the centre's number.

    Args:
        vectors: [n, d] of unit length.
        centres: [k, d] of unit length.
        count: at most k.

    Returns:
        int32 [n, count] and the exact products [n, count].
    """
    n, k = len(vectors), len(centres)
    count = min(count, k)
    spare = min(k, count + 1)
    fast = vectors.astype(np.float32) @ centres.astype(np.float32).T
    if spare < k:
        found = np.argpartition(-fast, spare - 1, axis=1)[:, :spare]
        lowest = np.take_along_axis(fast, found, 1).min(1)
        # More than `spare` within the margin of the last: these rows need a look at all centres.
        close = (fast >= (lowest - 2 * margin(vectors.shape[1]))[:, None]).sum(1) > spare
    else:
        found, close = np.broadcast_to(np.arange(k), (n, k)), np.zeros(n, bool)
    wide = vectors.astype(np.float64)
    exact = np.empty((n, spare))
    for column in range(spare):
        exact[:, column] = np.einsum("nd,nd->n", wide, centres[found[:, column]].astype(np.float64))
    order = np.lexsort((found, -exact), axis=1)[:, :count]
    which = np.take_along_axis(found, order, 1).astype(np.int32)
    similarity = np.take_along_axis(exact, order, 1)
    if close.any():
        rows = np.flatnonzero(close)
        all_of = wide[rows] @ centres.astype(np.float64).T
        numbers = np.broadcast_to(np.arange(k), all_of.shape)
        order = np.lexsort((numbers, -all_of), axis=1)[:, :count]
        which[rows] = order
        similarity[rows] = np.take_along_axis(all_of, order, 1)
    return which, similarity


def pairs_above(
    a: Halves, b: Halves, threshold: float, fast: Floats | None = None
) -> tuple[Ints, Ints, Doubles]:
    """Rows (i of a, j of b) whose exact dot product is above the threshold, and the products.

    Args:
        a: [n, d].
        b: [m, d].
        threshold: of the dot product.
        fast: the products in single precision [n, m], where they are at hand.
    """
    if fast is None:
        fast = a.astype(np.float32) @ b.astype(np.float32).T
    i, j = np.nonzero(fast > threshold - margin(a.shape[1]))
    exact = dots(a[i], b[j])
    above = exact > threshold
    return i[above], j[above], exact[above]
