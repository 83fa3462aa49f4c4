"""Decodes the images of a set in batches, for an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import DataError
from pipeline.images.decode import BadImage, decode_image
from pipeline.shards.row_group import RowGroup, read_row_group
from pipeline.shards.shards import ShardSet
from pipeline.views.crops import resize_centre_crop

if TYPE_CHECKING:
    from pipeline.evaluate.teacher import EvaluationSpec

log = logging.getLogger("pipeline.evaluate")


@dataclass(frozen=True)
class LabelledImages:
    """A batch: `images` uint8 [B, S, S, C], `labels` int64 [B], -1 where unknown, `ids` uint8
    [B, 16].
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def read_images(
    shards: ShardSet, spec: EvaluationSpec, limit: int | None
) -> Iterator[LabelledImages]:
    """Decodes a set, or `limit` of its rows drawn with the seed, in batches; bad rows are left out.

    Raises:
        DataError: where not one image could be decoded.
    """
    rows: list[tuple[np.ndarray, int, np.ndarray]] = []  # image, label, id
    good = bad = 0

    def batch() -> LabelledImages:
        images, labels, ids = zip(*rows, strict=True)
        return LabelledImages(np.stack(images), np.asarray(labels, np.int64), np.stack(ids))

    for table, row in _rows(shards, spec.seed, limit):
        try:
            image = decode_image(
                table.checked(row), spec.channels, spec.max_pixels, shards.columns.value_range
            )
        except BadImage:
            bad += 1
            continue
        good += 1
        small = resize_centre_crop(image, spec.image_size)
        rows.append((small, int(table.labels[row]), table.image_ids[row]))
        if len(rows) == spec.batch_size:
            yield batch()
            rows.clear()
    if rows:
        yield batch()
    if bad:
        log.warning("%d of %d images of %s could not be decoded", bad, good + bad, shards.uri)
    if not good:
        raise DataError(f"no image of {shards.uri} could be decoded", "pack it to see the reasons")


def _rows(shards: ShardSet, seed: int, limit: int | None) -> Iterator[tuple[RowGroup, int]]:
    rows = np.arange(shards.rows)
    if limit is not None and limit < shards.rows:
        rows = np.sort(np.random.default_rng([seed, 1]).permutation(shards.rows)[:limit])
    first = 0
    for file_index, file in enumerate(shards.files):
        for group, count in enumerate(file.row_groups):
            inside = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if len(inside):
                table = read_row_group(shards, file_index, group)
                yield from ((table, row) for row in inside.tolist())
