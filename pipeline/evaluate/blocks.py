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


def in_blocks(
    features: Tensor, rows: npt.NDArray[np.int64], values: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of features, a few at a time: which of the n, and their vectors [b, D].

    Args:
        features: [N, D], or what is read like it.
        rows: int64 [n], rising, so that each block lies together in a table.
        values: numbers of a block at most; one row at least.
    """
    step = max(1, values // max(1, features.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, features[torch.from_numpy(rows[part])]
