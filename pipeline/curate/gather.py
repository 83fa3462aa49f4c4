"""What the choice of keepers needs of each row, from all tables to the tasks of its component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.bucketed import raw, shelves_of, write_buckets
from pipeline.curate.collapse import copies_of
from pipeline.curate.connected import LABELS, part_of
from pipeline.curate.portions import CROPS, Portion, read_range, read_rows
from pipeline.curate.tables import AS_IS, InputFile, Vectors, id_array, ids_of
from pipeline.uri import join

Array = np.ndarray[Any, Any]
PART_BYTES = 2**27  # of the vectors that a task takes


def parts_for(rows: int, vectors: Vectors) -> int:
    """Tasks that choose keepers, for so many rows with copies."""
    each = vectors.dim * 2 * (1 + CROPS * vectors.views) + 100
    return max(1, -(-rows * each // PART_BYTES))


def gather_task(
    folder: str,
    vectors: Vectors,
    portion: Portion,
    files: Sequence[InputFile],
    labels: tuple[str, Sequence[str]],
    copies: tuple[str, Sequence[str]],
    fingerprints: str,
    aside: Sequence[str],
    parts: int,
) -> dict[str, Any]:
    """Writes what the choice of keepers needs of a portion's rows, by component.

    Bucket 2 b has all rows, 2 b + 1 the vectors of those that stand for themselves.
    """
    rows: list[dict[str, Array]] = []
    kinds = {file.name: file.kind for file in files}
    stands = copies_of(portion, copies)
    copy, stand = stands.column("row").to_numpy(), stands.column("stands").to_numpy()
    for part in portion.parts:
        found = list(read_range(*labels, part.first, part.end))
        if not found:
            continue
        own = pa.concat_tables(found).sort_by("row")
        row, label = (own.column(name).to_numpy() for name in LABELS.names)
        columns = ["row", "image_id", "bytes", "width", "height"]
        facts = next(read_range(fingerprints, [part.name], part.first, part.end, columns))
        at = np.searchsorted(facts.column("row").to_numpy(), row)
        area = facts.column("width").to_numpy().astype(np.int64) * facts.column("height").to_numpy()
        density = facts.column("bytes").to_numpy() / np.maximum(area, 1)
        going = np.zeros(len(row), bool)
        for one in aside:
            for table in read_range(one, [part.name], part.first, part.end, ["row"]):
                going |= np.isin(row, table.column("row").to_numpy())
        of = np.arange(len(row)) if not len(copy) else np.searchsorted(copy, row)
        is_copy = np.isin(row, copy)
        rows.append(
            {
                "row": row,
                "label": label,
                "image_id": ids_of(facts.column("image_id"))[at],
                "as_is": np.full(len(row), kinds[part.name] == AS_IS),
                "area": area[at],
                "density": density[at],
                "goes": going,
                "stands": np.where(is_copy, stand[np.minimum(of, len(stand) - 1)], row)
                if len(copy)
                else row,
            }
        )
    if not rows:
        return {"rows": 0, "bytes": 0, "shelves": [], "vector_shelves": []}
    whole = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    bucket = part_of(whole["label"], parts)
    order = np.argsort(bucket, kind="stable")
    table = pa.table(
        {
            name: id_array(values[order]) if name == "image_id" else values[order]
            for name, values in whole.items()
        }
    )
    size = write_buckets(str(join(folder, "rows")), portion.name, table, bucket[order])
    own = whole["stands"] == whole["row"]
    wanted = whole["row"][own]
    found_rows = read_rows(vectors, portion, views=True)
    found_rows = found_rows.only(np.isin(found_rows.row, wanted))
    by_row = np.argsort(wanted)
    label = whole["label"][own][by_row][np.searchsorted(wanted[by_row], found_rows.row)]
    mine = part_of(label, parts)
    order = np.argsort(mine, kind="stable")
    columns_of = {"row": found_rows.row[order], "vector": raw(found_rows.vectors[order])}
    if found_rows.crops is not None:
        crops = found_rows.crops[order].reshape(len(order), CROPS * vectors.dim)
        columns_of["crops"] = raw(crops)
    size += write_buckets(
        str(join(folder, "vectors")), portion.name, pa.table(columns_of), mine[order]
    )
    shelves = {"shelves": shelves_of(bucket), "vector_shelves": shelves_of(mine)}
    return {"rows": len(whole["row"]), "bytes": size, **shelves}
