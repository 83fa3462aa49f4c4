"""Cells: the coarse clusters in which vectors are compared.

Above 20,000 cells, vectors are assigned in two levels: among the cells of the eight nearest groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import raw, unraw
from pipeline.curate.exact import Halves, nearest, nearest_numbers
from pipeline.curate.tables import read_table, write_table

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
        found = np.full((len(vectors), probes), -1, np.int32)
        count = min(probes, len(self.centres))
        if len(self.centres) <= TWO_LEVELS:
            found[:, :count] = nearest_numbers(vectors, self.centres, count)
        else:
            found[:, :count] = self._by_groups(vectors, count)
        return found

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
        found = np.take_along_axis(number, first, 1)
        return np.where(found == none, -1, found)

    def save(self, folder: str) -> int:
        """Writes the tables of the cells; returns their bytes."""
        cells = pa.table({"bucket": self.bucket, "group": self.group, "vector": raw(self.centres)})
        size = write_table(cells, folder, "cells")
        return size + write_table(pa.table({"vector": raw(self.groups)}), folder, "groups")

    @classmethod
    def load(cls, folder: str, dim: int) -> Cells:
        """Reads them.

        Raises:
            DataError: a table is damaged or missing.
        """
        cells, groups = read_table(folder, "cells"), read_table(folder, "groups")
        return cls(
            unraw(cells.column("vector"), np.float16, dim),
            cells.column("bucket").to_numpy(),
            cells.column("group").to_numpy(),
            unraw(groups.column("vector"), np.float16, dim),
        )
