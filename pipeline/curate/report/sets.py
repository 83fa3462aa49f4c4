"""What the report says of other sets: evaluation images in the pile, and seeds' neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import (
    Shown,
    Smallest,
    TableFiles,
    draws,
    ids,
    parquet_names,
    pictures_of,
)
from pipeline.curate.rows.tables import read_table

SHOWN = 8  # pairs of each kind
SEEDS = 8  # shown of a seed set
NEIGHBOURS = 8  # shown of a seed
BINS = 200  # of similarities from -1 to 1


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
    top: dict[str, Smallest] = {}
    low: dict[str, Smallest] = {}
    counts: dict[str, np.ndarray[Any, Any]] = {}
    rows = dict.fromkeys(sets, 0)
    for _, table in tables.read("leaks", ["row", "set", "query_id", "similarity"]):
        for name in pc.unique(table["set"]).to_pylist():
            mine = table.filter(pc.equal(table["set"], name))
            queries, values = ids(mine["query_id"]), _values(mine)
            rows[name] = rows.get(name, 0) + len(mine)
            counts[name] = counts.get(name, 0) + _bars(values)
            item = partial(_match, mine["row"].to_numpy(), queries, values)
            top.setdefault(name, Smallest(SHOWN)).offer(-values, item)
            low.setdefault(name, Smallest(SHOWN)).offer(values, item)
    leaks = []
    for name in rows:
        assert not rows[name] or leaked.get(name), f"rows match {name}, but no image of it leaked"
        best = _matches(top.get(name))
        seen = {match.row for match in best}
        worst = tuple(match for match in _matches(low.get(name)) if match.row not in seen)
        leaks.append(
            Leaks(
                name=name,
                images=_images(sets.get(name, "")),
                leaked=leaked.get(name, 0),
                rows=rows[name],
                top=best,
                low=worst,
                counts=tuple(map(int, counts.get(name, np.zeros(BINS)))),
                pictures=_pictures(sets.get(name, ""), (*best, *worst)),
            )
        )
    return leaks


def read_retrieved(tables: TableFiles, sets: Mapping[str, str], seed: int) -> list[Retrieved]:
    """Two passes over what was retrieved: counts and seeds, then the rows of these seeds."""
    asked: dict[tuple[str, str], int] = {}
    rows: dict[tuple[str, str], int] = {}
    counts: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    clusters: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    chosen: dict[tuple[str, str], _Seeds] = {}
    columns = ["row", "part", "set", "query_id", "similarity", "hits", "cluster"]
    for _, table in tables.read("retrieved", columns):
        for key, mine in _by_set(table):
            asked[key] = asked.get(key, 0) + int(pc.sum(mine["hits"]).as_py())
            rows[key] = rows.get(key, 0) + len(mine)
            counts[key] = counts.get(key, 0) + _bars(_values(mine))
            of = np.unique(mine["cluster"].to_numpy())
            clusters[key] = np.union1d(clusters.get(key, of), of)
            queries = np.unique(ids(mine["query_id"]), axis=0)
            chosen.setdefault(key, _Seeds()).offer(draws(queries, seed), queries)
    neighbours: dict[tuple[str, str, bytes], Smallest] = {}
    for _, table in tables.read("retrieved", ["row", "part", "set", "query_id", "similarity"]):
        for key, mine in _by_set(table):
            names = pa.array(chosen[key].names(), pa.binary(16))
            mine = mine.filter(pc.is_in(mine["query_id"], names))
            for one in mine.to_pylist():
                kept = neighbours.setdefault((*key, one["query_id"]), Smallest(NEIGHBOURS))
                match = (one["row"], one["query_id"], one["similarity"])
                kept.offer(np.array([-match[2]]), lambda _, match=match: match)  # type: ignore[misc]
    found_sets = []
    for key in sorted(rows, key=lambda key: (key[1], key[0])):
        seeds = tuple(_matches(neighbours[(*key, name)]) for name in chosen[key].names())
        folder = sets.get(key[1], "")
        found_sets.append(
            Retrieved(
                name=key[1],
                part=key[0],
                images=_images(folder),
                asked=asked[key],
                rows=rows[key],
                seeds=seeds,
                counts=tuple(map(int, counts[key])),
                clusters=int((clusters[key] >= 0).sum()),
                pictures=_pictures(folder, tuple(match for matches in seeds for match in matches)),
            )
        )
    known = {one.name for one in found_sets}
    for name in sets:
        if name not in known:
            none = (0,) * BINS
            found_sets.append(Retrieved(name, "", _images(sets[name]), 0, 0, (), none, 0, {}))
    return found_sets


class _Seeds:
    """The seed images with the smallest draw, each once."""

    def __init__(self) -> None:
        self._kept: dict[bytes, float] = {}

    def offer(self, drawn: np.ndarray[Any, Any], queries: np.ndarray[Any, Any]) -> None:
        for place in np.argsort(drawn, kind="stable")[:SEEDS]:
            self._kept[queries[place].tobytes()] = float(drawn[place])
        self._kept = dict(sorted(self._kept.items(), key=lambda kv: kv[1])[:SEEDS])

    def names(self) -> list[bytes]:
        return list(self._kept)


def _by_set(table: pa.Table) -> list[tuple[tuple[str, str], pa.Table]]:
    pairs = table.group_by(["part", "set"]).aggregate([]).to_pylist()
    tables = []
    for pair in pairs:
        same = pc.and_(pc.equal(table["part"], pair["part"]), pc.equal(table["set"], pair["set"]))
        tables.append(((pair["part"], pair["set"]), table.filter(same)))
    return tables


def _values(table: pa.Table) -> np.ndarray[Any, np.dtype[np.float64]]:
    similarities: np.ndarray[Any, np.dtype[np.float64]] = table["similarity"].to_numpy()
    return similarities


def _bars(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.histogram(np.clip(values, -1, 1), BINS, (-1, 1))[0]


def _match(
    rows: np.ndarray[Any, Any], queries: np.ndarray[Any, Any], values: np.ndarray[Any, Any], at: int
) -> tuple[int, bytes, float]:
    return int(rows[at]), queries[at].tobytes(), float(values[at])


def _matches(kept: Smallest | None) -> tuple[Match, ...]:
    return tuple(Match(*item) for item in kept.items()) if kept else ()


def _images(folder: str) -> int:
    if not folder:
        return 0
    return sum(read_table(folder, name, ["row"]).num_rows for name in parquet_names(folder))


def _pictures(folder: str, matches: tuple[Match, ...]) -> dict[bytes, Shown]:
    return pictures_of(folder, [match.query for match in matches]) if folder else {}
