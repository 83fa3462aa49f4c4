"""Images as the second look compares them, sent to the tasks that look at their pairs.

A task for each input file decodes the images of it that some pair needs, each once, and writes the
small squares to the buckets of these pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.curate.images.fingerprint import groups_of
from pipeline.curate.images.measure import three_channels
from pipeline.curate.look.second_look import form_of
from pipeline.curate.rows.bucketed import shelves_of, write_buckets
from pipeline.curate.rows.tables import ID, ROW, InputFile, id_array, ids_of, read_table
from pipeline.curate.steps.steps import Account
from pipeline.images.bad_image import MAX_PIXELS, BadImage
from pipeline.images.decode import decode_image
from pipeline.images.value_range import ValueRange
from pipeline.shards.columns import is_ours
from pipeline.shards.shards import open_parquet
from pipeline.storage.places import resolve_uri

HELD = 1024  # forms that a task holds, some 60 kB each
QUALITY = 95  # of the JPEG that a form is kept as; changes a value by 2 or so

# `row` of the images that are curated, `image_id` of those of other sets.
FORMS = pa.schema([("row", ROW), ("set", pa.string()), ("image_id", ID), ("form", pa.binary())])
Array = np.ndarray[Any, Any]


def kept_form(form: Array) -> bytes:
    """A form as it is stored."""
    stream = io.BytesIO()
    Image.fromarray(form).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return stream.getvalue()


def opened_form(stored: bytes) -> Array:
    """uint8 [S, S, 3] of `kept_form`."""
    with Image.open(io.BytesIO(stored)) as image:
        return np.asarray(image)


def form_of_encoded(
    encoded: bytes, channels: int, max_pixels: int, value_range: ValueRange
) -> bytes:
    """The stored form of an encoded image; b"" where it cannot be decoded."""
    try:
        pixels = decode_image(encoded, channels, max_pixels, value_range)
        return kept_form(form_of(three_channels(pixels)))
    except BadImage:
        return b""


def forms_at(
    file: InputFile, places: Array, channels: int, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[int, bytes]]:
    """Places of a file, ascending, each with its stored form; row groups are read once."""
    starts = np.cumsum([0, *file.file.row_groups])
    groups = np.searchsorted(starts, places, side="right") - 1
    for number in np.unique(groups).tolist():
        group, _ = next(groups_of(file, [number]))
        for place in places[groups == number].tolist():
            encoded = group.image(place - int(starts[number]))
            yield place, form_of_encoded(encoded, channels, max_pixels, file.columns.value_range)


def write_forms(
    folder: str,
    file: InputFile,
    set_name: str,
    requests: tuple[Array, Array],
    ids: Array | None,
    channels: int,
    max_pixels: int,
) -> Account:
    """Writes the forms of some places of a file to the buckets that need them.

    Args:
        folder: of the step.
        file: which.
        set_name: "" where the images are known by their row.
        requests: places in the file, and the bucket that needs each; a place may come often.
        ids: image ids of the whole file, where the images are known by them.
        channels: as they are decoded.
        max_pixels: larger images are refused.
    """
    place, bucket = requests
    order = np.lexsort((bucket, place))
    place, bucket = place[order], bucket[order]
    each = np.unique(place)
    size, bad = 0, 0
    names: list[tuple[str, list[int]]] = []
    read: dict[int, bytes] = {}

    def write() -> int:
        mine = np.isin(place, np.array(list(read), np.int64))
        p, b = place[mine], bucket[mine]
        by_bucket = np.argsort(b, kind="stable")
        p, b = p[by_bucket], b[by_bucket]
        table = pa.table(
            {
                "row": p + file.first if ids is None else np.full(len(p), -1),
                "set": pa.array([set_name] * len(p), pa.string()),
                "image_id": pa.nulls(len(p), ID) if ids is None else id_array(ids[p]),
                "form": pa.array([read[int(one)] for one in p], pa.binary()),
            }
        ).cast(FORMS)
        name = f"{set_name}-{file.name}-{len(names):05d}"
        names.append((name, shelves_of(b)))
        return write_buckets(folder, name, table, b)

    for one, form in forms_at(file, each, channels, max_pixels):
        read[one] = form
        bad += not form
        if len(read) == HELD:
            size += write()
            read.clear()
    if read:
        size += write()
    return {"rows": len(each), "bytes": size, "names": names, "unreadable": bad}


def ids_of_file(file: InputFile, fingerprints: str) -> Array:
    """Image ids of a file: of its fingerprints, else its own column."""
    if fingerprints:
        return ids_of(read_table(fingerprints, file.name, ["image_id"]).column("image_id"))
    fs = resolve_uri(file.columns.uri)[0]
    with open_parquet(fs, file.file.path, piecewise=True) as parquet:
        assert isinstance(parquet, pq.ParquetFile) and is_ours(parquet.schema_arrow)
        texts = parquet.read(columns=["image_id"]).column(0).to_pylist()
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 16)
