"""What the report says of balancing: cluster sizes before and after, and how many count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.choose.balance import effective
from pipeline.curate.report.read import Ints, Samples, TableFiles, draws, ids
from pipeline.curate.rows.tables import read_table

SHEETS = 8  # clusters shown, spread over the ranks
MEMBERS = 10  # shown of each


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

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (row for sheet in self.sheets for row, _ in sheet.rows)


def read_clusters(tables: TableFiles, seed: int) -> Clusters:
    """Two passes: counts (a row a leaf in memory), then rows of the clusters that are shown."""
    leaves = pa.table({"leaf": pa.array([], pa.int64()), "top": [], "images": [], "chosen": []})
    leaves = leaves.cast(pa.schema([(name, pa.int64()) for name in leaves.column_names]))
    for _, table in tables.read("balanced", ["leaf", "top", "chosen"]):
        each = table.group_by(["leaf", "top"]).aggregate([([], "count_all"), ("chosen", "sum")])
        each = each.rename_columns(leaves.column_names).cast(leaves.schema)
        leaves = _sums(pa.concat_tables([leaves, each]), ["leaf", "top"])
    tops = _sums(leaves, ["top"]).sort_by([("images", "descending"), ("top", "ascending")])
    top, before, after = (tops[name].to_pylist() for name in ("top", "images", "chosen"))
    # From the largest cluster to the smallest in even steps, so that rare things are seen too.
    ranks = np.linspace(0, max(0, len(top) - 1), SHEETS).round().astype(int).tolist()
    shown = [rank for rank in dict.fromkeys(ranks) if rank < len(top)]
    rows = _sample(tables, [top[rank] for rank in shown], seed)
    return Clusters(
        considered=sum(before),
        chosen=sum(after),
        leaves=_level("leaf", leaves),
        tops=_level("top", tops),
        sheets=tuple(
            Sheet(top[rank], before[rank], after[rank], rows.get(top[rank], ())) for rank in shown
        ),
    )


def ranked(sizes: Ints, most: int = 150) -> list[tuple[float, float]]:
    """(rank, size) from 1, at most so many, evenly on a log scale."""
    if not len(sizes):
        return []
    ranks = np.unique(np.geomspace(1, len(sizes), most).round().astype(np.int64))
    return [(float(rank), float(sizes[rank - 1])) for rank in ranks]


def _sums(table: pa.Table, by: list[str]) -> pa.Table:
    """Images and chosen images of each group."""
    sums = table.group_by(by).aggregate([("images", "sum"), ("chosen", "sum")])
    return sums.rename_columns([*by, "images", "chosen"])


def _level(name: str, clusters: pa.Table) -> Level:
    before, after = (np.sort(clusters[column].to_numpy())[::-1] for column in ("images", "chosen"))
    return Level(name, before, after[after > 0], int((after == 0).sum()))


def _sample(
    tables: TableFiles, tops: list[int], seed: int
) -> dict[int, tuple[tuple[int, bool], ...]]:
    """Rows of each cluster by chance, chosen ones first; a row without decision comes last."""
    sample = Samples(MEMBERS, ["top"], ["draw", "row", "chosen"])
    for file, table in tables.read("balanced", ["row", "top", "chosen"]):
        table = table.filter(pc.is_in(table["top"], pa.array(tops, pa.int64())))
        if len(table):
            named = read_table(tables.folders["decisions"], file, ["row", "image_id"])
            places = pc.index_in(table["row"], named["row"])
            drawn = pa.array(draws(ids(named["image_id"]), seed)).take(places)
            sample.add(table.append_column("draw", pc.fill_null(drawn, 1.0)))
    return {
        top: tuple(sorted(((r["row"], r["chosen"]) for r in rows), key=lambda one: not one[1]))
        for top, rows in sample.groups().items()
    }
