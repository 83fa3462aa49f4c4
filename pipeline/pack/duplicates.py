"""The images that a pack leaves out because their bytes are those of another one, in a table.

Each row names the image that was packed in its place, and the classes of both. Two copies in two
classes are a fault of the labels that only their owner can mend, so they are said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.storage.places import public_uri, resolve_uri
from pipeline.storage.transfer import open_patiently, parquet_writer_atomic, write_parquet_atomic

log = logging.getLogger("pipeline.pack")
Progress = Callable[[str, int, int], None]
NAMED = 3  # pairs in a warning
ROW_GROUP = 65_536
READERS = 16
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
    index: int,
    rows: pa.Table,
    packed: np.ndarray[Any, Any],
    classes: Sequence[str | None],
    scratch: str,
) -> pa.Table:
    """Lists the duplicates of one shard, in a file and as a table of `DUPLICATE_SCHEMA`.

    Args:
        index: of the shard.
        rows: of the runs' indexes, ordered so that an image follows the equal one that is packed.
        packed: for each row, int64 [N], the row that is packed in its place; itself where it is.
        classes: name of the class of each row; None where it has none.
        scratch: folder of the intermediate files.
    """
    left_out = np.flatnonzero(packed != np.arange(len(packed)))
    every = pa.table(
        {
            "source": rows.column("source"),
            "image_id": rows.column("image_id"),
            "class": pa.array(classes, pa.string()),
        }
    )
    own, other = (every.take(pa.array(which)) for which in (left_out, packed[left_out]))
    columns = [*own.columns, other["source"], other["class"]]
    table = pa.table(columns, schema=DUPLICATE_SCHEMA)
    fs, folder = resolve_uri(scratch)
    write_parquet_atomic(table, fs, _part(folder, index), row_group_size=ROW_GROUP)
    return table


def write_duplicates(
    place: str, scratch: str, accounts: Sequence[dict[str, Any]], on_progress: Progress | None
) -> None:
    """One table of the parts of all shards, in the order of the ids; it has no rows where there
    are no duplicates. Says which ones disagree about their class.

    Args:
        place: of the table, a path or URI.
        scratch: folder of the intermediate files.
        accounts: of the shards, in order.
        on_progress: called with what is done, parts done, parts in all.
    """
    fs, folder = resolve_uri(scratch)
    named: list[str] = []
    out, path = resolve_uri(place)
    with parquet_writer_atomic(DUPLICATE_SCHEMA, out, path) as writer:
        for table in _gathered(_parts(fs, folder, accounts, on_progress)):
            writer.write_table(table, row_group_size=ROW_GROUP)
            if len(named) < NAMED:
                pairs = disagreeing(table).slice(0, NAMED - len(named)).to_pylist()
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
    fs: pafs.FileSystem,
    folder: str,
    accounts: Sequence[dict[str, Any]],
    on_progress: Progress | None,
) -> Iterator[pa.Table]:
    """The parts that there are, in order; some are read ahead, for storage answers slowly."""

    def read(index: int) -> pa.Table:
        with open_patiently(fs, _part(folder, index)) as file:
            return pq.read_table(file, schema=DUPLICATE_SCHEMA)

    indexes = [account["index"] for account in accounts if account["duplicates"]]
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(indexes), READERS):
            if start and on_progress is not None:
                on_progress("list of duplicates", start, len(indexes))
            yield from pool.map(read, indexes[start : start + READERS])


def _gathered(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables together, so that there is no row group for each shard."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += len(table)
        if rows >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting, rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _part(folder: str, index: int) -> str:
    return f"{folder}/duplicates/shard-{index:06d}.parquet"


def disagreeing(table: pa.Table) -> pa.Table:
    """The rows of a list of duplicates whose class is not that of the image that is packed."""
    return table.filter(pc.not_equal(table["class"], table["packed_class"]))
