"""Rows that go whatever is chosen: no usable image, copies, leaks; the first reason counts.

Every step before says something about some rows. Here the first one that removes a row is its
reason, in the order of `judged`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.rows.file_rows import KEPT, FileRows, Objects, Tables, objects
from pipeline.curate.rows.tables import (
    REASONS,
    ROW,
    InputFile,
    Inputs,
    ids_of,
    read_table,
    write_table,
)
from pipeline.curate.steps.steps import Account
from pipeline.errors import DataError

# rows that are left when copies and leaks are gone: what retrieval and balancing choose from. Each
# is its own keeper, so the table can stand for one of exact copies.
LEFT = pa.schema([("row", ROW), ("keeper", ROW)])
Starts = np.ndarray[Any, np.dtype[np.int64]]


def list_left(folder: str, file: InputFile, starts: Starts, tables: Tables) -> Account:
    """Task: writes the rows of a file that pass quality, are no copy and do not leak."""
    rows = judged(file, starts, tables)
    left = file.first + np.flatnonzero(rows.code == KEPT)
    table = pa.table([left, left], schema=LEFT)
    return {"rows": len(left), "bytes": write_table(table, folder, file.name)}


def judged(file: InputFile, starts: Starts, tables: Tables) -> FileRows:
    """The rows of a file, those that go with the first reason to remove them.

    Raises:
        DataError: the fingerprints are not of this file.
    """
    about = read_table(tables.fingerprint, file.name, ["image_id", "error"])
    rows = FileRows.of(file, ids_of(about.column("image_id")))
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


def _quality(rows: FileRows, tables: Tables, errors: list[str]) -> None:
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


def _equal(rows: FileRows, starts: Starts, tables: Tables) -> None:
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
            rows.keeper[places[these]] = objects(rows.ids[places[these]])
        elif len(these):
            rows.keeper[places[these]] = _ids_at(keeper[these], starts, tables.fingerprint)


def _leaking(rows: FileRows, tables: Tables) -> None:
    if tables.leaks:
        table = read_table(tables.leaks, rows.file.name)
        places = rows.places(table, "leaks")
        fresh = rows.remove(places, "leaks_evaluation")
        _matched(rows, places[fresh], table.filter(pa.array(fresh)))
    if not tables.leaking:
        return
    members = read_table(tables.components, rows.file.name, ["row", "component"])
    places = rows.places(members, "components")
    leaks = read_table(tables.leaking, "leaking")
    index = pc.index_in(members.column("component"), leaks.column("component"))
    hit = pc.is_valid(index).to_numpy(zero_copy_only=False)
    which = index.drop_null()
    fresh = rows.remove(places[hit], "leaks_evaluation")
    leaks = leaks.take(which.filter(pa.array(fresh)))
    places = places[hit][fresh]
    _matched(rows, places, leaks)
    rows.keeper[places] = objects(ids_of(leaks.column("row_id")))


def _matched(rows: FileRows, places: Any, table: pa.Table) -> None:
    rows.rule[places] = np.array(table.column("set").to_pylist(), object)
    rows.query[places] = objects(ids_of(table.column("query_id")))
    rows.similarity[places] = table.column("similarity").to_numpy()


def _earlier(rows: FileRows, tables: Tables) -> None:
    """Copies of images that an earlier curation kept; the latest curation first."""
    for folder in tables.matches:
        table = read_table(folder, rows.file.name)
        places = rows.places(table, "matches")
        fresh = rows.remove(places, "duplicate_near")
        places, table = places[fresh], table.filter(pa.array(fresh))
        rows.rule[places] = "earlier"
        rows.keeper[places] = objects(ids_of(table.column("image_id")))
        rows.similarity[places] = table.column("similarity").to_numpy()


def _near(rows: FileRows, tables: Tables) -> None:
    if not tables.components:
        return
    table = read_table(tables.components, rows.file.name)
    places = rows.places(table, "components")
    rows.component[places] = objects(ids_of(table.column("component")))
    away = table.column("keeper").to_numpy() != table.column("row").to_numpy()
    fresh = rows.remove(places[away], "duplicate_near")
    left = np.flatnonzero(away)[fresh]
    rows.rule[places[left]] = "near"
    rows.keeper[places[left]] = objects(ids_of(table.column("keeper_id"))[left])
    rows.similarity[places[left]] = table.column("similarity").to_numpy()[left]


def starts_of(inputs: Inputs) -> Starts:
    """First row of each input file: all that a task must know of the other files."""
    return np.array([file.first for file in inputs.files], np.int64)


def _ids_at(keepers: Any, starts: Starts, fingerprint: str) -> Objects:
    """Image ids of rows that may be in any file."""
    keeper_ids = np.full(len(keepers), None, object)
    holders = np.searchsorted(starts, keepers, "right") - 1  # of files that are empty, the last
    for holder in np.unique(holders):
        ids = ids_of(read_table(fingerprint, f"{holder:05d}", ["image_id"]).column("image_id"))
        mine = np.flatnonzero(holders == holder)
        keeper_ids[mine] = objects(ids[keepers[mine] - starts[holder]])
    return keeper_ids
