"""One row of a Ray Data block: a head of small values, and large buffers as they lie.

What decoders and read tasks hand on is tens of megabytes in one to two pieces. As columns of their
own they go into the object store with one copy and come out with none. Tensor columns would do so
too, but cost Ray milliseconds a block for their types.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.shards.row_group import values_of

_HEAD = "head"


def row_of(head: Mapping[str, Any], large: Mapping[str, Any]) -> pa.Table:
    """A table of one row.

    Args:
        head: what is small; it is pickled.
        large: contiguous buffers by the names of their columns. They are not copied.
    """
    columns = {_HEAD: pa.array([pickle.dumps(dict(head), protocol=5)], pa.large_binary())}
    for name, value in large.items():
        data = pa.py_buffer(value)
        ends = pa.py_buffer(np.asarray([0, data.size], np.int64))
        columns[name] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, data])
    return pa.table(columns)


def row_at(table: pa.Table, row: int) -> tuple[dict[str, Any], dict[str, memoryview]]:
    """(head, large) of a row; the buffers are where the block is, and read only in a store."""
    large = {}
    for name in table.column_names:
        (large[name],) = values_of(table.column(name).slice(row, 1).chunk(0))
    return pickle.loads(large.pop(_HEAD)), large
