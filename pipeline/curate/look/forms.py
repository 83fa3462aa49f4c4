"""Images as the second look compares them, sent to the tasks that look at their pairs.

A task for each input file decodes the images of it that some pair needs, each once, and writes the
small squares to the buckets of these pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.curate.images.fingerprint import Decoding, groups_at
from pipeline.curate.images.measure import three_channels
from pipeline.curate.look.second_look import form_of
from pipeline.curate.rows.tables import ID, ROW, InputFile, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step
from pipeline.images.bad_image import BadImage
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


def form_of_encoded(encoded: bytes, decoding: Decoding, value_range: ValueRange) -> bytes:
    """The stored form of an encoded image; b"" where it cannot be decoded."""
    try:
        return kept_form(form_of(three_channels(decoding.pixels(encoded, value_range))))
    except BadImage:
        return b""


def forms_at(file: InputFile, places: Array, decoding: Decoding) -> Iterator[tuple[int, bytes]]:
    """Places of a file, ascending, each with its stored form; row groups are read once."""
    for group, rows, first in groups_at(file, places):
        for row in rows.tolist():
            encoded = group.image(row)
            yield first + row, form_of_encoded(encoded, decoding, file.columns.value_range)


@dataclass(frozen=True)
class FormsOf:
    """A file whose images some pairs need.

    Attributes:
        file: which.
        set: of another set; empty: the images are known by their row.
        prints: fingerprints of the other set; None: the file itself holds ids.
    """

    file: InputFile
    set: str = ""
    prints: Step | None = None

    @property
    def name(self) -> str:
        """Of the task."""
        return f"{self.set}-{self.file.name}"


def write_forms(
    out: Output,
    images: FormsOf,
    requests: tuple[Array, Array],
    ids: Array | None,
    decoding: Decoding,
) -> Account:
    """Writes the forms of some places of a file to the buckets that need them.

    Args:
        out: where to.
        images: the file.
        requests: places in it, and the bucket that needs each; a place may come often.
        ids: image ids of the whole file, where the images are known by them.
        decoding: of the images.
    """
    place, bucket = requests
    order = np.lexsort((bucket, place))
    place, bucket = place[order], bucket[order]
    each = np.unique(place)
    bad = written = 0
    read: dict[int, bytes] = {}

    def write() -> None:
        mine = np.isin(place, np.array(list(read), np.int64))
        p = place[mine]
        columns = [
            p + images.file.first if ids is None else np.full(len(p), -1),
            pa.array([images.set] * len(p), pa.string()),
            pa.nulls(len(p), ID) if ids is None else id_array(ids[p]),
            pa.array([read[int(one)] for one in p], pa.binary()),
        ]
        table = pa.table(columns, schema=FORMS)
        out.buckets(table, bucket[mine], name=f"{images.name}-{written:05d}")

    for one, form in forms_at(images.file, each, decoding):
        read[one] = form
        bad += not form
        if len(read) == HELD:
            write()
            written += 1
            read.clear()
    if read:
        write()
    return {"rows": len(each), "unreadable": bad}


def ids_of_file(images: FormsOf) -> Array:
    """Image ids of a file: of its fingerprints, else its own column."""
    file = images.file
    if images.prints:
        return ids_of(images.prints.read(file.name, ["image_id"])["image_id"])
    fs = resolve_uri(file.columns.uri)[0]
    with open_parquet(fs, file.file.path, piecewise=True) as parquet:
        assert isinstance(parquet, pq.ParquetFile) and is_ours(parquet.schema_arrow)
        texts = parquet.read(columns=["image_id"]).column(0).to_pylist()
    return np.frombuffer(bytes.fromhex("".join(texts)), np.uint8).reshape(-1, 16)
