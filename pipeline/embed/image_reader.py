"""Encoded images by their ids, read from the shards that were embedded."""

from __future__ import annotations

from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np

from pipeline.shards.row_group import image_array, values_of
from pipeline.shards.shard_set import ShardSet

_GROUPS = 4  # row groups of encoded images that a reader keeps

Array = np.ndarray[Any, Any]


class ImageReader:
    """Encoded images by their ids, from the shards that were embedded.

    Args:
        shards: the images.
        ids: S32 [n].
        places: int64 [n], the row of each in the shards.
        order: int64 [n], that sorts the ids, where it is known.
    """

    def __init__(
        self, shards: ShardSet, ids: Array, places: Array, order: Array | None = None
    ) -> None:
        self.shards, self._ids, self._places = shards, ids, places
        self._order = np.argsort(ids, kind="stable") if order is None else order
        counts = [(f, g, n) for f, x in enumerate(shards.files) for g, n in enumerate(x.row_groups)]
        self._groups = [(f, g) for f, g, _ in counts]
        self._starts = np.cumsum([0, *(n for *_, n in counts)])
        self._values = lru_cache(_GROUPS)(self._read)
        self._reading = [Lock() for _ in self._groups]  # threads that want one group read it once

    @cached_property
    def _column(self) -> str:
        return self.shards.image_column

    def __contains__(self, image_id: str) -> bool:
        return self._row_of(image_id) is not None

    def __getitem__(self, image_id: str) -> bytes:
        """The encoded bytes of an image.

        Raises:
            KeyError: no such image.
        """
        row = self._row_of(image_id)
        if row is None:
            raise KeyError(image_id)
        place = self._places[row]
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        with self._reading[group]:
            values = self._values(group)
        return bytes(values[int(place - self._starts[group])])

    def _row_of(self, image_id: str) -> int | None:
        wanted = image_id.encode()
        if len(wanted) != self._ids.dtype.itemsize:
            return None
        at = int(np.searchsorted(self._ids, wanted, sorter=self._order))
        row = int(self._order[at]) if at < len(self._ids) else -1
        return row if row >= 0 and bytes(self._ids[row]) == wanted else None

    def _read(self, group: int) -> list[memoryview]:
        file_index, row_group = self._groups[group]
        with self.shards.parquet(file_index) as parquet:
            table = parquet.read_row_group(row_group, columns=[self._column])
        return values_of(image_array(table.column(self._column)))
