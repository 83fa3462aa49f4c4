"""The bad images that training met: a table of them, and their counts in a line."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import one_line
from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.storage.places import resolve_uri
from pipeline.storage.transfer import read_bytes, write_parquet_atomic
from pipeline.uri import Place
from pipeline.views.batch import BadImage

log = logging.getLogger("pipeline.train")


class BadTable:
    """The bad images that training met, in the contract's columns; each id once."""

    def __init__(self, place: Place) -> None:
        self.fs, self.path = resolve_uri(str(place))
        self.rows: dict[str, dict[str, str]] = {}
        try:
            table = pq.read_table(io.BytesIO(read_bytes(self.fs, self.path)))
        except FileNotFoundError:
            return
        self.rows = {row["image_id"]: row for row in table.to_pylist()}

    def add(self, bad: list[BadImage]) -> None:
        """Adds rows and writes the table again, if there are any."""
        for image_id, reason, detail in bad:
            row = {"source": "", "image_id": image_id, "stage": "pretrain", "reason": reason}
            self.rows[image_id] = row | {"detail": detail}
        if not bad:
            return
        table = pa.Table.from_pylist(list(self.rows.values()), schema=BAD_IMAGE_SCHEMA)
        try:
            write_parquet_atomic(table, self.fs, self.path, row_group_size=65_536)
        except OSError as error:  # the next bad image, or the end of the run, writes it all again
            log.error("the bad image table could not be written (%s); going on", one_line(error))


def reasons(bad: Mapping[str, int]) -> str:
    """`3 (2 truncated, 1 empty)`, or nothing where no image is bad."""
    parts = ", ".join(f"{n} {reason}" for reason, n in sorted(bad.items(), key=lambda x: -x[1]))
    return f"{sum(bad.values())} ({parts})" if parts else ""
