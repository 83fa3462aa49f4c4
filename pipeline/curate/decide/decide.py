"""One decision for each image that went in: kept or not, the one reason, and what shows it.

Rows that no step removes are kept if a part wants them. The steps stand in tables of their own, so
changing what is decided here reads them again and computes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.decide.reasons import Starts, judged
from pipeline.curate.decide.sources import Sources
from pipeline.curate.rows.draws_by_id import GOLDEN, mix
from pipeline.curate.rows.file_rows import CODE, KEPT, Bytes16, FileRows, Objects, Tables, objects
from pipeline.curate.rows.tables import (
    AS_IS,
    DECISIONS,
    REASONS,
    ROW,
    InputFile,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account

PARTS = ("as_is", "sample", "cluster", "balanced", "pool")


def decide(
    folder: str, file: InputFile, starts: Starts, tables: Tables, sources: Sources, mix: Mix
) -> Account:
    """Task: writes the decisions on the rows of one file.

    The account counts them: `counts[source][reason]`, of what is kept also `parts[source][part]`,
    and `near`, what goes as a near copy within the set (equal pixels are no matter of likeness);
    and has what a shard needs to know of the file: `low` and `high` id and `kept_bytes`.
    """
    rows = judged(file, starts, tables)
    _select(rows, tables)
    leave_out(rows, mix)
    about = read_table(tables.fingerprint, file.name, ["row", "source", "bytes"])
    if not np.array_equal(about.column("row").to_numpy(), file.first + np.arange(file.rows)):
        raise RuntimeError(f"fingerprint/{file.name} does not have each row of its file once")
    names = sources.names(about.column("source"))
    kept = rows.code == KEPT
    rows.part[~kept] = ""
    written = write_table(_table(rows, names), folder, file.name)
    ids = sorted(bytes(x).hex() for x in rows.ids[kept])
    return {
        "rows": len(kept),
        "bytes": written,
        "kept": int(kept.sum()),
        "near": int(((rows.code == CODE["duplicate_near"]) & (rows.rule == "near")).sum()),
        "kept_bytes": int(about.column("bytes").to_numpy()[kept].sum()),
        "low": ids[0] if ids else "",
        "high": ids[-1] if ids else "",
        "counts": _counted(names, np.array(REASONS, object)[rows.code]),
        "parts": _counted(names[kept], rows.part[kept]),
    }


def _select(rows: FileRows, tables: Tables) -> None:
    """Gives every row that is left a part, or the reason why no part wants it."""
    kept = rows.code == KEPT
    as_is = rows.file.kind == AS_IS
    rows.part[kept] = "as_is" if as_is else ""
    if tables.retrieved and not as_is:
        table = read_table(tables.retrieved, rows.file.name)
        places = rows.places(table, "retrieved")
        still_kept = kept[places]
        places, table = places[still_kept], table.filter(pa.array(still_kept))
        rows.part[places] = np.array(table.column("part").to_pylist(), object)
        rows.rule[places] = np.array(table.column("set").to_pylist(), object)
        rows.query[places] = objects(ids_of(table.column("query_id")))
        rows.similarity[places] = table.column("similarity").to_numpy()
        rows.hits[places] = table.column("hits").to_numpy()
        rows.cluster[places] = table.column("cluster").to_numpy()
    considered = np.zeros(len(kept), bool)
    if tables.balanced and not as_is:
        table = read_table(tables.balanced, rows.file.name)
        places = rows.places(table, "balanced")
        considered[places] = True
        rows.cluster[places] = table.column("leaf").to_numpy()
        chosen = places[table.column("chosen").to_numpy(zero_copy_only=False)]
        chosen = chosen[kept[chosen] & (rows.part[chosen] == "")]
        rows.part[chosen] = "balanced"
    left = np.flatnonzero(kept & (rows.part == ""))
    if not tables.retrieved and not tables.balanced:
        rows.part[left] = "pool"
        return
    # With both, balancing was the last to pass over it, and its cluster shows where it was.
    rows.remove(left[considered[left]], "balanced_out")
    rows.remove(left, "not_retrieved")


def _table(rows: FileRows, sources: Objects) -> pa.Table:
    def hexed(values: Objects) -> pa.Array:
        return pa.array([None if value is None else value.hex() for value in values], pa.string())

    def number(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, from_pandas=True)  # NaN: there is none

    kept = rows.code == KEPT
    return pa.table(
        {
            "image_id": pa.array([value.tobytes().hex() for value in rows.ids], pa.string()),
            "kept": pa.array(kept),
            "reason": pa.array(np.array(REASONS, object)[rows.code], pa.string()),
            "keeper_id": hexed(rows.keeper),
            "similarity": number(np.minimum(rows.similarity, 1.0), pa.float32()),
            "component": hexed(rows.component),
            "cluster": pa.array(rows.cluster, pa.int64(), mask=rows.cluster < 0),
            "query_id": hexed(rows.query),
            "score": number(rows.score, pa.float32()),
            "rule": pa.array(rows.rule, pa.string()),
            "part": pa.array(rows.part, pa.string()),
            "source": pa.array(sources, pa.string()),
            "hits": pa.array(rows.hits, pa.int32()),
            "row": pa.array(rows.file.first + np.arange(len(kept)), ROW),
        },
        schema=DECISIONS,
    )


def _counted(names: Objects, values: Objects) -> dict[str, dict[str, int]]:
    by_name: dict[str, dict[str, int]] = {}
    for name, value in zip(names, values, strict=True):
        counts = by_name.setdefault(name, {})
        counts[value] = counts.get(value, 0) + 1
    return by_name


# ---- Shares of parts that are kept: which images, their ids and the seed say.


@dataclass(frozen=True)
class Mix:
    """Share of each part that is kept; which images, their ids and the seed say."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)


def leave_out(rows: FileRows, mix: Mix) -> None:
    """Removes rows so that each part keeps its share."""
    draw = draws(rows.ids, mix.seed)
    for part, share in mix.shares.items():
        out = np.flatnonzero((rows.part == part) & (rows.code == KEPT) & (draw >= share))
        rows.remove(out, "balanced_out")
        rows.rule[out] = f"mix.{part}"


def draws(ids: Bytes16, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number in [0, 1) for each image, from its id and the seed alone."""
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
    with np.errstate(over="ignore"):
        inner = mix((words[:, 1] ^ np.uint64(seed)) + GOLDEN)
        mixed = mix((words[:, 0] ^ inner) + GOLDEN)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)
