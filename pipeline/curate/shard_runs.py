"""Input files that are not ordered by id, each sorted by itself, for the shards to read from.

Row groups of a sorted file end where a shard ends, so a shard reads what is its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.shard_form import Form
from pipeline.curate.shard_rows import decided, formed, opened
from pipeline.curate.tables import InputFile, Inputs, read_table
from pipeline.curate.work import Account, Result, Task, run_step
from pipeline.data.merge import shard_of
from pipeline.data.storage import resolve_uri
from pipeline.data.transfer import parquet_writer_atomic
from pipeline.uri import Place, join

RUN_BYTES = 256 * 2**20  # of images that are sorted at once


def sort_files(
    work: Place,
    inputs: Inputs,
    decisions: Result,
    fingerprints: str,
    form: Form,
    count: int,
    key: str,
) -> Result | None:
    """The step that sorts the files that are not packed; None where nothing of them is kept."""
    loose = [
        file
        for file, account in zip(inputs.files, decisions.accounts, strict=True)
        if file.set not in form.packed and account["kept"]
    ]
    if not loose:
        return None
    tasks = [Task(file.name, (file, count, decisions.folder, fingerprints, form)) for file in loose]
    return run_step(work, "sorted", key, tasks, sort_file)


def sort_file(
    folder: str, file: InputFile, count: int, decisions: str, fingerprints: str, form: Form
) -> Account:
    """Task: the rows of a file that are kept, as one or more files sorted by id."""
    ids, kept = decided(file, decisions)
    about = read_table(fingerprints, file.name, ["source", "width", "height"])
    runs: list[dict[str, Any]] = []
    held: list[pa.Table] = []
    total = 0

    def flush() -> None:
        if not held:
            return
        table = pa.concat_tables(held)
        table = table.take(pc.sort_indices(table, [("image_id", "ascending")]))
        name = f"{file.name}-{len(runs):03d}"
        places = [shard_of(x, count) for x in table.column("image_id").to_pylist()]
        fs, path = resolve_uri(str(join(folder, f"{name}.parquet")))
        order, first = [], 0
        with parquet_writer_atomic(form.schema, fs, path) as writer:
            for end in range(1, len(places) + 1):
                if end == len(places) or places[end] != places[first]:
                    writer.write_table(table.slice(first, end - first), row_group_size=end - first)
                    order.append(places[first])
                    first = end
        runs.append({"name": name, "shards": order})
        held.clear()

    with opened(file) as parquet:
        first = 0
        for group, rows in enumerate(file.file.row_groups):
            wanted = np.flatnonzero(kept[first : first + rows])
            if len(wanted):
                table = parquet.read_row_group(group).take(pa.array(wanted))
                held.append(
                    formed(table, ids[first + wanted], about.take(first + wanted), file, form)
                )
                total += table.nbytes
                if total >= RUN_BYTES:
                    flush()
                    total = 0
            first += rows
    flush()
    return {"rows": int(kept.sum()), "file": file.index, "runs": runs}
