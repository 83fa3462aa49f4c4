"""The images that a pack leaves out because their bytes are those of another one, in a table.

Each row names the image that was packed in its place, and the classes of both. Two copies in two
classes are a fault of the labels that only their owner can mend, so they are said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.storage.places import public_uri, resolve_uri
from pipeline.storage.transfer import parquet_writer_atomic, write_parquet_atomic

log = logging.getLogger("pipeline.pack")
NAMED = 3  # pairs in a warning
DUPLICATE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("class", pa.string()),  # null where it has none
        pa.field("packed_source", pa.string()),  # the equal image that was packed
        pa.field("packed_class", pa.string()),
    ]
)


def write_part(
    index: int, rows: pa.Table, packed: Sequence[int], classes: Sequence[str | None], scratch: str
) -> dict[str, Any]:
    """Lists the duplicates of one shard.

    Args:
        index: of the shard.
        rows: of the runs' indexes, ordered so that an image follows the equal one that is packed.
        packed: for each row, the row that is packed in its place; itself where it is packed.
        classes: name of the class of each row; None where it has none.
        scratch: folder of the intermediate files.

    Returns:
        For the shard's account: `duplicates`, the rows that are not packed, and `disagreeing`,
        pairs of sources of which each has a class, and another one.
    """
    left_out = [row for row, other in enumerate(packed) if row != other]
    sources, ids = (rows.column(name).to_pylist() for name in ("source", "image_id"))
    columns = [
        [sources[row] for row in left_out],
        [ids[row] for row in left_out],
        [classes[row] for row in left_out],
        [sources[packed[row]] for row in left_out],
        [classes[packed[row]] for row in left_out],
    ]
    if left_out:
        fs, folder = resolve_uri(scratch)
        arrays = [pa.array(x, f.type) for x, f in zip(columns, DUPLICATE_SCHEMA, strict=True)]
        table = pa.table(arrays, schema=DUPLICATE_SCHEMA)
        write_parquet_atomic(table, fs, _part(folder, index), row_group_size=65_536)
        return {"duplicates": len(left_out), "disagreeing": _disagreeing(table).num_rows}
    return {"duplicates": 0, "disagreeing": 0}


def write_duplicates(place: str, scratch: str, accounts: Sequence[dict[str, Any]]) -> None:
    """One table of the parts of all shards, in the order of the ids; it has no rows where there
    are no duplicates. Says which ones disagree about their class.

    Args:
        place: of the table, a path or URI.
        scratch: folder of the intermediate files.
        accounts: of the shards, in order.
    """
    fs, folder = resolve_uri(scratch)
    named: list[str] = []
    out, path = resolve_uri(place)
    with parquet_writer_atomic(DUPLICATE_SCHEMA, out, path) as writer:
        for table in _parts(fs, folder, accounts):
            writer.write_table(table)
            if len(named) < NAMED:
                pairs = _disagreeing(table).slice(0, NAMED - len(named)).to_pylist()
                named += [f"{row['source']} and {row['packed_source']}" for row in pairs]
    if count := sum(account["disagreeing"] for account in accounts):
        log.warning(
            "%d image%s in one class %s byte for byte in another one, such as %s: the first by "
            "name is packed, with its class; all are listed in %s",
            count,
            "s" * (count != 1),
            "is" if count == 1 else "are",
            "; ".join(named),
            public_uri(place),
        )


def _parts(
    fs: pafs.FileSystem, folder: str, accounts: Sequence[dict[str, Any]]
) -> Iterator[pa.Table]:
    for account in accounts:
        if account["duplicates"]:
            with fs.open_input_file(_part(folder, account["index"])) as file:
                yield pq.read_table(file, schema=DUPLICATE_SCHEMA)


def _part(folder: str, index: int) -> str:
    return f"{folder}/duplicates/shard-{index:06d}.parquet"


def _disagreeing(table: pa.Table) -> pa.Table:
    return table.filter(pc.not_equal(table["class"], table["packed_class"]))
