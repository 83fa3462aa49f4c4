"""Exact similarities of rows to each other."""

from __future__ import annotations

import numpy as np

from pipeline.curate.exact import Doubles, Ints
from pipeline.curate.items import Visiting, visiting_of
from pipeline.curate.portions import Rows
from pipeline.curate.stored import OnDisk

CHUNK = 4096  # rows compared with their keepers at once


class Likeness:
    """Exact similarities of rows to each other, all views counted.

    Args:
        rows: with their crops where views count; in memory or on disk.
        visiting: as in `items.Visiting`, or None.
        penalty: what the similarity of a crop is reduced by.
    """

    def __init__(self, rows: Rows | OnDisk, visiting: Visiting | None, penalty: float) -> None:
        self.rows, self.visiting, self.penalty = rows, visiting, penalty

    def __call__(self, a: Ints, b: Ints) -> Doubles:
        """Similarity of each pair of places a, b."""
        found = np.empty(len(a))
        for begin in range(0, len(a), CHUNK):
            some = slice(begin, begin + CHUNK)
            one, other = self.rows.only(a[some]), self.rows.only(b[some])
            found[some] = self._seen(one, other)
            if one.crops is not None:
                found[some] = np.maximum(found[some], self._seen(other, one))
        return found

    def _seen(self, visitors: Rows, members: Rows) -> Doubles:
        views, crops = visiting_of(visitors, self.visiting)
        of = members.vectors.astype(np.float64)
        seen = np.full(len(of), -np.inf)
        for view in range(views.shape[1]):
            dot = np.einsum("nd,nd->n", views[:, view].astype(np.float64), of)
            seen = np.maximum(seen, dot - (self.penalty if crops[view] else 0.0))
        return seen
