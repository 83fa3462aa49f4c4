"""Cells: the coarse clusters in which vectors are compared.

Above 20,000 cells, vectors are assigned in two levels: among the cells of the eight nearest groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.bucketed import raw, unraw
from pipeline.curate.rows.exact import Halves, nearest, nearest_numbers
from pipeline.curate.steps.steps import Step

TWO_LEVELS = 20_000  # cells above which vectors are assigned by groups
BRANCHES = 8  # groups whose cells are looked at
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cells:
    """Fitted cells.

    Attributes:
        centres: half precision [K, d], all different.
        bucket: int32 [K].
        group: int32 [K], the group of each cell.
        groups: half precision [G, d], centres of the groups.
    """

    centres: Halves
    bucket: np.ndarray[Any, np.dtype[np.int32]]
    group: np.ndarray[Any, np.dtype[np.int32]]
    groups: Halves

    def nearest(self, vectors: Halves, probes: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The nearest cells of each vector, the nearest first: int32 [n, probes].

        Where there are fewer cells than probes, -1 stands in the last columns.
        """
        cells = np.full((len(vectors), probes), -1, np.int32)
        count = min(probes, len(self.centres))
        if len(self.centres) <= TWO_LEVELS:
            cells[:, :count] = nearest_numbers(vectors, self.centres, count)
        else:
            cells[:, :count] = self._by_groups(vectors, count)
        return cells

    def _by_groups(self, vectors: Halves, count: int) -> Array:
        n, none = len(vectors), len(self.centres)
        branch = nearest_numbers(vectors, self.groups, BRANCHES)
        order = np.argsort(branch.reshape(-1), kind="stable")
        ends = np.searchsorted(branch.reshape(-1)[order], np.arange(len(self.groups) + 1))
        width = branch.shape[1]
        number = np.full((n, width, count), none, np.int32)
        similarity = np.full((n, width, count), -np.inf)
        for group in range(len(self.groups)):
            places = order[ends[group] : ends[group + 1]]
            cells = np.flatnonzero(self.group == group)
            if not len(places) or not len(cells):
                continue
            row, column = np.divmod(places, width)
            which, values = nearest(vectors[row], self.centres[cells], count)
            number[row, column, : which.shape[1]] = cells[which]
            similarity[row, column, : which.shape[1]] = values
        number, similarity = number.reshape(n, -1), similarity.reshape(n, -1)
        first = np.lexsort((number, -similarity), axis=1)[:, :count]
        nearest_cells = np.take_along_axis(number, first, 1)
        return np.where(nearest_cells == none, -1, nearest_cells)

    def tables(self) -> list[tuple[pa.Table, str]]:
        """As they are written, with the names of the tables."""
        cells = pa.table({"bucket": self.bucket, "group": self.group, "vector": raw(self.centres)})
        return [(cells, "cells"), (pa.table({"vector": raw(self.groups)}), "groups")]

    @classmethod
    def load(cls, fitted: Step, dim: int) -> Cells:
        """Reads them.

        Raises:
            DataError: a table is damaged or missing.
        """
        cells, groups = fitted.read("cells"), fitted.read("groups")
        return cls(
            unraw(cells.column("vector"), np.float16, dim),
            cells.column("bucket").to_numpy(),
            cells.column("group").to_numpy(),
            unraw(groups.column("vector"), np.float16, dim),
        )


# ---- How many cells, vectors of the sample and buckets: what costs least and fits a task.


SAMPLE_EACH = 40  # vectors of the sample for each cell, as in faiss
SAMPLE_BYTES = 2**30  # of the sample, which one task holds
SAMPLE_LEAST = 8  # vectors for each cell where that is too little
GROUP_IMAGES = 1_000  # mean images in a cell where there are more cells than TWO_LEVELS
IMBALANCE = 1.6  # mean square of the size of a cell over the square of its mean; measured 1.4-1.6
BUCKET_IMAGES = 25_000  # images in a bucket while there are few buckets
BUCKET_BYTES = 2**28  # of half precision in a bucket, which become 2.5 times as many in the task
FEW_BUCKETS = 32
REPLICAS = 2.2  # times that a vector is written at eight probes; measured


def cells_for(rows: int, probes: int, dim: int, cell_images: int | None = None) -> int:
    """How many cells: what costs least, or so many that a cell has `cell_images` on average.

    Assigning costs 2 N K d and joining 2 d E (p - 1/2) N^2 / K operations, least where
    K = sqrt(E (p - 1/2) N). Where that is over 20,000, two levels make assigning cheap, and cells
    have 1000 images. The sample has to fit a task, which limits K (to 160,000 at d = 384).
    """
    if cell_images:
        count = rows / cell_images
    else:
        count = (IMBALANCE * max(0.5, probes - 0.5) * rows) ** 0.5
        if count > TWO_LEVELS:
            count = max(TWO_LEVELS, rows / GROUP_IMAGES)
    limit = SAMPLE_BYTES // (2 * dim * SAMPLE_LEAST)
    return int(max(1, min(round(count), limit, rows)))


def sample_share(rows: int, cells: int, dim: int) -> float:
    """Share of the rows that are in the sample."""
    vectors = min(SAMPLE_EACH * cells, SAMPLE_BYTES // (2 * dim))
    return min(1.0, vectors / max(1, rows))


def buckets_for(rows: int, dim: int, views: int = 1) -> int:
    """How many buckets: few for images up to a million, then by the memory of a join task."""
    by_memory = -(-int(rows * views * REPLICAS * 2 * dim) // BUCKET_BYTES)
    return max(1, by_memory, min(FEW_BUCKETS, rows // BUCKET_IMAGES))
