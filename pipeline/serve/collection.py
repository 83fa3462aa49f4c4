"""A set of vectors with its images: rows by id, neighbours, encoded bytes, orders for the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.embed.ids import Ids
from pipeline.serve.gallery import Grouping
from pipeline.serve.refusal import Refusal

Array = np.ndarray[Any, Any]
PAGE_ROWS = 500  # most rows of one answer


@dataclass(frozen=True)
class Collection:
    """What the page shows and a search finds.

    Attributes:
        ids: of all n images.
        source: of a row, "" where unknown.
        labels: text [n], names of classes; None: no image has one.
        decisions: text [n] of a curation; None: there is none.
        groupings: by name, the first is shown at first.
        search: vectors [q, D] of any length and k to (cosines [q, k], rows int64 [q, k]), with the
            row -1 where an index finds fewer.
        vector: of a row, [D].
        image: encoded bytes of a row; None where the shards cannot be reached.
    """

    ids: Ids
    source: Callable[[int], str]
    labels: Array | None
    decisions: Array | None
    groupings: Mapping[str, Grouping]
    search: Callable[[Array, int], tuple[Array, Array]]
    vector: Callable[[int], Array]
    image: Callable[[int], bytes] | None

    def __len__(self) -> int:
        return len(self.ids)

    def row_of(self, image_id: str) -> int:
        """The row of an image.

        Raises:
            Refusal: 404, no image has that id.
        """
        row = self.ids.row_of(image_id)
        if row < 0:
            raise Refusal(404, "no image of the set has this id")
        return row

    def about(self, row: int) -> dict[str, Any]:
        """An image in words, as JSON."""
        said: dict[str, Any] = {"image_id": self.ids.id_of(row), "source": self.source(row)}
        if self.labels is not None:
            said["label"] = str(self.labels[row])
        if self.decisions is not None:
            said["decision"] = str(self.decisions[row])
        return said

    def page(self, by: str, start: int, count: int) -> list[dict[str, Any]]:
        """Rows of an order.

        Raises:
            Refusal: 422, there is no such order, or the numbers are none of it.
        """
        grouping = self.groupings.get(by)
        if grouping is None:
            raise Refusal(422, f"by must be one of {', '.join(self.groupings)}")
        if not 0 <= start <= len(self) or not 1 <= count <= PAGE_ROWS:
            raise Refusal(
                422, f"start must be from 0 to {len(self)} and count from 1 to {PAGE_ROWS}"
            )
        return [self.about(int(row)) for row in grouping.order[start : start + count]]

    def like_row(self, row: int, k: int) -> list[dict[str, Any]]:
        """The nearest images of one of the set, which is left out itself."""
        nearest = self.like(self.vector(row), k + 1)
        return [one for one in nearest if one["image_id"] != self.ids.id_of(row)][:k]

    def like(self, vector: Array, k: int) -> list[dict[str, Any]]:
        """The nearest images of a vector [D], by cosine, the most similar first."""
        cosines, rows = self.search(vector[None], min(k, len(self)))
        return [
            {**self.about(int(row)), "similarity": round(float(cosine), 6)}
            for row, cosine in zip(rows[0], cosines[0], strict=True)
            if row >= 0
        ]
