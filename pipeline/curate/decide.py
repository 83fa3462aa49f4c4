"""One decision for each image that went in: kept or not, the one reason, and what shows it.

Every step before says something about some rows. Here the first one that removes a row is its
reason, in the order of REMOVED; what is left is kept if a part wants it. The steps stand in tables
of their own, so changing what is decided here reads them again and computes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.sources import Sources
from pipeline.curate.tables import (
    AS_IS,
    DECISIONS,
    ID,
    REASONS,
    ROW,
    InputFile,
    Inputs,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.work import Account
from pipeline.errors import DataError

PARTS = ("as_is", "sample", "cluster", "balanced", "pool")
CODE = {reason: code for code, reason in enumerate(REASONS)}
KEPT = CODE["kept"]

# rows that are left when copies and leaks are gone: what retrieval and balancing choose from. Each
# is its own keeper, so the table can stand for one of exact copies.
ALIVE = pa.schema([("row", ROW), ("keeper", ROW)])
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

Bytes16 = np.ndarray[Any, np.dtype[np.uint8]]
Objects = np.ndarray[Any, np.dtype[np.object_]]
Starts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tables:
    """Folders of the steps that decisions are made from; empty where a step was left out."""

    fingerprint: str
    quality: str = ""
    exact: str = ""
    components: str = ""
    leaks: str = ""
    leaking: str = ""  # of `best_leaks`; given where leaks take their components with them
    matches: tuple[str, ...] = ()  # with each earlier curation that images are added to
    retrieved: str = ""
    balanced: str = ""


@dataclass(frozen=True)
class Mix:
    """Share of each part that is kept; which images, their ids and the seed say."""

    seed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Rows:
    """What is known of the rows of one file; ids as bytes, None where there is none."""

    file: InputFile
    ids: Bytes16
    code: np.ndarray[Any, np.dtype[np.int8]]
    rule: Objects
    keeper: Objects
    query: Objects
    component: Objects
    part: Objects
    similarity: np.ndarray[Any, np.dtype[np.float64]]
    score: np.ndarray[Any, np.dtype[np.float64]]
    cluster: np.ndarray[Any, np.dtype[np.int64]]
    hits: np.ndarray[Any, np.dtype[np.int32]]

    @classmethod
    def of(cls, file: InputFile, ids: Bytes16) -> _Rows:
        n = len(ids)
        return cls(
            file,
            ids,
            code=np.zeros(n, np.int8),
            rule=np.full(n, "", object),
            keeper=np.full(n, None, object),
            query=np.full(n, None, object),
            component=np.full(n, None, object),
            part=np.full(n, "", object),
            similarity=np.full(n, np.nan),
            score=np.full(n, np.nan),
            cluster=np.full(n, -1, np.int64),
            hits=np.zeros(n, np.int32),
        )

    def places(self, table: pa.Table, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where the rows of a step's table are in this file."""
        found = table.column("row").to_numpy() - self.file.first
        if len(found) and (
            found[0] < 0 or found[-1] >= len(self.ids) or (np.diff(found) <= 0).any()
        ):
            raise RuntimeError(f"{name}/{self.file.name} has rows that are not of this file")
        return np.asarray(found, np.int64)

    def remove(self, places: Any, reason: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Gives rows that are still kept a reason; which of `places` were."""
        fresh: np.ndarray[Any, np.dtype[np.bool_]] = self.code[places] == KEPT
        self.code[places[fresh]] = CODE[reason]
        return fresh


def alive(folder: str, file: InputFile, starts: Starts, tables: Tables) -> Account:
    """Task: writes the rows of a file that pass quality, are no copy and do not leak."""
    rows = _without_copies(file, starts, tables)
    left = file.first + np.flatnonzero(rows.code == KEPT)
    table = pa.table([left, left], schema=ALIVE)
    return {"rows": len(left), "bytes": write_table(table, folder, file.name)}


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


def decide(
    folder: str, file: InputFile, starts: Starts, tables: Tables, sources: Sources, mix: Mix
) -> Account:
    """Task: writes the decisions on the rows of one file.

    The account counts them: `counts[source][reason]`, of what is kept also `parts[source][part]`;
    and has what a shard needs to know of the file: `low` and `high` id and `kept_bytes`.
    """
    rows = _without_copies(file, starts, tables)
    _select(rows, tables)
    _mix(rows, mix)
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
        "kept_bytes": int(about.column("bytes").to_numpy()[kept].sum()),
        "low": ids[0] if ids else "",
        "high": ids[-1] if ids else "",
        "counts": _counted(names, np.array(REASONS, object)[rows.code]),
        "parts": _counted(names[kept], rows.part[kept]),
    }


def _without_copies(file: InputFile, starts: Starts, tables: Tables) -> _Rows:
    about = read_table(tables.fingerprint, file.name, ["image_id", "error"])
    rows = _Rows.of(file, ids_of(about.column("image_id")))
    if len(rows.ids) != file.rows:
        raise DataError(
            f"fingerprint/{file.name}.parquet has {len(rows.ids)} rows, its file has {file.rows}",
            "delete that folder and run again",
        )
    _quality(rows, tables, about.column("error").to_pylist())
    _equal(rows, starts, tables)
    _leaking(rows, tables)
    _earlier(rows, tables)
    _near(rows, tables)
    return rows


def _quality(rows: _Rows, tables: Tables, errors: list[str]) -> None:
    broken = np.array([place for place, error in enumerate(errors) if error], np.int64)
    rows.remove(broken, "undecodable")
    for place in broken:
        rows.rule[place] = errors[place]
    if not tables.quality:
        return
    table = read_table(tables.quality, rows.file.name)
    reasons = np.array(table.column("reason").to_pylist(), object)
    places = rows.places(table, "quality")
    for reason in REASONS[1:5]:  # what quality rules say
        marked = np.flatnonzero(reasons == reason) if len(reasons) else np.zeros(0, np.int64)
        marked = marked[rows.remove(places[marked], reason)]
        rows.rule[places[marked]] = np.array(table.column("rule").to_pylist(), object)[marked]
        rows.score[places[marked]] = table.column("value").to_numpy()[marked]


def _equal(rows: _Rows, starts: Starts, tables: Tables) -> None:
    if not tables.exact:
        return
    table = read_table(tables.exact, rows.file.name)
    places, keeper = rows.places(table, "exact"), table.column("keeper").to_numpy()
    method = np.array(table.column("method").to_pylist(), object)
    away = keeper != table.column("row").to_numpy()
    for kind, reason in (("bytes", "duplicate_bytes"), ("pixels", "duplicate_near")):
        these = np.flatnonzero(away & (method == kind)) if len(method) else np.zeros(0, np.int64)
        these = these[rows.remove(places[these], reason)]
        rows.rule[places[these]] = kind
        rows.similarity[places[these]] = 1.0
        if kind == "bytes":  # an id is a hash of the bytes
            rows.keeper[places[these]] = _objects(rows.ids[places[these]])
        elif len(these):
            rows.keeper[places[these]] = _ids_at(keeper[these], starts, tables.fingerprint)


def _leaking(rows: _Rows, tables: Tables) -> None:
    if tables.leaks:
        table = read_table(tables.leaks, rows.file.name)
        places = rows.places(table, "leaks")
        fresh = rows.remove(places, "leaks_evaluation")
        _matched(rows, places[fresh], table.filter(pa.array(fresh)))
    if not tables.leaking:
        return
    members = read_table(tables.components, rows.file.name, ["row", "component"])
    places = rows.places(members, "components")
    found = read_table(tables.leaking, "leaking")
    index = pc.index_in(members.column("component"), found.column("component"))
    hit = pc.is_valid(index).to_numpy(zero_copy_only=False)
    which = index.drop_null()
    fresh = rows.remove(places[hit], "leaks_evaluation")
    found = found.take(which.filter(pa.array(fresh)))
    places = places[hit][fresh]
    _matched(rows, places, found)
    rows.keeper[places] = _objects(ids_of(found.column("row_id")))


def _matched(rows: _Rows, places: Any, table: pa.Table) -> None:
    rows.rule[places] = np.array(table.column("set").to_pylist(), object)
    rows.query[places] = _objects(ids_of(table.column("query_id")))
    rows.similarity[places] = table.column("similarity").to_numpy()


def _earlier(rows: _Rows, tables: Tables) -> None:
    """Copies of images that an earlier curation kept; the latest curation first."""
    for folder in tables.matches:
        table = read_table(folder, rows.file.name)
        places = rows.places(table, "matches")
        fresh = rows.remove(places, "duplicate_near")
        places, table = places[fresh], table.filter(pa.array(fresh))
        rows.rule[places] = "earlier"
        rows.keeper[places] = _objects(ids_of(table.column("image_id")))
        rows.similarity[places] = table.column("similarity").to_numpy()


def _near(rows: _Rows, tables: Tables) -> None:
    if not tables.components:
        return
    table = read_table(tables.components, rows.file.name)
    places = rows.places(table, "components")
    rows.component[places] = _objects(ids_of(table.column("component")))
    away = table.column("keeper").to_numpy() != table.column("row").to_numpy()
    fresh = rows.remove(places[away], "duplicate_near")
    left = np.flatnonzero(away)[fresh]
    rows.rule[places[left]] = "near"
    rows.keeper[places[left]] = _objects(ids_of(table.column("keeper_id"))[left])
    rows.similarity[places[left]] = table.column("similarity").to_numpy()[left]


def _select(rows: _Rows, tables: Tables) -> None:
    """Gives every row that is left a part, or the reason why no part wants it."""
    kept = rows.code == KEPT
    as_is = rows.file.kind == AS_IS
    rows.part[kept] = "as_is" if as_is else ""
    if tables.retrieved and not as_is:
        table = read_table(tables.retrieved, rows.file.name)
        places = rows.places(table, "retrieved")
        wanted = kept[places]
        places, table = places[wanted], table.filter(pa.array(wanted))
        rows.part[places] = np.array(table.column("part").to_pylist(), object)
        rows.rule[places] = np.array(table.column("set").to_pylist(), object)
        rows.query[places] = _objects(ids_of(table.column("query_id")))
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


def _mix(rows: _Rows, mix: Mix) -> None:
    draw = draws(rows.ids, mix.seed)
    for part, share in mix.shares.items():
        out = np.flatnonzero((rows.part == part) & (rows.code == KEPT) & (draw >= share))
        rows.remove(out, "balanced_out")
        rows.rule[out] = f"mix.{part}"


def draws(ids: Bytes16, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A number in [0, 1) for each image, from its id and the seed alone."""
    words = np.ascontiguousarray(ids).view("<u8").reshape(-1, 2)
    mixed = _scrambled(words[:, 0] ^ _scrambled(words[:, 1] ^ np.uint64(seed)))
    return np.asarray((mixed >> np.uint64(11)) * 2.0**-53, np.float64)


def _scrambled(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The finalizer of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def starts_of(inputs: Inputs) -> Starts:
    """First row of each input file: all that a task must know of the other files."""
    return np.array([file.first for file in inputs.files], np.int64)


def _ids_at(keepers: Any, starts: Starts, fingerprint: str) -> Objects:
    """Image ids of rows that may be in any file."""
    found = np.full(len(keepers), None, object)
    holders = np.searchsorted(starts, keepers, "right") - 1  # of files that are empty, the last
    for holder in np.unique(holders):
        ids = ids_of(read_table(fingerprint, f"{holder:05d}", ["image_id"]).column("image_id"))
        mine = np.flatnonzero(holders == holder)
        found[mine] = _objects(ids[keepers[mine] - starts[holder]])
    return found


def _objects(ids: Bytes16) -> Objects:
    found = np.full(len(ids), None, object)
    found[:] = [value.tobytes() for value in ids]
    return found


def _table(rows: _Rows, sources: Objects) -> pa.Table:
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
            "similarity": number(rows.similarity, pa.float32()),
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
    found: dict[str, dict[str, int]] = {}
    for name, value in zip(names, values, strict=True):
        counts = found.setdefault(name, {})
        counts[value] = counts.get(value, 0) + 1
    return found
