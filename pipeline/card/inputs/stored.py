"""Vectors that stay in their table: read like a tensor, some rows at a time.

Shapes: N rows of the table, n of them, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.embed.vectors import VectorSet, shape_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT_BYTES = 1 << 30  # a table that is smaller is read once and kept
MEAN_ROWS = 1 << 16  # of which sums are added


@dataclass(frozen=True)
class Stored:
    """One column of a table, for scores that go through it in blocks.

    Attributes:
        vectors: the table.
        output: the column.
        centre: float64 [D], taken off each vector; None for nothing.
        place: the device that rows come to.
    """

    vectors: VectorSet
    output: str
    centre: np.ndarray[Any, Any] | None = None
    place: str = "cpu"

    def __len__(self) -> int:
        return self.vectors.rows

    @property
    def shape(self) -> tuple[int, int]:
        """[N, D]."""
        return len(self), math.prod(shape_in(self.vectors.facts, self.output))

    @property
    def device(self) -> torch.device:
        """That rows come to."""
        import torch

        return torch.device(self.place)

    def to(self, device: str) -> Stored:
        """The same, whose rows come to a device."""
        return replace(self, place=device)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows float32 [n, D] by numbers int64 [n]; reads the parts that hold some, one by one."""
        import torch

        numbers = rows.cpu().numpy()
        order = np.argsort(numbers, kind="stable")
        rising, first = numbers[order], 0
        out = np.empty((len(numbers), self.shape[1]), np.float32)
        for _, count in self.vectors.parts:
            low, high = np.searchsorted(rising, (first, first + count))
            if low < high:
                start, stop = int(rising[low]), int(rising[high - 1]) + 1
                out[order[low:high]] = self._part(slice(start, stop))[rising[low:high] - start]
            first += count
        return torch.from_numpy(out).to(self.device)

    def _part(self, rows: slice) -> np.ndarray[Any, Any]:
        part = self.vectors.read(self.output, rows)
        part = part.reshape(len(part), -1)
        return part if self.centre is None else part - self.centre


def column_of(vectors: VectorSet, output: str, centre: np.ndarray[Any, Any] | None = None) -> Any:
    """A column of a table: a tensor where it is small, else `Stored`."""
    column = Stored(vectors, output, centre)
    if 4 * vectors.rows * column.shape[1] > KEPT_BYTES:
        return column
    import torch

    whole = vectors.read(output).reshape(vectors.rows, -1)
    return torch.from_numpy(whole if centre is None else (whole - centre).astype(np.float32))


def mean_of(vectors: VectorSet, output: str) -> np.ndarray[Any, Any]:
    """Mean of a column, float64 [D]."""
    sums = [
        block.reshape(len(block), -1).sum(0, dtype=np.float64)
        for block, _ in vectors.blocks(MEAN_ROWS, output)
    ]
    return np.asarray(np.sum(sums, 0) / vectors.rows)
