"""What the report says of pairs that look alike and differ: how many, and some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from pipeline.curate.report_read import Smallest, Tables, value_draws

SHOWN = 12  # pairs


@dataclass(frozen=True)
class Apart:
    """Two rows that look alike and differ; `place` says where, in the second of them."""

    a: int
    b: int
    similarity: float
    reason: str
    place: tuple[float, float]

    @property
    def text(self) -> str:
        """What is below the two images."""
        if self.reason == "undecided":
            return f"{self.similarity:.3f}: undecided, so both stay"
        across, down = (round(100 * share) for share in self.place)
        what = "in colour " if self.reason == "colour" else ""
        return f"{self.similarity:.3f}: differ {what}at {across} % across, {down} % down"


@dataclass(frozen=True)
class Looks:
    """Pairs above the threshold that got a second look, and those of them that are no copies."""

    pairs: int
    same: int
    undecided: int
    apart: tuple[Apart, ...]

    @property
    def rows(self) -> Iterator[int]:
        """Rows that are shown."""
        for one in self.apart:
            yield from (one.a, one.b)


def read_looks(tables: Tables, seed: int) -> Looks:
    """One pass over the verdicts."""
    pairs = same = undecided = 0
    kept = Smallest(SHOWN)
    columns = ["row", "other", "similarity", "same", "reason", "x", "y"]
    for _, table in tables.read("looks", columns):
        pairs += len(table)
        same += int(pc.sum(table["same"]).as_py() or 0)
        undecided += int(pc.sum(pc.equal(table["reason"], "undecided")).as_py() or 0)
        apart = table.filter(pc.invert(table["same"])).to_pylist()
        if not apart:
            continue
        drawn = value_draws(np.array([one["similarity"] for one in apart]), seed)

        def item(place: int, apart: list[dict[str, float]] = apart) -> tuple[object, ...]:
            one = apart[place]
            names = ("row", "other", "similarity", "reason", "x", "y")
            return tuple(one[name] for name in names)

        kept.offer(drawn, item)
    found = [Apart(a, b, s, reason, (x, y)) for a, b, s, reason, x, y in kept.items()]
    return Looks(pairs, same, undecided, tuple(found))
