"""The first step: each image is decoded once, and all that later steps ask of its pixels is kept.

One task for each input file. Row groups are read one by one, and rows are written as they come, so
a task's memory does not grow with its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.images.descriptor import DIM, SIDE, VIEWS, describe_grey
from pipeline.curate.images.measure import Measured, measure
from pipeline.curate.rows.tables import (
    FINGERPRINT,
    InputFile,
    Inputs,
    id_array,
    list_array,
    table_writer,
)
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import decode_image
from pipeline.images.value_range import ValueRange
from pipeline.shards.row_group import RowGroup, read_group, read_sources
from pipeline.uri import Place

STEP = "fingerprint"
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


def fingerprint(
    root: Place,
    inputs: Inputs,
    *,
    max_pixels: int = MAX_PIXELS,
    channels: int = 3,
    step: str = STEP,
) -> Result:
    """Writes `tables.FINGERPRINT` of every input file; accounts have rows, bytes and bad rows.

    An image that cannot be decoded is a row with the reason in `error` (`data.bad_image.REASONS`).

    Args:
        root: folder of the curation.
        inputs: all images.
        max_pixels: larger images are refused.
        channels: of an image, as the training decodes it.
        step: its name; an evaluation set has one of its own.
    """
    tasks = [Task(file.name, (file, max_pixels, channels)) for file in inputs.files]
    settings = [VERSION, inputs.digest, max_pixels, channels]
    return run_step(root, step, settings, tasks, fingerprint_file)


def fingerprint_file(
    folder: str, file: InputFile, max_pixels: int = MAX_PIXELS, channels: int = 3
) -> Account:
    """Task: the fingerprints of one file."""
    rows = bad = 0
    with table_writer(FINGERPRINT, folder, file.name) as (writer, size):
        for group, sources in groups_of(file):
            for at in range(0, len(group), BATCH):
                part = range(at, min(at + BATCH, len(group)))
                table = _table(
                    file.first + rows,
                    group,
                    sources,
                    part,
                    max_pixels,
                    channels,
                    file.columns.value_range,
                )
                bad += sum(map(bool, table.column("error").to_pylist()))
                rows += len(part)
                writer.write_table(table)
    return {"rows": rows, "bad": bad, "bytes": size()}


def groups_of(file: InputFile, groups: Any = None) -> Iterator[tuple[RowGroup, list[str]]]:
    """Row groups of an input file, all or those numbered, with the sources of their images."""
    for number in range(len(file.file.row_groups)) if groups is None else groups:
        yield (
            read_group(file.columns, file.file.path, number),
            read_sources(file.columns, file.file.path, number),
        )


def _table(
    first: int,
    group: RowGroup,
    sources: list[str],
    part: range,
    max_pixels: int,
    channels: int,
    value_range: ValueRange,
) -> pa.Table:
    """The fingerprints of a part of a row group; `first` is the row of the part's first image."""
    measures: list[Measured | None] = []
    errors: list[str] = []
    squares = np.zeros((len(part), SIDE, SIDE))
    for place, row in enumerate(part):
        try:
            encoded = group.checked(row)
            measured = measure(decode_image(encoded, channels, max_pixels, value_range))
        except BadImage as error:
            measures.append(None)
            errors.append(error.reason)
            continue
        squares[place] = measured.square
        measures.append(measured)
        errors.append("")
    full, crops = describe_grey(squares)
    hashes = b"".join(m.pixel_hash if m else bytes(16) for m in measures)
    columns: dict[str, Any] = {
        "row": first + np.arange(len(part)),
        "image_id": id_array(group.image_ids[part.start : part.stop]),
        "source": sources[part.start : part.stop],
        "bytes": [len(group.encoded[row]) for row in part],
        "width": [m.width if m else 0 for m in measures],
        "height": [m.height if m else 0 for m in measures],
        "error": errors,
        "pixel_hash": id_array(np.frombuffer(hashes, np.uint8).reshape(-1, 16)),
        "descriptor": list_array(full.reshape(len(part), DIM)),
        "views": list_array(crops.reshape(len(part), VIEWS * DIM)),
        "thumbnail": [m.thumbnail if m else b"" for m in measures],
    }
    for name in MEASURES:
        columns[name] = [getattr(m, name) if m else 0.0 for m in measures]
    return pa.table({field.name: columns[field.name] for field in FINGERPRINT}, FINGERPRINT)
