"""The first few rows of every group, chosen over all files; only narrow tables move.

Three steps. Each task keeps, of its rows, the first `quota` of every group by (key, image id, row).
Tasks over ranges of groups find the last row of each group that is still among the first `quota` of
all: the limit. What is not after its group's limit is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.choose.lloyd import Cost
from pipeline.curate.rows.draws_by_id import firsts, not_after
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import ID, ROW, id_array, ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Task, run_step
from pipeline.storage.run_folder import fingerprint
from pipeline.uri import Place, join

Array = np.ndarray[Any, Any]

RANGE_ROWS = 4_000_000  # that one task orders
GROUP_ROWS = 1_000_000  # of one task that names its first rows, at least
ENTRIES = pa.schema([("group", pa.int64()), ("key", pa.float64()), ("image_id", ID), ("row", ROW)])


@dataclass
class Entries:
    """Rows as they ask to be chosen: group [n], key [n], ids [n, 16], rows [n]."""

    groups: Array
    keys: Array
    ids: Array
    rows: Array

    def table(self) -> pa.Table:
        """As it is written."""
        columns = [self.groups, self.keys, id_array(self.ids), self.rows]
        return pa.table(columns, schema=ENTRIES)

    @classmethod
    def read(cls, table: pa.Table) -> Entries:
        """Back from a table."""
        return cls(
            np.asarray(table["group"].to_numpy(), np.int64),
            np.asarray(table["key"].to_numpy(), np.float64),
            ids_of(table["image_id"]),
            np.asarray(table["row"].to_numpy(), np.int64),
        )

    def take(self, at: Array) -> Entries:
        """Some of them."""
        return Entries(self.groups[at], self.keys[at], self.ids[at], self.rows[at])

    def first(self, quota: Array) -> Entries:
        """The first `quota[group]` of each group, in order."""
        return self.take(firsts(self.groups, self.keys, self.ids, self.rows, quota))

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """Several together."""
        if not parts:
            nothing = np.zeros(0, np.int64)
            return cls(nothing, np.zeros(0), np.zeros((0, 16), np.uint8), nothing)
        return cls(
            np.concatenate([p.groups for p in parts]),
            np.concatenate([p.keys for p in parts]),
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.rows for p in parts]),
        )


Reader = Callable[[str], Entries]  # file name -> the entries of an input file; pickled


@dataclass(frozen=True)
class Limits:
    """Where the last chosen row of each group is written.

    Attributes:
        folder: of the limits.
        names: of its files.
        groups: how many there are.
        key: of the step.
    """

    folder: str
    names: tuple[str, ...]
    groups: int
    key: str

    def load(self) -> ChosenUpTo:
        """The limits of all groups."""
        parts = [Entries.read(read_table(self.folder, name)) for name in self.names]
        limits = Entries.joined(parts)
        place = np.full(self.groups, -1, np.int64)
        place[limits.groups] = np.arange(len(limits.groups))
        return ChosenUpTo(limits, place)


@dataclass
class ChosenUpTo:
    """Limits in memory."""

    limits: Entries
    place: Array  # of each group among the limits, -1 where nothing is chosen

    def chosen(self, entries: Entries) -> Array:
        """Which entries are chosen, bool [n]."""
        at = self.place[entries.groups]
        chosen = at >= 0
        entry, limit = entries.take(chosen), self.limits.take(at[chosen])
        chosen[chosen] = not_after(
            entry.keys, entry.ids, entry.rows, limit.keys, limit.ids, limit.rows
        )
        return chosen


def limits(
    root: Place,
    name: str,
    rows: RowSet,
    quota: Array,
    reader: Reader,
    key: Any,
    cost: Cost,
) -> Limits:
    """Finds the last row that is chosen of each group.

    Args:
        root: folder of the curation.
        name: of the step.
        rows: whose files are read.
        quota: rows to choose of each group, int64 [groups].
        reader: gives the entries of a file.
        key: of what the reader reads.
        cost: is added to.
    """
    quota = np.asarray(quota, np.int64)
    key = [key, fingerprint(quota.tolist())]
    place = str(join(root, *name.split("/"), f"quota-{fingerprint(key)}"))
    write_table(pa.table({"quota": quota}), place, "quota")
    groups = rows.groups(GROUP_ROWS)
    names = [f"{i:05d}" for i in range(len(groups))]
    tasks = [
        Task(own, (own, group, place, reader)) for own, group in zip(names, groups, strict=True)
    ]
    named = run_step(root, f"{name}/named", key, tasks, _name_task)
    cost.add(named)
    bounds = _ranges(quota, len(groups))
    tasks = [
        Task(f"{i:05d}", (f"{i:05d}", named.folder, names, place, low, high))
        for i, (low, high) in enumerate(bounds)
    ]
    last = run_step(root, f"{name}/limits", key, tasks, _limit_task)
    cost.add(last)
    return Limits(last.folder, tuple(task.name for task in tasks), len(quota), last.key)


def _ranges(quota: Array, parts: int) -> list[tuple[int, int]]:
    """Ranges of groups, of about as many entries as a task can order."""
    if not len(quota):
        return []
    upto = np.cumsum(quota * parts) // RANGE_ROWS
    starts = np.flatnonzero(np.r_[True, upto[1:] != upto[:-1]])
    ends = np.r_[starts[1:], len(quota)]
    return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def read_quota(place: str) -> Array:
    """Rows to choose of each group."""
    return np.asarray(read_table(place, "quota")["quota"].to_numpy(), np.int64)


def _name_task(
    folder: str,
    name: str,
    files: tuple[str, ...],
    place: str,
    reader: Reader,
) -> Account:
    quota = read_quota(place)
    first = Entries.joined([])
    rows = 0
    for file in files:
        entries = reader(file)
        rows += len(entries.rows)
        asking = entries.take(quota[entries.groups] > 0)
        first = Entries.joined([first, asking]).first(quota)
    return {"rows": rows, "bytes": write_table(first.table(), folder, name)}


def _limit_task(
    folder: str, name: str, parts: str, names: list[str], place: str, low: int, high: int
) -> Account:
    quota = read_quota(place)
    first = Entries.joined([])
    within = [("group", ">=", low), ("group", "<", high)]
    for part in names:
        entries = Entries.read(read_table(parts, part, filters=within))
        first = Entries.joined([first, entries]).first(quota)
    last = np.flatnonzero(np.r_[first.groups[1:] != first.groups[:-1], True][: len(first.groups)])
    written = write_table(first.take(last).table(), folder, name)
    return {"rows": len(first.rows), "bytes": written}
