"""Encoded images by their ids, read from the shards that were embedded."""

from __future__ import annotations

from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np

from pipeline.embed.ids import Ids
from pipeline.shards.row_group import image_array, values_of
from pipeline.shards.shard_set import ShardSet

_GROUPS = 4  # row groups of encoded images that a reader keeps

Array = np.ndarray[Any, Any]


class ImageReader:
    """Encoded images by their ids, from the shards that were embedded.

    Args:
        shards: the images.
        ids: of all n images.
        places: int64 [n], the row of each in the shards.
    """

    def __init__(self, shards: ShardSet, ids: Ids, places: Array) -> None:
        self.shards, self._ids, self._places = shards, ids, places
        counts = [(f, g, n) for f, x in enumerate(shards.files) for g, n in enumerate(x.row_groups)]
        self._groups = [(f, g) for f, g, _ in counts]
        self._starts = np.cumsum([0, *(n for *_, n in counts)])
        self._values = lru_cache(_GROUPS)(self._read)
        self._reading = [Lock() for _ in self._groups]  # threads that want one group read it once

    @cached_property
    def _column(self) -> str:
        return self.shards.image_column

    def __contains__(self, image_id: str) -> bool:
        return self._ids.row_of(image_id) >= 0

    def __getitem__(self, image_id: str) -> bytes:
        """The encoded bytes of an image.

        Raises:
            KeyError: no such image.
        """
        row = self._ids.row_of(image_id)
        if row < 0:
            raise KeyError(image_id)
        place = self._places[row]
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        with self._reading[group]:
            values = self._values(group)
        return bytes(values[int(place - self._starts[group])])

    def _read(self, group: int) -> list[memoryview]:
        file_index, row_group = self._groups[group]
        with self.shards.parquet(file_index) as parquet:
            table = parquet.read_row_group(row_group, columns=[self._column])
        return values_of(image_array(table.column(self._column)))
