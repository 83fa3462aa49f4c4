"""The finalizer of splitmix64, which scatters ids over 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

Words = np.ndarray[Any, np.dtype[np.uint64]]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def finalized(x: Words) -> Words:
    """Another number for each of these, uniform where they are consecutive (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
