"""One decision for each image that went in: kept or not, the one reason, and what shows it.

Each step before says something about some rows. The first one that removes a row is its reason, in
the order of `first_reasons`. Rows that no step removes are kept if a part wants them: `_select`. Of
each part its share is kept: `leave_out`. The steps stand in tables of their own, so changing what
is decided here reads them again and computes none of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.decide.file_rows import (
    CODE,
    KEPT,
    Bytes16,
    FileRows,
    Ints,
    Known,
    Objects,
    id_objects,
    objects,
    words,
)
from pipeline.curate.decide.tally import Sources
from pipeline.curate.rows.draws_by_id import GOLDEN, mix
from pipeline.curate.rows.tables import (
    AS_IS,
    DECISIONS,
    REASONS,
    ROW,
    InputFile,
    Inputs,
    ids_of,
)
from pipeline.curate.steps.steps import Account, Output, Step
from pipeline.errors import DataError

# rows that are left when copies and leaks are gone: what retrieval and balancing choose from. Each
# is its own keeper, so the table can stand for one of exact copies.
LEFT = pa.schema([("row", ROW), ("keeper", ROW)])


@dataclass(frozen=True)
class Mix:
    """Share of each part that is kept; which images, their ids and the seed say."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)


def list_left(out: Output, file: InputFile, starts: Ints, known: Known) -> None:
    """Task: writes the rows of a file that pass quality, are no copy and do not leak."""
    rows = first_reasons(file, starts, known)
    left = file.first + np.flatnonzero(rows.code == KEPT)
    out.table(pa.table([left, left], schema=LEFT))


def decide(
    out: Output,
    file: InputFile,
    starts: Ints,
    known: Known,
    sources: Mapping[str, Sources],
    mix: Mix,
) -> Account:
    """Task: writes the decisions on the rows of one file.

    The account counts them: `counts[source][reason]`, of what is kept also `parts[source][part]`,
    and `near`, what goes as a near copy within the set (equal pixels are no matter of likeness);
    and has what a shard needs to know of the file: `low` and `high` id and `kept_bytes`.
    """
    rows = first_reasons(file, starts, known)
    _select(rows, known)
    leave_out(rows, mix)
    about = known.prints.read(file.name, ["row", "source", "bytes"])
    if not np.array_equal(about["row"].to_numpy(), file.first + np.arange(file.rows)):
        raise RuntimeError(f"fingerprint/{file.name} does not have each row of its file once")
    names = sources[file.set].names(about["source"])
    kept = rows.code == KEPT
    rows.part[~kept] = ""
    out.table(_table(rows, names))
    ids = sorted(bytes(x).hex() for x in rows.ids[kept])
    return {
        "kept": int(kept.sum()),
        "near": int(((rows.code == CODE["duplicate_near"]) & (rows.rule == "near")).sum()),
        "kept_bytes": int(about["bytes"].to_numpy()[kept].sum()),
        "low": ids[0] if ids else "",
        "high": ids[-1] if ids else "",
        "counts": _counted(names, np.array(REASONS, object)[rows.code]),
        "parts": _counted(names[kept], rows.part[kept]),
    }


# ---- Rows that go whatever is chosen: no usable image, copies, leaks.


def first_reasons(file: InputFile, starts: Ints, known: Known) -> FileRows:
    """The rows of a file, those that go with the first reason to remove them.

    Args:
        file: one of the inputs.
        starts: first row of each input file.
        known: what the steps before say.

    Raises:
        DataError: the fingerprints are not of this file.
    """
    about = known.prints.read(file.name, ["image_id", "error"])
    rows = FileRows.of(file, ids_of(about["image_id"]))
    if len(rows.ids) != file.rows:
        raise DataError(
            f"fingerprint/{file.name}.parquet has {len(rows.ids)} rows, its file has {file.rows}",
            "delete that folder and run again",
        )
    errors = words(about, "error")
    broken = np.flatnonzero(errors.astype(bool))
    rows.remove(broken, "undecodable", rule=errors[broken])
    _quality(rows, known)
    _equal(rows, starts, known)
    _leaking(rows, known)
    _earlier(rows, known)
    _near(rows, known)
    return rows


def _quality(rows: FileRows, known: Known) -> None:
    if not known.marks:
        return
    table = known.marks.read(rows.file.name)
    places, reasons = rows.places(table, "quality"), words(table, "reason")
    for reason in REASONS[1:5]:  # what quality rules say
        marked = np.flatnonzero(reasons == reason)
        rule, value = words(table, "rule")[marked], table["value"].to_numpy()[marked]
        rows.remove(places[marked], reason, rule=rule, score=value)


def _equal(rows: FileRows, starts: Ints, known: Known) -> None:
    if not known.equal:
        return
    table = known.equal.read(rows.file.name)
    places, keeper = rows.places(table, "exact"), table["keeper"].to_numpy()
    away, method = keeper != table["row"].to_numpy(), words(table, "method")
    for kind, reason in (("bytes", "duplicate_bytes"), ("pixels", "duplicate_near")):
        equal = np.flatnonzero(away & (method == kind))
        equal = equal[rows.remove(places[equal], reason, rule=kind, similarity=1.0)]
        if kind == "bytes":  # an id is a hash of the bytes
            rows.keeper[places[equal]] = objects(rows.ids[places[equal]])
        else:
            rows.keeper[places[equal]] = _ids_at(keeper[equal], starts, known.prints)


def _leaking(rows: FileRows, known: Known) -> None:
    if known.leaks:
        table = known.leaks.read(rows.file.name)
        rows.remove(rows.places(table, "leaks"), "leaks_evaluation", **_match(table))
    if not (known.leaking and known.groups):
        return
    # A group of copies leaks as a whole: its other members go with the row that matches best.
    members = known.groups.read(rows.file.name, ["row", "component"])
    leaks = known.leaking.read("leaking")
    which = pc.index_in(members["component"], leaks["component"])
    leaks, leaking = leaks.take(which.drop_null()), pc.is_valid(which)
    places = rows.places(members, "components")[leaking.to_numpy(zero_copy_only=False)]
    keeper = id_objects(leaks, "row_id")
    rows.remove(places, "leaks_evaluation", keeper=keeper, **_match(leaks))


def _match(table: pa.Table) -> dict[str, Any]:
    """The image of another set that rows are like."""
    return {
        "rule": words(table, "set"),
        "query": id_objects(table, "query_id"),
        "similarity": table["similarity"].to_numpy(),
    }


def _earlier(rows: FileRows, known: Known) -> None:
    """Copies of images that an earlier curation kept; the latest curation first."""
    for matches in known.matches:
        table = matches.read(rows.file.name)
        keeper, alike = id_objects(table, "image_id"), table["similarity"].to_numpy()
        places = rows.places(table, "matches")
        rows.remove(places, "duplicate_near", rule="earlier", keeper=keeper, similarity=alike)


def _near(rows: FileRows, known: Known) -> None:
    if not known.groups:
        return
    table = known.groups.read(rows.file.name)
    rows.component[rows.places(table, "components")] = id_objects(table, "component")
    away = table.filter(pc.not_equal(table["keeper"], table["row"]))
    keeper, alike = id_objects(away, "keeper_id"), away["similarity"].to_numpy()
    places = rows.places(away, "components")
    rows.remove(places, "duplicate_near", rule="near", keeper=keeper, similarity=alike)


def starts_of(inputs: Inputs) -> Ints:
    """First row of each input file: all that a task must know of the other files."""
    return np.array([file.first for file in inputs.files], np.int64)


def _ids_at(keepers: Ints, starts: Ints, prints: Step) -> Objects:
    """Image ids of rows that may be in any file."""
    keeper_ids = np.full(len(keepers), None, object)
    holders = np.searchsorted(starts, keepers, "right") - 1  # of files that are empty, the last
    for holder in np.unique(holders):
        ids = ids_of(prints.read(f"{holder:05d}", ["image_id"])["image_id"])
        mine = np.flatnonzero(holders == holder)
        keeper_ids[mine] = objects(ids[keepers[mine] - starts[holder]])
    return keeper_ids


# ---- Rows that are left: the part that wants them.


def _select(rows: FileRows, known: Known) -> None:
    """Gives every row that is left a part, or the reason why no part wants it."""
    kept = rows.code == KEPT
    as_is = rows.file.kind == AS_IS
    rows.part[kept] = "as_is" if as_is else ""
    if known.retrieved and not as_is:
        table = known.retrieved.read(rows.file.name)
        places = rows.places(table, "retrieved")
        still_kept = kept[places]
        places, table = places[still_kept], table.filter(pa.array(still_kept))
        for name, values in _match(table).items():
            getattr(rows, name)[places] = values
        rows.part[places] = words(table, "part")
        rows.hits[places] = table["hits"].to_numpy()
        rows.cluster[places] = table["cluster"].to_numpy()
    weighed = np.zeros(len(kept), bool)
    if known.balanced and not as_is:
        table = known.balanced.read(rows.file.name)
        places = rows.places(table, "balanced")
        weighed[places] = True
        rows.cluster[places] = table["leaf"].to_numpy()
        chosen = places[table["chosen"].to_numpy(zero_copy_only=False)]
        chosen = chosen[kept[chosen] & (rows.part[chosen] == "")]
        rows.part[chosen] = "balanced"
    left = np.flatnonzero(kept & (rows.part == ""))
    if not known.retrieved and not known.balanced:
        rows.part[left] = "pool"
        return
    # With both, balancing was the last to pass over it, and its cluster shows where it was.
    rows.remove(left[weighed[left]], "balanced_out")
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
    for (name, value), count in Counter(zip(names, values, strict=True)).items():
        by_name.setdefault(name, {})[value] = count
    return by_name


# ---- Shares of parts that are kept.


def leave_out(rows: FileRows, mix: Mix) -> None:
    """Removes rows so that each part keeps its share."""
    draw = draws(rows.ids, mix.seed)
    for part, share in mix.shares.items():
        out = np.flatnonzero((rows.part == part) & (rows.code == KEPT) & (draw >= share))
        rows.remove(out, "balanced_out", rule=f"mix.{part}")


def draws(ids: Bytes16, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number in [0, 1) for each image, from its id and the seed alone."""
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
    with np.errstate(over="ignore"):
        inner = mix((words[:, 1] ^ np.uint64(seed)) + GOLDEN)
        mixed = mix((words[:, 0] ^ inner) + GOLDEN)
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)
