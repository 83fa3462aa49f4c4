"""The range of values that the images of a set are decoded with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from pipeline.images.bad_image import BadImage
from pipeline.images.decode import value_span
from pipeline.images.value_range import (
    AUTO,
    FULL,
    Span,
    ValueRange,
    range_of,
    shown,
    similar,
    smallest,
)
from pipeline.shards.columns import image_id
from pipeline.shards.row_group import image_array
from pipeline.shards.shard_set import ShardSet

FIRST = 8  # rows that tell whether a set has deep images
PLACES = 4  # of a set that is not packed, in which deep images are looked at
ROWS = 64  # in each


def ranged(
    shards: ShardSet, setting: ValueRange | Literal["auto-from-sample"], channels: int = 3
) -> ShardSet:
    """The set with the range that its images are decoded with: the setting, or what packing found,
    or what a set that was not packed here shows in a few places, the same ones each time.
    """
    if setting != AUTO:
        return replace(shards, value_range=setting)
    if shards.value_range is not None:
        return shards
    used = _measured(shards, channels)
    return replace(shards, value_range=used or FULL, used_range=used)


@functools.lru_cache(maxsize=16)
def _measured(shards: ShardSet, channels: int) -> ValueRange | None:
    """None where no deep image is seen."""
    files = [i for i, file in enumerate(shards.files) if file.rows]
    if not files or not _spans(shards, files[0], FIRST, channels):
        return None
    spans: dict[str, Span] = {}
    for i in np.unique(np.linspace(0, len(files) - 1, PLACES).astype(int)).tolist():
        spans |= _spans(shards, files[i], ROWS, channels)
    return range_of(list(smallest(spans).values()))


def _spans(shards: ShardSet, file: int, rows: int, channels: int) -> dict[str, Span]:
    """Of the deep images among the first rows of a file, by id."""
    return dict(_each(shards, file, rows, channels))


def _each(shards: ShardSet, file: int, rows: int, channels: int) -> Iterator[tuple[str, Span]]:
    with shards.parquet(file) as parquet:
        batch = next(parquet.iter_batches(rows, columns=[shards.image_column]))
    for value in image_array(batch.column(0)):
        encoded = value.as_py() or b""
        try:
            span = value_span(encoded, channels)
        except BadImage:
            continue
        if span is not None and span.bits:
            yield image_id(encoded), span


def other_range(shards: ShardSet, value_range: ValueRange, channels: int = 3) -> ValueRange | None:
    """The values that the deep images of a set use, where they are not those of a range; else None.

    Where no used range is noted, the images are looked at: of a set without deep ones there is
    nothing to say.
    """
    own = shards.used_range
    if own is None and shards.value_range != value_range:
        own = _measured(shards, channels)
    return None if own is None or similar(own, value_range) else own


def used_values(shards: ShardSet, channels: int = 3) -> ValueRange | None:
    """The values that the deep images of a set use, as packing found or a few places show; None
    where it has none.
    """
    return shards.used_range or _measured(shards, channels)


def difference(name: str, shards: ShardSet, value_range: ValueRange, channels: int = 3) -> str:
    """A sentence where the values of a set are not those of the range it is read with; else ""."""
    own = other_range(shards, value_range, channels)
    if own is None:
        return ""
    return (
        f"{name} use values of {shown(own)}, but all sets are read with the range of the training "
        f"images, {shown(value_range)}; data.range=[low,high] names one for all"
    )
