"""Ids of images in little memory, and rows by their ids: for search, images and the endpoint."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]
LETTERS = 32  # hex digits of an id


def id_bytes(column: pa.ChunkedArray) -> Array:
    """A column of image ids as S32 [n]: a quarter of what they take as text of numpy."""
    ids = column.cast(pa.binary()).cast(pa.binary(32)).combine_chunks()
    values = np.frombuffer(ids.buffers()[1] or b"", "S32")
    return values[ids.offset : ids.offset + len(ids)]


class Ids:
    """The ids of n images.

    Attributes:
        ids: S32 [n], hex digits.
    """

    def __init__(self, ids: Array) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def id_of(self, row: int) -> str:
        """The id of a row's image."""
        return str(self.ids[row], "ascii")

    @cached_property
    def order(self) -> Ints:
        """Row numbers by rising id; rows of one id in their order."""
        return np.argsort(self.ids, kind="stable")

    def with_beginning(self, text: str) -> Ints:
        """The rows whose ids begin so, by rising id."""
        beginning = text.encode("utf-8", "replace")  # JSON may hold what is no text
        if len(beginning) > LETTERS:
            return self.order[:0]
        first = end = int(np.searchsorted(self.ids, beginning, sorter=self.order))
        while end < len(self) and bytes(self.ids[self.order[end]]).startswith(beginning):
            end += 1
        return self.order[first:end]

    def row_of(self, image_id: str) -> int:
        """The first row with an id; -1 where there is none."""
        if len(image_id) != LETTERS:
            return -1
        rows = self.with_beginning(image_id)
        return int(rows[0]) if len(rows) else -1

    def digests(self) -> Array:
        """What the hex digits stand for, uint8 [n, 16], as tables of a curation have it."""
        digits = self.ids.tobytes().decode("ascii")
        return np.frombuffer(bytearray.fromhex(digits), np.uint8).reshape(-1, LETTERS // 2)
