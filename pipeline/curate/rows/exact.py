"""Similarities that are exact, so that every machine and every order of work decides alike.

Vectors are kept in half precision. Their elements are multiples of 2^-24, so products are
multiples of 2^-48; vectors have unit length, so by Cauchy and Schwarz every partial sum of a dot
product stays below 2. Such numbers have at most 49 binary digits and double precision holds 53: a
dot product in doubles has no rounding at all, whatever the order of its sum. So fast single
precision finds the candidates with a margin, and doubles decide. The same holds for sums of vectors
(k-means): doubles add up to 2^28 of them without rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

BLOCK = 2**21  # products at once: 8 MiB of single precision, which a cache holds
COLUMNS = 16  # centres of which one maximum is taken, to find a bound for the nearest ones
DENSE = 1 / 64  # share of pairs above which all products in doubles are cheaper than single ones

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
    products: Doubles = np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
    return products


def device() -> str:
    """`cuda` where torch sees a GPU, else empty: products are made by numpy then."""
    import sys

    torch: Any = sys.modules.get("torch")
    if torch is None:
        # Ray hides GPUs from tasks that asked for none; torch takes seconds to import.
        import os

        if os.environ.get("CUDA_VISIBLE_DEVICES", "") in ("", "-1", "NoDevFiles"):
            return ""
        import torch
    return "cuda" if torch.cuda.is_available() else ""


class Centres:
    """Centres at hand for finding the nearest of many vectors.

    Args:
        centres: half precision [k, d] of unit length.
        on: torch device of the fast products; default: a GPU where there is one, else numpy. The
            results are the same.
    """

    def __init__(self, centres: Halves, on: str | None = None) -> None:
        self.centres = centres
        on = device() if on is None else on
        self._wide = max(1, -(-len(centres) // COLUMNS)) * COLUMNS
        self._step = max(1, 32 * BLOCK // self._wide) if on else max(16, BLOCK // self._wide)
        self._products: Any = (
            _OnDevice(centres, self._wide, on) if on else _OnCpu(centres, self._wide)
        )

    def __len__(self) -> int:
        return len(self.centres)

    def nearest(self, vectors: Halves, count: int) -> tuple[np.ndarray[Any, Any], Doubles]:
        """The `count` centres with the highest dot product of each vector, exactly ordered.

        Equal products are ordered by the centre's number.

        Args:
            vectors: [n, d] of unit length.
            count: at most k.

        Returns:
            int32 [n, count] and the exact products [n, count].
        """
        which = self.numbers(vectors, count)
        similarity = np.empty(which.shape)
        step = max(1, BLOCK // max(1, vectors.shape[1]))
        for begin in range(0, len(vectors), step):
            rows = slice(begin, begin + step)
            wide = vectors[rows].astype(np.float64)
            for column in range(which.shape[1]):
                of = self.centres[which[rows, column]].astype(np.float64)
                similarity[rows, column] = np.einsum("nd,nd->n", wide, of)
        return which, similarity

    def nearest_one(self, vectors: Halves) -> tuple[Ints, Doubles]:
        """The nearest centre of each vector, the lowest number of equals, and the exact product.

        Returns:
            int64 [n] and float64 [n].
        """
        if not len(vectors):
            return np.zeros(0, np.int64), np.zeros(0)
        numbers, similarity = self.nearest(vectors, 1)
        return numbers[:, 0].astype(np.int64), similarity[:, 0]

    def numbers(self, vectors: Halves, count: int) -> np.ndarray[Any, Any]:
        """As `nearest`, without the products: only those that are close are made in doubles.

        Returns:
            int32 [n, count].
        """
        count = min(count, len(self))
        which = np.empty((len(vectors), count), np.int32)
        slack = 2 * margin(vectors.shape[1])
        for begin in range(0, len(vectors) if count else 0, self._step):
            rows = vectors[begin : begin + self._step]
            numbers, values = self._products.candidates(rows, count, slack)
            which[begin : begin + self._step] = _ordered(rows, self.centres, numbers, values, count)
        return which


def nearest(
    vectors: Halves, centres: Halves, count: int, on: str | None = None
) -> tuple[np.ndarray[Any, Any], Doubles]:
    """As `Centres.nearest`, for centres that are used once."""
    return Centres(centres, on).nearest(vectors, count)


def nearest_numbers(
    vectors: Halves, centres: Halves, count: int, on: str | None = None
) -> np.ndarray[Any, Any]:
    """As `Centres.numbers`, for centres that are used once."""
    return Centres(centres, on).numbers(vectors, count)


class _OnCpu:
    """Products of blocks of vectors with all centres, and which of them may be the highest."""

    def __init__(self, centres: Halves, wide: int) -> None:
        self.centres = centres.astype(np.float32)
        self.wide = wide
        self.fast: Floats = np.empty((0, wide), np.float32)

    def candidates(
        self, rows: Halves, count: int, slack: float
    ) -> tuple[np.ndarray[Any, Any], Floats]:
        """Numbers [n, w] and products [n, w] of all centres that can be among the `count` nearest.

        Places that a row does not need have number k or more and product -inf.
        """
        n, k = len(rows), len(self.centres)
        if len(self.fast) < n:
            self.fast = np.full((n, self.wide), -np.inf, np.float32)
        fast = self.fast[:n]
        np.matmul(rows.astype(np.float32), self.centres.T, out=fast[:, :k])
        # At least `count` centres have a product of at least the count-th highest of the maxima.
        highest = fast
        while highest.shape[1] % 2 == 0 and highest.shape[1] // 2 >= max(count, k // COLUMNS):
            half = highest.shape[1] // 2
            highest = np.maximum(highest[:, :half], highest[:, half:])
        if count == 1:
            bound = highest.max(1)
        else:
            place = highest.shape[1] - count
            bound = np.partition(highest, place, axis=1)[:, place]
        flat = np.flatnonzero(fast >= (bound - np.float32(slack))[:, None])
        row = flat // self.wide
        counts = np.bincount(row, minlength=n)
        place_in_row = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
        numbers = np.full((n, int(counts.max())), self.wide, np.int32)
        values = np.full(numbers.shape, -np.inf, np.float32)
        numbers[row, place_in_row] = flat - row * self.wide
        values[row, place_in_row] = fast.reshape(-1)[flat]
        return numbers, values


class _OnDevice:
    """The same with torch. Single precision throughout: no TF32, whose products are rounded."""

    def __init__(self, centres: Halves, wide: int, on: str) -> None:
        import torch

        self.torch, self.on, self.wide = torch, on, wide
        self.centres = torch.from_numpy(np.array(centres)).to(on).float()

    def candidates(
        self, rows: Halves, count: int, slack: float
    ) -> tuple[np.ndarray[Any, Any], Floats]:
        """As on the CPU."""
        torch, k = self.torch, len(self.centres)
        with full_precision(torch):
            fast = torch.from_numpy(np.array(rows)).to(self.on).float() @ self.centres.T
        width = min(k, count + 8)
        while True:
            values, numbers = torch.topk(fast, width, dim=1)
            # All that can matter are seen once the last one seen is below the slack.
            if width == k or bool((values[:, -1] < values[:, count - 1] - slack).all()):
                return numbers.int().cpu().numpy(), values.cpu().numpy()
            width = min(k, 2 * width)


@contextmanager
def full_precision(torch: Any) -> Iterator[None]:
    """Inside, matrix products of single precision are made in single precision (no TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ordered(
    rows: Halves,
    centres: Halves,
    candidates: np.ndarray[Any, Any],
    values: Floats,
    count: int,
) -> np.ndarray[Any, Any]:
    """The first `count` candidates of each row by exact product, then by number, [n, count]."""
    order = np.argsort(-values, axis=1, kind="stable")[:, : count + 1]
    best = np.take_along_axis(candidates, order, 1)
    sorted_values = np.take_along_axis(values, order, 1)
    which = best[:, :count]
    slack = np.float32(2 * margin(rows.shape[1]))
    with np.errstate(invalid="ignore"):  # -inf less -inf
        close = (sorted_values[:, :-1] - sorted_values[:, 1:] <= slack).any(1)
    unsure = np.flatnonzero(close)
    step = max(1, BLOCK // (candidates.shape[1] * rows.shape[1]))
    for begin in range(0, len(unsure), step):
        part = unsure[begin : begin + step]
        real = values[part] > -np.inf
        numbers = np.where(real, candidates[part], len(centres))
        of = centres[np.minimum(numbers, len(centres) - 1)].astype(np.float64)
        exact = np.einsum("nd,nwd->nw", rows[part].astype(np.float64), of)
        exact[~real] = -np.inf
        first = np.lexsort((numbers, -exact), axis=1)[:, :count]
        which[part] = np.take_along_axis(numbers, first, 1)
    return which


def pairs_above(
    a: Halves | Floats,
    b: Halves | Floats,
    threshold: float | np.ndarray[Any, Any],
    fast: Floats | None = None,
) -> tuple[Ints, Ints, Doubles]:
    """Rows (i of a, j of b) whose exact dot product is above the threshold, and the products.

    Args:
        a: [n, d], values of half precision (in single precision they need not be converted).
        b: [m, d], likewise.
        threshold: of the dot product, one number or [n].
        fast: the products in single precision [n, m], where they are at hand.
    """
    if fast is None:
        fast = a.astype(np.float32, copy=False) @ b.astype(np.float32, copy=False).T
    bound = np.asarray(threshold, np.float64)
    lowest = (bound - margin(a.shape[1])).astype(np.float32)
    flat = np.flatnonzero(fast > (lowest[:, None] if lowest.ndim else lowest))
    i, j = np.divmod(flat, max(1, fast.shape[1]))
    if len(flat) > DENSE * fast.size:
        exact = (a.astype(np.float64) @ b.astype(np.float64).T).reshape(-1)[flat]
    else:
        exact = np.empty(len(flat))
        step = max(1, BLOCK // max(1, a.shape[1]))
        for begin in range(0, len(flat), step):
            part = slice(begin, begin + step)
            exact[part] = np.einsum(
                "nd,nd->n", a[i[part]].astype(np.float64), b[j[part]].astype(np.float64)
            )
    above = exact > (bound[i] if bound.ndim else bound)
    return i[above], j[above], exact[above]
