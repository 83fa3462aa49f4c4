"""The nearest rows by cosine, of sets that fit into the memory of one machine.

Shapes: N reference images, Q queries, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluate.features import Ids, as_array
from pipeline.evaluate.neighbours.exact import MIDDLE_ROWS, Frame, best, cosines

SIMILARITIES_AT_ONCE = 1 << 26  # 256 MiB in float32


@dataclass(frozen=True)
class Neighbours:
    """The most similar reference rows of each query, best first.

    Attributes:
        similarities: float32 [Q, k], cosines; -inf where there were fewer rows than k.
        rows: int64 [Q, k], numbers of rows in the reference; -1 where there were fewer.
    """

    similarities: Tensor
    rows: Tensor


@dataclass(frozen=True)
class SameImages:
    """Places where a query and a reference row are the same image, sorted by query.

    Attributes:
        queries: int64 [n], rows of the queries.
        rows: int64 [n], the reference row of each.
    """

    queries: Tensor
    rows: Tensor

    @classmethod
    def of(cls, reference: Ids, queries: Ids) -> SameImages:
        """The places where ids are equal."""
        known, asked = (np.ascontiguousarray(x).view("S16").ravel() for x in (reference, queries))
        order = np.argsort(known, kind="stable")
        first = np.searchsorted(known, asked, "left", sorter=order)
        counts = np.searchsorted(known, asked, "right", sorter=order) - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[np.repeat(first, counts) + within]
        return cls(
            torch.from_numpy(np.repeat(np.arange(len(asked)), counts)), torch.from_numpy(rows)
        )

    def within(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The places of the queries from `start` to `end`, counted from `start`."""
        low, high = torch.searchsorted(self.queries, torch.tensor((start, end))).tolist()
        return self.queries[low:high] - start, self.rows[low:high]


def nearest(
    reference: Tensor,
    queries: Tensor,
    k: int,
    same: SameImages | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine similarities and row numbers of the k most similar reference rows, best first.

    Args:
        reference: [N, D], any scale; the work is done where it is.
        queries: [Q, D]; taken a few at a time, so that [Q, N] never exists.
        k: cut to the number of rows there are.
        same: no query finds these rows: a place that has none left has similarity -inf, row -1.

    Returns:
        float32 [Q, k] and int64 [Q, k].

    Raises:
        DataError: nothing to search in, or widths that differ.
    """
    if not len(reference) or k < 1:
        raise DataError(f"cannot take the {k} nearest of {len(reference)} images")
    if reference.shape[1] != queries.shape[1]:
        raise DataError(
            f"reference features have width {reference.shape[1]}, queries {queries.shape[1]}",
            hint="embed both with the same backbone",
        )
    k = min(k, len(reference))
    device = reference.device
    frame = Frame.of(as_array(reference[:MIDDLE_ROWS]))
    known = frame.placed(as_array(reference)).to(device)
    part = max(1, SIMILARITIES_AT_ONCE // len(reference))
    values, rows = [], []
    for start in range(0, len(queries), part):
        block = frame.placed(as_array(queries[start : start + part]), start).to(device)
        apart = None
        if same is not None:
            asked, rows_apart = same.within(start, start + len(block))
            apart = asked.to(device), rows_apart.to(device)
        ranked, nearest_rows = best(block, known, k, apart)
        values.append(cosines(ranked, block.own))
        rows.append(nearest_rows.masked_fill(ranked == -torch.inf, -1))
    if not values:
        empty = known.offsets.new_zeros(0, k)
        return empty, empty.long()
    return torch.cat(values), torch.cat(rows)
