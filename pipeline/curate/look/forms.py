"""Images as the second look compares them, sent to the tasks that look at their pairs.

A task for each input file decodes the images of it that some pair needs, each once, and writes the
small squares to the buckets of these pairs.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.curate.images.fingerprint import Decoding, groups_at
from pipeline.curate.look.second_look import form_of
from pipeline.curate.rows.tables import ID, ROW, InputFile
from pipeline.curate.steps.steps import Account, Output, Step
from pipeline.images.bad_image import BadImage
from pipeline.images.shown import three_channels
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

    def ids(self) -> pa.Array:
        """Image ids of the file: of its fingerprints, else its own column."""
        if self.prints:
            return self.prints.read(self.file.name, ["image_id"])["image_id"].combine_chunks()
        fs = resolve_uri(self.file.columns.uri)[0]
        with open_parquet(fs, self.file.file.path, piecewise=True) as parquet:
            assert isinstance(parquet, pq.ParquetFile) and is_ours(parquet.schema_arrow)
            texts = parquet.read(columns=["image_id"]).column(0).to_pylist()
        return pa.array(map(bytes.fromhex, texts), ID)


def write_forms(
    out: Output, images: FormsOf, places: Array, buckets: Array, decoding: Decoding
) -> Account:
    """Writes the forms of some images of a file to the buckets that need them.

    Args:
        out: where to.
        images: the file.
        places: in it; a place may come often.
        buckets: that need them.
        decoding: of the images.
    """
    ids = images.ids() if images.set else None
    each = np.unique(places)
    forms, bad = forms_at(images.file, each, decoding), 0
    for number in count():
        read = dict(islice(forms, HELD))
        if not read:
            break
        mine = np.flatnonzero(np.isin(places, list(read)))
        mine = mine[np.lexsort((places[mine], buckets[mine]))]
        at = places[mine]
        columns = [
            np.full(len(at), -1) if images.set else at + images.file.first,
            pa.array([images.set] * len(at), pa.string()),
            pa.nulls(len(at), ID) if ids is None else ids.take(pa.array(at)),
            pa.array([read[place] for place in at.tolist()], pa.binary()),
        ]
        # One file for so many forms: a task holds no more of them, however large its input is.
        table = pa.table(columns, schema=FORMS)
        out.buckets(table, buckets[mine], name=f"{images.name}-{number:05d}")
        bad += sum(not form for form in read.values())
    return {"rows": len(each), "unreadable": bad}
