"""The first step: each image is decoded once, and all that later steps ask of its pixels is kept.

One task for each input file. Row groups are read one by one, and rows are written as they come, so
a task's memory does not grow with its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.images.descriptor import DIM, SIDE, VIEWS, describe_grey
from pipeline.curate.images.measure import Measured, Pixels, measure
from pipeline.curate.rows.tables import (
    FINGERPRINT,
    InputFile,
    Inputs,
    id_array,
    list_array,
)
from pipeline.curate.steps.steps import Account, Output, Step, Steps
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import decode_image
from pipeline.images.value_range import ValueRange
from pipeline.shards.row_group import RowGroup, read_group, read_sources

VERSION = 3  # of what is measured; another one measures again
BATCH = 256  # images described at once, and rows written at once
MEASURES = (
    "brightness_p05",
    "brightness_p50",
    "brightness_p95",
    "contrast",
    "entropy",
    "sharpness",
    "edges",
    "saturation",
)


@dataclass(frozen=True)
class Decoding:
    """How images are decoded: as the training does.

    Attributes:
        channels: of an image.
        max_pixels: larger images are refused.
    """

    channels: int = 3
    max_pixels: int = MAX_PIXELS

    def pixels(self, encoded: bytes, value_range: ValueRange) -> Pixels:
        """uint8 [H, W, C].

        Raises:
            BadImage: it cannot be decoded.
        """
        return decode_image(encoded, self.channels, self.max_pixels, value_range)


def fingerprint(
    steps: Steps, inputs: Inputs, decoding: Decoding, name: str = "fingerprint"
) -> Step:
    """Writes `tables.FINGERPRINT` of every input file; accounts have rows, bytes and bad rows.

    An image that cannot be decoded is a row with the reason in `error` (`bad_image.REASONS`).
    """
    return steps.run(name, fingerprint_file, inputs.by_name, version=VERSION, decoding=decoding)


def fingerprint_file(out: Output, file: InputFile, decoding: Decoding) -> Account:
    """Task: the fingerprints of one file."""
    rows = bad = 0
    with out.writer(FINGERPRINT) as (writer, size):
        for number in range(len(file.file.row_groups)):
            group = read_group(file.columns, file.file.path, number)
            sources = read_sources(file.columns, file.file.path, number)
            for at in range(0, len(group), BATCH):
                part = range(at, min(at + BATCH, len(group)))
                decoded = [_measured(group, row, decoding, file) for row in part]
                table = _table(file.first + rows, group, sources, part, decoded)
                bad += sum(isinstance(one, str) for one in decoded)
                rows += len(part)
                writer.write_table(table)
    return {"rows": rows, "bad": bad, "bytes": size()}


def _measured(group: RowGroup, row: int, decoding: Decoding, file: InputFile) -> Measured | str:
    """What an image of a row group looks like, or the reason why it cannot be decoded."""
    try:
        return measure(decoding.pixels(group.checked(row), file.columns.value_range))
    except BadImage as error:
        return error.reason


def groups_at(
    file: InputFile, places: np.ndarray[Any, Any]
) -> Iterator[tuple[RowGroup, np.ndarray[Any, Any], int]]:
    """Row groups of an input file that hold some of its rows, each read once.

    Args:
        file: which.
        places: of rows in the file, ascending.

    Yields:
        A row group, the places in it, and the place of its first row in the file.
    """
    starts = np.cumsum([0, *file.file.row_groups])
    numbers = np.searchsorted(starts, places, side="right") - 1
    for number in np.unique(numbers).tolist():
        first = int(starts[number])
        group = read_group(file.columns, file.file.path, number)
        yield group, places[numbers == number] - first, first


def _table(
    first: int,
    group: RowGroup,
    sources: list[str],
    part: range,
    decoded: list[Measured | str],
) -> pa.Table:
    """The fingerprints of a part of a row group; `first` is the row of the part's first image."""
    measures = [None if isinstance(one, str) else one for one in decoded]
    squares = np.zeros((len(part), SIDE, SIDE))
    for place, one in enumerate(measures):
        if one:
            squares[place] = one.square
    full, crops = describe_grey(squares)
    hashes = b"".join(m.pixel_hash if m else bytes(16) for m in measures)
    columns: dict[str, Any] = {
        "row": first + np.arange(len(part)),
        "image_id": id_array(group.image_ids[part.start : part.stop]),
        "source": sources[part.start : part.stop],
        "bytes": [len(group.encoded[row]) for row in part],
        "width": [m.width if m else 0 for m in measures],
        "height": [m.height if m else 0 for m in measures],
        "error": [one if isinstance(one, str) else "" for one in decoded],
        "pixel_hash": id_array(np.frombuffer(hashes, np.uint8).reshape(-1, 16)),
        "descriptor": list_array(full.reshape(len(part), DIM)),
        "views": list_array(crops.reshape(len(part), VIEWS * DIM)),
        "thumbnail": [m.thumbnail if m else b"" for m in measures],
    }
    for name in MEASURES:
        columns[name] = [getattr(m, name) if m else 0.0 for m in measures]
    return pa.table({field.name: columns[field.name] for field in FINGERPRINT}, FINGERPRINT)
