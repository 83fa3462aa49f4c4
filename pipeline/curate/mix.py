"""Shares of parts that are kept: which images, their ids and the seed say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.curate.file_rows import KEPT, Bytes16, FileRows
from pipeline.curate.splitmix import GOLDEN, finalized


@dataclass(frozen=True)
class Mix:
    """Share of each part that is kept; which images, their ids and the seed say."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)


def leave_out(rows: FileRows, mix: Mix) -> None:
    """Removes rows so that each part keeps its share."""
    draw = draws(rows.ids, mix.seed)
    for part, share in mix.shares.items():
        out = np.flatnonzero((rows.part == part) & (rows.code == KEPT) & (draw >= share))
        rows.remove(out, "balanced_out")
        rows.rule[out] = f"mix.{part}"


def draws(ids: Bytes16, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number in [0, 1) for each image, from its id and the seed alone."""
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
    with np.errstate(over="ignore"):
        inner = finalized((words[:, 1] ^ np.uint64(seed)) + GOLDEN)
        mixed = finalized((words[:, 0] ^ inner) + GOLDEN)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)
