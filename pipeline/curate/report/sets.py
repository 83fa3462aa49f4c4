"""What the report says of other sets: evaluation images in the pile, and seeds' neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import (
    Ints,
    Samples,
    Shown,
    TableFiles,
    draws,
    ids,
    parquet_names,
    pictures_of,
    rows_in,
)
from pipeline.curate.rows.tables import ID

SHOWN = 8  # pairs of each kind
SEEDS = 8  # shown of a seed set
NEIGHBOURS = 8  # shown of a seed
BINS = 200  # of similarities from -1 to 1

Key = tuple[str, str]  # part and name of a seed set


@dataclass(frozen=True)
class Match:
    """A row and the image of the other set that it matches."""

    row: int
    query: bytes
    similarity: float


@dataclass(frozen=True)
class Leaks:
    """An evaluation set: what of it is in the pile.

    Attributes:
        name: of the set.
        images: in the set; 0 where it is not known.
        leaked: images of the set that have a copy in the pile.
        rows: rows of the pile whose best match is of this set.
        top: the most alike.
        low: the least alike that still match.
        counts: rows by similarity, 200 bars from -1 to 1.
        pictures: images of the set by id.
    """

    name: str
    images: int
    leaked: int
    rows: int
    top: tuple[Match, ...]
    low: tuple[Match, ...]
    counts: tuple[int, ...]
    pictures: Mapping[bytes, Shown] = field(repr=False)

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (match.row for match in (*self.top, *self.low))


@dataclass(frozen=True)
class Retrieved:
    """A seed set: what it asked for and got.

    Attributes:
        name: of the seed set.
        part: sample or cluster.
        images: seed images; 0 where that is not known.
        asked: neighbours of all seeds, each counted as often as it was asked for.
        rows: rows that they are.
        seeds: up to eight seed images, by the hash of their id, with rows that came for them.
        counts: rows by similarity, 200 bars from -1 to 1.
        clusters: that rows came from (cluster only).
        pictures: seed images by id.
    """

    name: str
    part: str
    images: int
    asked: int
    rows: int
    seeds: tuple[tuple[Match, ...], ...]
    counts: tuple[int, ...]
    clusters: int
    pictures: Mapping[bytes, Shown] = field(repr=False)

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (match.row for matches in self.seeds for match in matches)

    @property
    def collisions(self) -> int:
        """Requests for a row that another seed image had asked for already."""
        return self.asked - self.rows


def read_leaks(
    tables: TableFiles, sets: Mapping[str, str], leaked: Mapping[str, int]
) -> list[Leaks]:
    """One pass over the leaks.

    Args:
        tables: of the run.
        sets: folder of fingerprints of each evaluation set, or "" where there is none. Sets that
            nothing matches appear because they are named here.
        leaked: images of each set that have a match. The table cannot tell: it has the best match
            of each row, and a row can match several images, of several sets.
    """
    rows = Counter(dict.fromkeys(sets, 0))
    counts: dict[str, Ints] = {}
    alike, unlike = (Samples(SHOWN, ["set"], [key, "row"]) for key in ("falling", "similarity"))
    for _, table in tables.read("leaks", ["row", "set", "query_id", "similarity"]):
        for name in pc.unique(table["set"]).to_pylist():
            mine = table.filter(pc.equal(table["set"], name))
            rows[name] += len(mine)
            counts[name] = counts.get(name, _no_bars()) + _bars(mine)
        falling = table.append_column("falling", pc.negate(table["similarity"]))
        alike.add(falling)
        unlike.add(table)
    top, low = alike.groups(), unlike.groups()
    leaks = []
    for name in rows:
        assert not rows[name] or leaked.get(name), f"rows match {name}, but no image of it leaked"
        best = _matches(top.get(name, ()))
        worst = tuple(match for match in _matches(low.get(name, ())) if match not in best)
        folder = sets.get(name, "")
        leaks.append(
            Leaks(
                name=name,
                images=_images(folder),
                leaked=leaked.get(name, 0),
                rows=rows[name],
                top=best,
                low=worst,
                counts=tuple(map(int, counts.get(name, _no_bars()))),
                pictures=_pictures(folder, (*best, *worst)),
            )
        )
    return leaks


def read_retrieved(tables: TableFiles, sets: Mapping[str, str], seed: int) -> list[Retrieved]:
    """Two passes over what was retrieved: counts and seeds, then the rows of these seeds."""
    asked: Counter[Key] = Counter()
    rows: Counter[Key] = Counter()
    counts: dict[Key, Ints] = {}
    clusters: dict[Key, set[int]] = {}
    seeds = Samples(SEEDS, ["part", "set"], ["draw", "query_id"])
    for _, table in tables.read(
        "retrieved", ["part", "set", "query_id", "similarity", "hits", "cluster"]
    ):
        for key, mine in _by_set(table):
            asked[key] += pc.sum(mine["hits"]).as_py()
            rows[key] += len(mine)
            counts[key] = counts.get(key, _no_bars()) + _bars(mine)
            clusters.setdefault(key, set()).update(pc.unique(mine["cluster"]).to_pylist())
        queries = table.group_by(["part", "set", "query_id"]).aggregate([])
        drawn = pa.array(draws(ids(queries["query_id"]), seed))
        seeds.add(queries.append_column("draw", drawn))
    shown = seeds.groups()
    near = Samples(NEIGHBOURS, ["part", "set", "query_id"], ["falling", "row"])
    for _, table in tables.read("retrieved", ["row", "part", "set", "query_id", "similarity"]):
        for key, mine in _by_set(table):
            names = pa.array([one["query_id"] for one in shown[key]], ID)
            mine = mine.filter(pc.is_in(mine["query_id"], names))
            near.add(mine.append_column("falling", pc.negate(mine["similarity"])))
    neighbours = near.groups()
    retrieved = []
    for part, name in sorted(rows, key=lambda key: (key[1], key[0])):
        key, folder = (part, name), sets.get(name, "")
        matches = tuple(_matches(neighbours[(*key, one["query_id"])]) for one in shown[key])
        retrieved.append(
            Retrieved(
                name=name,
                part=part,
                images=_images(folder),
                asked=asked[key],
                rows=rows[key],
                seeds=matches,
                counts=tuple(map(int, counts[key])),
                clusters=len(clusters[key] - {-1}),
                pictures=_pictures(folder, (match for of in matches for match in of)),
            )
        )
    unknown = sorted(set(sets) - {name for _, name in rows}, key=list(sets).index)
    none = tuple(map(int, _no_bars()))
    return retrieved + [
        Retrieved(name, "", _images(sets[name]), 0, 0, (), none, 0, {}) for name in unknown
    ]


def _by_set(table: pa.Table) -> list[tuple[Key, pa.Table]]:
    """The rows of each part and set that is in a table."""
    tables = []
    for one in table.group_by(["part", "set"]).aggregate([]).to_pylist():
        part, name = one["part"], one["set"]
        same = pc.and_(pc.equal(table["part"], part), pc.equal(table["set"], name))
        tables.append(((part, name), table.filter(same)))
    return tables


def _bars(table: pa.Table) -> Ints:
    return np.histogram(np.clip(table["similarity"].to_numpy(), -1, 1), BINS, (-1, 1))[0]


def _no_bars() -> Ints:
    return np.zeros(BINS, np.int64)


def _matches(rows: Iterable[Mapping[str, Any]]) -> tuple[Match, ...]:
    return tuple(Match(one["row"], one["query_id"], one["similarity"]) for one in rows)


def _images(folder: str) -> int:
    return rows_in(folder, parquet_names(folder)) if folder else 0


def _pictures(folder: str, matches: Iterable[Match]) -> dict[bytes, Shown]:
    return pictures_of(folder, [match.query for match in matches]) if folder else {}
