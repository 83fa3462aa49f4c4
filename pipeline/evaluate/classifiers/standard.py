"""Vectors brought to mean 0 and deviation 1 in each dimension, by those that train.

A linear layer can undo it, so what can be learnt is the same. But penalties and learning rates then
mean the same for vectors of any scale, be it pixels or a network whose vectors hardly differ.

Shapes: N images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.evaluate.blocks import finite

ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Standard:
    """Mean and deviation of each dimension.

    Attributes:
        mean: float64 [D].
        deviation: float64 [D]; 1 where all vectors are equal but for round-off.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor, rows: Tensor | None = None) -> Standard:
        """Of vectors [N, D], or what is read like them, or of some rows, without a copy of all.

        In two passes: with vectors that hardly differ, the difference of two sums is round-off.

        Raises:
            DataError: a value is no finite number.
        """
        rows = torch.arange(len(features)) if rows is None else rows
        parts = torch.split(rows.to(features.device), ROWS_AT_ONCE)
        zeros = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
        mean = sum((finite(features[part]).double().sum(0) for part in parts), zeros) / len(rows)
        squares = sum(((features[p].double() - mean).square().sum(0) for p in parts), zeros)
        deviation = (squares / len(rows)).sqrt()
        # The numbers were stored in float32: what is smaller than its steps is no difference.
        equal = deviation <= 1e-7 * mean.abs()
        return cls(mean, torch.where(equal, torch.ones_like(deviation), deviation))

    def to(self, device: torch.device | str) -> Standard:
        """The same on a device."""
        return Standard(self.mean.to(device), self.deviation.to(device))

    def __call__(self, features: Tensor) -> Tensor:
        """Vectors float32 [n, D] of any [n, D]; the difference is taken in float64."""
        return ((features.double() - self.mean) / self.deviation).float()

    def of_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """Of some rows, a few at a time."""
        parts = torch.split(rows.to(features.device), ROWS_AT_ONCE)
        shape = (len(rows), features.shape[1])
        out = torch.empty(shape, dtype=torch.float32, device=features.device)
        at = 0
        for part in parts:
            out[at : at + len(part)] = self(features[part])
            at += len(part)
        return out
