"""What the report says of balancing: cluster sizes before and after, and how many count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.curate.report.read import Smallest, TableFiles, draws, hex_ids
from pipeline.curate.rows.tables import read_table

SHEETS = 8  # clusters shown, spread over the ranks
MEMBERS = 10  # shown of each

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Level:
    """Clusters of a level: their sizes, largest first, before and after sampling.

    Attributes:
        name: of the level, in plain words.
        before: images of each cluster that has any, [K], falling.
        after: chosen images of them, falling (another order than before's).
        unsampled: clusters with images, none of which was chosen.
    """

    name: str
    before: Ints
    after: Ints
    unsampled: int

    @property
    def clusters(self) -> int:
        """With images in them."""
        return len(self.before)

    @property
    def effective_before(self) -> float:
        """Clusters of equal size that would be as diverse: exp of the entropy of the shares."""
        return effective(self.before)

    @property
    def effective_after(self) -> float:
        """The same of the chosen images."""
        return effective(self.after)


@dataclass(frozen=True)
class Sheet:
    """A cluster of the top level: its sizes, and a few rows of it with whether they were chosen."""

    cluster: int
    before: int
    after: int
    rows: tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Clusters:
    """The finest level and the coarsest, and a few clusters of the latter."""

    considered: int
    chosen: int
    leaves: Level
    tops: Level
    sheets: tuple[Sheet, ...]


def effective(sizes: Ints) -> float:
    """The exponential of the entropy of the shares; 0 of nothing (Hill number of order 1)."""
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return 0.0
    shares = sizes / sizes.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def read_clusters(tables: TableFiles, seed: int) -> Clusters:
    """Two passes: counts (two numbers a cluster in memory), then rows of the clusters shown."""
    before: dict[str, Ints] = {"leaf": np.zeros(0, np.int64), "top": np.zeros(0, np.int64)}
    after = dict(before)
    for _, table in tables.read("balanced", ["leaf", "top", "chosen"]):
        chosen = table["chosen"].to_numpy()
        for name in before:
            numbers = table[name].to_numpy()
            before[name] = _added(before[name], numbers)
            after[name] = _added(after[name], numbers[chosen])
    levels = {
        name: Level(
            name,
            np.sort(before[name][before[name] > 0])[::-1],
            np.sort(after[name][after[name] > 0])[::-1],
            int(((before[name] > 0) & (_same(after[name], before[name]) == 0)).sum()),
        )
        for name in before
    }
    tops, chosen_tops = before["top"], _same(after["top"], before["top"])
    return Clusters(
        considered=int(before["leaf"].sum()),
        chosen=int(after["leaf"].sum()),
        leaves=levels["leaf"],
        tops=levels["top"],
        sheets=tuple(
            Sheet(number, int(tops[number]), int(chosen_tops[number]), rows)
            for number, rows in _sheets(tables, tops, seed).items()
        ),
    )


def ranked(sizes: Ints, most: int = 150) -> list[tuple[float, float]]:
    """(rank, size) from 1, at most so many, evenly on a log scale."""
    if not len(sizes):
        return []
    ranks = np.unique(np.geomspace(1, len(sizes), most).round().astype(np.int64))
    return [(float(rank), float(sizes[rank - 1])) for rank in ranks]


def _added(counts: Ints, numbers: np.ndarray[Any, Any]) -> Ints:
    if not len(numbers):
        return counts
    more = np.bincount(numbers)
    wide: Ints = np.zeros(max(len(more), len(counts)), np.int64)
    wide[: len(counts)] += counts
    wide[: len(more)] += more
    return wide


def _same(counts: Ints, like: Ints) -> Ints:
    """Counts, as long as others."""
    return np.concatenate([counts, np.zeros(len(like) - len(counts), np.int64)])


def _sheets(
    tables: TableFiles, sizes: Ints, seed: int
) -> Mapping[int, tuple[tuple[int, bool], ...]]:
    """Rows of clusters from the largest to the smallest, random by image id."""
    order = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    spread = np.linspace(0, max(0, len(order) - 1), SHEETS).round().astype(int)
    shown = [int(order[place]) for place in dict.fromkeys(spread.tolist())] if len(order) else []
    kept = {number: Smallest(MEMBERS) for number in shown}
    for file, table in tables.read("balanced", ["row", "top", "chosen"]):
        tops, rows = table["top"].to_numpy(), table["row"].to_numpy()
        mine = np.flatnonzero(np.isin(tops, shown))
        if not len(mine):
            continue
        drawn = _draws_of(tables, file, rows[mine], seed)
        chosen = table["chosen"].to_numpy()
        for number in shown:
            members = np.flatnonzero(tops[mine] == number)
            kept[number].offer(drawn[members], partial(_item, rows, chosen, mine[members]))
    return {
        number: tuple(sorted(items.items(), key=lambda item: not item[1]))
        for number, items in kept.items()
    }


def _draws_of(tables: TableFiles, file: str, rows: Ints, seed: int) -> np.ndarray[Any, Any]:
    """Draws of rows of one file, by their image ids; 1 where a row has no decision."""
    table = read_table(tables.folders["decisions"], file, ["row", "image_id"])
    known = dict(
        zip(table["row"].to_pylist(), draws(hex_ids(table["image_id"]), seed).tolist(), strict=True)
    )
    return np.array([known.get(row, 1.0) for row in rows.tolist()])


def _item(
    rows: np.ndarray[Any, Any], chosen: np.ndarray[Any, Any], places: Ints, at: int
) -> tuple[int, bool]:
    return int(rows[places[at]]), bool(chosen[places[at]])
