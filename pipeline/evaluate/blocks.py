"""Features that may be more than memory holds: gone through a few rows at a time.

Features are a tensor, or what is read like one: `features[rows]`, `shape`, `device` and a length,
as `card/inputs/stored.py` reads a table.

Shapes: N images, n of them, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import DataError


def in_blocks(
    features: Tensor, rows: npt.NDArray[np.int64], values: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of features, a few at a time: which of the n, and their vectors [b, D].

    Args:
        features: [N, D], or what is read like it.
        rows: int64 [n], rising, so that each block lies together in a table.
        values: numbers of a block at most; one row at least.

    Raises:
        DataError: a value is no finite number.
    """
    step = max(1, values // max(1, features.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, finite(features[torch.from_numpy(rows[part])])


def finite(vectors: Tensor) -> Tensor:
    """The vectors [b, D], which must be finite: else their scores would look like any others.

    Raises:
        DataError: a value is no finite number.
    """
    wrong = int((~torch.isfinite(vectors).all(1)).sum())
    if wrong:
        raise DataError(
            f"features hold values that are no finite numbers, {wrong:,} rows of {len(vectors):,}",
            "embed these images again, in float32 if the model ran in half precision",
        )
    return vectors
