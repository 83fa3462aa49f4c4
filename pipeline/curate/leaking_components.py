"""Components with an image that leaks, where leaks take their components with them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.file_rows import Tables
from pipeline.curate.tables import ID, InputFile, ids_of, read_table, write_table
from pipeline.curate.work import Account

# of each component with a row that leaks: its best match
LEAKING = pa.schema(
    [
        ("component", ID),
        ("set", pa.string()),
        ("query_id", ID),
        ("similarity", pa.float64()),
        ("row_id", ID),  # image of the component that matches
    ]
)


def leaks_of(folder: str, file: InputFile, tables: Tables) -> Account:
    """Task: the best match of each component that has rows of this file that leak."""
    leaks = read_table(tables.leaks, file.name)
    members = read_table(tables.components, file.name, ["row", "component"])
    ids = read_table(tables.fingerprint, file.name, ["row", "image_id"])
    places = leaks.column("row").to_numpy() - file.first
    leaks = leaks.append_column("row_id", ids.column("image_id").take(pa.array(places)))
    joined = leaks.join(members, "row", join_type="inner") if len(members) else leaks.slice(0, 0)
    if not len(members):
        joined = joined.append_column("component", pa.array([], ID))
    best = _best(joined.select(LEAKING.names).cast(LEAKING))
    return {"rows": len(best), "bytes": write_table(best, folder, file.name)}


def best_leaks(folder: str, names: tuple[str, ...], found: str) -> Account:
    """Task: the files of `leaks_of` as one, `leaking.parquet`, with a row for each component."""
    best = _best(
        pa.concat_tables([read_table(found, name) for name in names] or [LEAKING.empty_table()])
    )
    return {"rows": len(best), "bytes": write_table(best, folder, "leaking")}


def _best(table: pa.Table) -> pa.Table:
    """One row for each component: the most similar match, then the smallest ids."""
    order = [("component", "ascending"), ("similarity", "descending")]
    order += [(name, "ascending") for name in ("set", "query_id", "row_id")]
    table = table.take(pc.sort_indices(table, sort_keys=order)).combine_chunks()
    ids = ids_of(table.column("component"))
    first = np.ones(len(ids), bool)
    first[1:] = (ids[1:] != ids[:-1]).any(1)
    return table.filter(pa.array(first))
