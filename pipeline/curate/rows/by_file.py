"""From tables by row, one for each task, to one table for each input file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.rows.read_rows import read_range
from pipeline.curate.rows.tables import InputFile, write_table

FILE_GROUPS = 256  # tasks that write the tables of input files, at least where there are as many
GROUP_ROWS = 4_000_000  # of the files of such a task


def by_file(
    folder: str, source: str, names: Sequence[str], files: Sequence[InputFile], schema: pa.Schema
) -> dict[str, Any]:
    """From tables by row, one for each task, to one table for each input file."""
    end = files[-1].first + files[-1].rows
    tables = list(read_range(source, names, files[0].first, end))
    tables = [table.select(schema.names) for table in tables]
    table = pa.concat_tables([schema.empty_table(), *tables]).combine_chunks().sort_by("row")
    return {"rows": len(table), "bytes": write_by_file(folder, table.cast(schema), files)}


def write_by_file(folder: str, table: pa.Table, files: Sequence[InputFile]) -> int:
    """Writes each file its part of a table that is ordered by `row`; gives the bytes."""
    row, size = table.column("row").to_numpy(), 0
    for file in files:
        begin, stop = np.searchsorted(row, [file.first, file.first + file.rows])
        size += write_table(table.slice(begin, stop - begin), folder, file.name)
    return size


def file_groups(files: Sequence[InputFile]) -> list[tuple[str, tuple[InputFile, ...]]]:
    """Neighbouring input files in groups for a task each, called after their first file."""
    rows = end_of(files) - files[0].first if files else 0
    count = min(len(files), max(FILE_GROUPS, -(-rows // GROUP_ROWS)))
    bounds = [len(files) * i // count for i in range(count + 1)] if count else []
    return [(files[a].name, tuple(files[a:b])) for a, b in pairwise(bounds) if b > a]


def end_of(files: Sequence[InputFile]) -> int:
    """The first row after these consecutive files."""
    return files[-1].first + files[-1].rows
