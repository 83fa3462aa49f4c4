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

from pipeline.curate.rows.first_of_each import firsts, not_after
from pipeline.curate.rows.read_rows import RowSet
from pipeline.curate.rows.tables import ID, ROW, id_array, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps, by_number

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

    @classmethod
    def of(cls, assigned: pa.Table, keys: Array) -> Entries:
        """Rows with their clusters (`lloyd_tasks.ASSIGNED`), and a key for each."""
        return cls(
            np.asarray(assigned["leaf"].to_numpy(), np.int64),
            keys,
            ids_of(assigned["image_id"]),
            np.asarray(assigned["row"].to_numpy(), np.int64),
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
        step: whose tables they are.
        groups: how many there are.
    """

    step: Step
    groups: int

    @property
    def key(self) -> str:
        """Of the step."""
        return self.step.key

    def load(self) -> ChosenUpTo:
        """The limits of all groups."""
        limits = Entries.joined([Entries.read(self.step.read(name)) for name in self.step.tables])
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


def limits(steps: Steps, rows: RowSet, quota: Array, reader: Reader) -> Limits:
    """Finds the last row that is chosen of each group.

    Args:
        steps: whose folder is the choice's own.
        rows: whose files are read.
        quota: rows to choose of each group, int64 [groups].
        reader: gives the entries of a file: a `partial` that is given the steps that it reads.
    """
    quota = np.asarray(quota, np.int64)
    parts = by_number(rows.groups(GROUP_ROWS))
    named = steps.run("named", _name_task, parts, quota=quota, reader=reader)
    ranges = by_number(_ranges(quota, len(parts)))
    last = steps.run("limits", _limit_task, ranges, quota=quota, named=named)
    return Limits(last, len(quota))


def _ranges(quota: Array, parts: int) -> list[tuple[int, int]]:
    """Ranges of groups, of about as many entries as a task can order."""
    if not len(quota):
        return []
    upto = np.cumsum(quota * parts) // RANGE_ROWS
    starts = np.flatnonzero(np.r_[True, upto[1:] != upto[:-1]])
    ends = np.r_[starts[1:], len(quota)]
    return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def _name_task(out: Output, files: Sequence[str], quota: Array, reader: Reader) -> Account:
    """The first rows of each group in some files."""
    first, count = Entries.joined([]), 0
    for file in files:
        entries = reader(file)
        count += len(entries.rows)
        asking = entries.take(quota[entries.groups] > 0)
        first = Entries.joined([first, asking]).first(quota)
    out.table(first.table())
    return {"rows": count}


def _limit_task(out: Output, groups: tuple[int, int], quota: Array, named: Step) -> Account:
    """The last of the first rows of each group in a range of groups."""
    first = Entries.joined([])
    within = [("group", ">=", groups[0]), ("group", "<", groups[1])]
    for part in named.tables:
        entries = Entries.read(named.read(part, filters=within))
        first = Entries.joined([first, entries]).first(quota)
    last = np.flatnonzero(np.r_[first.groups[1:] != first.groups[:-1], True][: len(first.groups)])
    out.table(first.take(last).table())
    return {"rows": len(first.rows)}
