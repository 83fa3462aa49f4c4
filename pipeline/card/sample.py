"""A sample of a table of vectors that is the same one for every model.

Shapes: n images, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.embed.ids import Ids, id_bytes
from pipeline.embed.vectors import VectorSet

Vectors = np.ndarray[Any, Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """Images of a table by rising id, each once.

    Attributes:
        ids: S32 [n], hex digits.
        rows: int64 [n], rows of the table.
        places: int64 [n], rows of the shards that the table is of.
    """

    ids: Vectors
    rows: Ints
    places: Ints

    @classmethod
    def of(cls, vectors: VectorSet, count: int) -> Sample:
        """The images with the lowest ids, at most `count`.

        An id is a hash of the image, so they are a sample like any other. In shards that pack
        wrote, which are ordered by it, they lie together.
        """
        table = vectors.columns("image_id", "row")
        ids, rows = np.unique(id_bytes(table["image_id"]), return_index=True)
        places = np.array(table["row"].to_numpy(), np.int64)
        return cls(ids[:count], rows[:count], places[rows[:count]])

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> Sample:
        """Those of them with the lowest ids, at most `count`."""
        return Sample(self.ids[:count], self.rows[:count], self.places[:count])

    @property
    def digests(self) -> npt.NDArray[np.uint8]:
        """What the hex digits stand for, uint8 [n, 16]."""
        return Ids(self.ids).digests()

    def read(self, vectors: VectorSet, output: str = "cls") -> Vectors:
        """Its vectors [n, ...] in its order; reads the parts that hold some of it, one by one."""
        order = np.argsort(self.rows)
        rows, first = self.rows[order], 0
        sample = np.repeat(vectors.read(output, slice(0, 1)), len(self), axis=0)
        for _, count in vectors.parts:
            low, high = np.searchsorted(rows, (first, first + count))
            if low < high:
                part = vectors.read(output, slice(first, first + count))
                sample[order[low:high]] = part[rows[low:high] - first]
            first += count
        return sample
