"""A file of a set of others: rows with the bytes of their number."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def write_shards(folder: Path, images: int, group: int) -> Path:
    """`image 0`, `image 1`, … in row groups of `group`."""
    folder.mkdir()
    content = [b"image %d" % row for row in range(images)]
    pq.write_table(pa.table({"image": content}), folder / "a.parquet", row_group_size=group)
    return folder
