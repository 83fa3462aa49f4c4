"""What a table of vectors says of its rows, in little memory.

A row takes 32 bytes for its id, 8 each for the rank of the id, the label and the place in the
shards, and its source as Arrow keeps a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.embed.ids import LETTERS, Ids, id_bytes
from pipeline.embed.image_reader import ImageReader
from pipeline.embed.vectors import VectorSet

Array = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]


class Rows(Ids):
    """Ids, sources and labels of the n rows of a set, read in one pass through its files.

    Attributes:
        labels: int64 [n]; -1 where unknown.
        places: int64 [n], the row of each image in its shards.
    """

    def __init__(self, vectors: VectorSet) -> None:
        table = vectors.columns("image_id", "source", "label", "row")
        super().__init__(id_bytes(table["image_id"]))
        self.labels: Ints = np.array(table["label"].fill_null(-1).to_numpy(), np.int64)
        self.places: Ints = np.array(table["row"].to_numpy(), np.int64)
        # texts of more than 2 GiB in all have no place in one array of `string`
        self._sources = table["source"].cast(pa.large_string()).combine_chunks()

    def source_of(self, row: int) -> str:
        """Where a row's image is from."""
        return str(self._sources[int(row)].as_py())

    def ids_of(self, rows: Ints) -> pa.Array:
        """The ids of some rows, as text."""
        return pa.array(self.ids[rows].astype(f"U{LETTERS}").tolist(), pa.string())

    def sources_of(self, rows: Ints) -> pa.Array:
        """The sources of some rows."""
        return self._sources.take(pa.array(rows, pa.int64())).cast(pa.string())

    def images(self, vectors: VectorSet) -> ImageReader:
        """A reader of the encoded images, as `VectorSet.images`, from what is known here already.

        Raises:
            DataError: the images are not there, or are others by now.
        """
        return ImageReader(vectors.shards(), self, self.places)


def label_name(label: int, class_names: Sequence[str]) -> str:
    """The name of a label, its number where it has none, "" where it is unknown (below 0)."""
    if label < 0:
        return ""
    return str(class_names[label]) if label < len(class_names) else str(label)
