"""Cosines that are the same on every device, in every order and in any blocks.

Unit vectors are taken relative to a point near their middle, and each is rounded to multiples of
one power of two: 2^-26 of its length, or 2^-24 of its largest value where that is more. So products
of two are multiples of one number, and by Cauchy and Schwarz no partial sum of them is above 2^52
times that number: double precision adds them without any rounding. Of unit vectors q and r that are
u and v relative to the middle, the cosine is 1 - |u - v|^2 / 2. Rounding changes it by less than a
millionth of the standard deviation of the cosines. With a LayerScale of 1e-5 cosines of an
untrained backbone differ by 1e-9, which single precision alone would lose.

Single precision finds which rows can be among the k best, with a margin that is larger than its
error. Where it cannot tell, all rows are compared in doubles.

`search/exact.py` is for few queries and any number of rows on a CPU; this one is for as many
queries as rows, and for rankings of all rows, on GPUs too.

Shapes: N rows of the reference, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError

BITS = 24  # of a number in single precision
LENGTH_BITS = 26  # products of two such vectors need 52 bits; doubles have 53
MIDDLE_ROWS = 4096  # that say where the middle is; any point near the vectors will do
VALUES_AT_ONCE = 1 << 22  # of vectors in doubles: 32 MiB
NEAR_VALUES = 1 << 18  # 2 MiB, which a cache holds
RANKED_AT_ONCE = 1 << 24  # products in doubles: 128 MiB, and as much twice for work

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Placed:
    """Unit vectors relative to a middle, rounded so that their products are exact.

    Attributes:
        offsets: float32 [n, D], the unit vectors less the middle.
        half: float64 [n], half of their squared lengths; 1/2 more for a zero vector, so that all
            its cosines are 0.
        zero: bool [n], vectors without a direction.
    """

    offsets: Tensor
    half: Tensor
    zero: Tensor

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, rows: slice | Tensor) -> Placed:
        return Placed(self.offsets[rows], self.half[rows], self.zero[rows])

    @property
    def own(self) -> Tensor:
        """What a cosine has beside its `ranking`: of the query alone, float64 [n]."""
        return (1 - self.half).masked_fill(self.zero, 0)

    def to(self, device: torch.device | str) -> Placed:
        """On a device."""
        return Placed(self.offsets.to(device), self.half.to(device), self.zero.to(device))


@dataclass(frozen=True)
class Frame:
    """What vectors are relative to; two sets that are compared need the same.

    Attributes:
        origin: float64 [D], taken off before vectors get unit length; None for nothing.
        middle: float64 [D], taken off their unit vectors.
    """

    origin: Doubles | None
    middle: Doubles

    @classmethod
    def of(cls, first: npt.NDArray[Any], origin: Doubles | None = None) -> Frame:
        """Of the first rows [n, D] of the reference."""
        units, _ = _units(first[:MIDDLE_ROWS], origin)
        return cls(origin, units.sum(0) / max(1, len(units)))

    def placed(self, vectors: npt.NDArray[Any], first: int = 0) -> Placed:
        """Vectors [n, D] of any scale. Made by numpy row by row, so the same on every machine.

        Args:
            vectors: of any float.
            first: number of the first row, for the error.

        Raises:
            DataError: a value is no finite number.
        """
        count, dim = vectors.shape
        offsets = np.empty((count, dim), np.float32)
        half, zero = np.empty(count), np.empty(count, np.bool_)
        step = max(1, NEAR_VALUES // max(1, dim))
        for start in range(0, count, step):
            part = slice(start, start + step)
            units, zero[part] = _units(vectors[part], self.origin, first + start)
            units -= self.middle
            _, length = np.frexp(np.sqrt((units * units).sum(1)))
            _, largest = np.frexp(np.abs(units).max(1, initial=0))
            grain = np.ldexp(1.0, np.maximum(length - LENGTH_BITS, largest - BITS))[:, None]
            units /= grain
            np.rint(units, out=units)
            units *= grain
            offsets[part] = units
            half[part] = (units * units).sum(1) / 2 + zero[part] / 2
        return Placed(*(torch.from_numpy(x) for x in (offsets, half, zero)))


def _units(
    vectors: npt.NDArray[Any], origin: Doubles | None, first: int = 0
) -> tuple[Doubles, npt.NDArray[np.bool_]]:
    """Unit vectors in doubles, and which had no direction and stay zero."""
    wide = np.array(vectors, np.float64, order="C")  # sums below are along rows
    if origin is not None:
        wide -= origin
    lengths = np.sqrt((wide * wide).sum(1))  # along the contiguous axis: pairwise, row by row
    wrong = np.flatnonzero(~np.isfinite(lengths))
    if len(wrong):
        raise DataError(
            f"features hold values that are no finite numbers, {len(wrong):,} rows of "
            f"{len(wide):,}; the first is row {first + int(wrong[0]):,}",
            "embed these images again, in float32 if the model ran in half precision",
        )
    zero = lengths == 0
    return wide / np.where(zero, 1, lengths)[:, None], zero


def ranking(queries: Placed, reference: Placed) -> Tensor:
    """What orders the rows of each query as the cosine does, float64 [Q, N]: exact, so rows that
    are equal are equal here.

    It is the cosine less what depends on the query alone, see `cosines`.
    """
    ranked = queries.half.new_empty(len(queries), len(reference))
    wide = queries.offsets.double()
    step = max(1, VALUES_AT_ONCE // max(1, wide.shape[1]))
    for start in range(0, len(reference), step):
        part = slice(start, start + step)
        ranked[:, part] = wide @ reference.offsets[part].double().T
    ranked -= reference.half
    ranked[queries.zero] = 0
    return ranked


def cosines(ranked: Tensor, own: Tensor) -> Tensor:
    """Cosines of values of `ranking`, float32 [Q, ...]; -inf stays.

    Args:
        ranked: float64 [Q, ...].
        own: of the queries, `Placed.own`.
    """
    return (ranked + own.reshape(-1, *[1] * (ranked.ndim - 1))).float()


def best(
    queries: Placed, reference: Placed, k: int, apart: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows by `ranking`, best first; of equals the lowest row first.

    Args:
        queries: few, so that [Q, N] float32 is small.
        reference: where the work is done.
        k: at most N.
        apart: numbers (query, row) of pairs that are not compared; places that have no row left get
            -inf.

    Returns:
        float64 [Q, k], `ranking`, and int64 [Q, k].
    """
    wide = min(len(reference), k + k // 4 + 16)
    fast, margin = _fast(queries, reference)
    if apart is not None:
        fast[apart] = -torch.inf
    values, rows = fast.topk(wide, dim=1)
    del fast
    unsure = torch.zeros(len(queries), dtype=torch.bool, device=values.device)
    if wide < len(reference):
        # All that can be among the k best are seen once the last one seen is clearly below.
        unsure = ~(values[:, -1] < values[:, k - 1] - 2 * margin)
    unsure |= queries.zero
    ranked = _ranked(queries, reference, rows).masked_fill(values == -torch.inf, -torch.inf)
    ranked, rows = first_of(ranked, rows, k)
    if bool(unsure.any()):
        which = unsure.nonzero()[:, 0]
        ranked[which], rows[which] = _best_in_doubles(queries, reference, k, which, apart)
    return ranked, rows


def first_of(ranked: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k by value, then by the lowest row, of values and rows [Q, w]."""
    rows, order = rows.sort(dim=1)
    ranked, best_first = ranked.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ranked[:, :k], rows.gather(1, best_first)[:, :k]


def _fast(queries: Placed, reference: Placed) -> tuple[Tensor, Tensor]:
    """`ranking` in single precision [Q, N], and how wrong it can be for each query [Q]."""
    with full_precision():
        fast = torch.addmm(-reference.half.float(), queries.offsets, reference.offsets.T)
    longest = (2 * queries.half).sqrt() * (2 * reference.half.max()).sqrt()
    margin = slack(queries.offsets.shape[1]) * longest + 2.0**-22 * (longest + reference.half.max())
    return fast, margin.float()


def slack(dim: int) -> float:
    """More than a product of unit vectors in single precision can be wrong, in any order."""
    return 1.1 * (dim + 6) * 2.0**-24


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, matrix products of single precision are made in single precision (no TF32)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _ranked(queries: Placed, reference: Placed, rows: Tensor) -> Tensor:
    """`ranking` of some rows of each query, [Q, w], by the same exact sums."""
    ranked = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    cpu = rows.device.type == "cpu"
    # On a CPU numpy is faster by far: torch wakes all its threads for each of many small products.
    at_once = NEAR_VALUES if cpu else VALUES_AT_ONCE
    step = max(1, at_once // max(1, rows.shape[1] * queries.offsets.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        which, asked = rows[part], queries.offsets[part].double()[:, :, None]
        if cpu:
            of = reference.offsets.numpy()[which.numpy()].astype(np.float64)
            np.matmul(of, asked.numpy(), out=ranked[part, :, None].numpy())
        else:
            ranked[part] = torch.bmm(reference.offsets[which].double(), asked)[:, :, 0]
    return ranked - reference.half[rows]


def _best_in_doubles(
    queries: Placed,
    reference: Placed,
    k: int,
    which: Tensor,
    apart: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The same for the queries `which`, by all products in doubles."""
    ranked, rows = [], []
    step = max(1, RANKED_AT_ONCE // len(reference))
    for start in range(0, len(which), step):
        part = which[start : start + step]
        every = ranking(queries[part], reference)
        if apart is not None:
            place = torch.full((len(queries),), -1, device=part.device)
            place[part] = torch.arange(len(part), device=part.device)
            query = place[apart[0]]
            every[query[query >= 0], apart[1][query >= 0]] = -torch.inf
        last = every.topk(k, dim=1).values[:, -1:]
        above, equal = every > last, every == last
        missing = k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= missing))
        columns = chosen.nonzero()[:, 1].reshape(len(part), k)
        values, order = every.gather(1, columns).sort(dim=1, descending=True, stable=True)
        ranked.append(values)
        rows.append(columns.gather(1, order))
    return torch.cat(ranked), torch.cat(rows)
