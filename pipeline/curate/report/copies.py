"""What the report says of copies: pairs by similarity, components by size, examples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import Samples, TableFiles, draws, ids, value_draws
from pipeline.curate.rows.tables import ID

BIN = 0.01  # width of a bar of similarities
NEAR, FAR = 0.02, 0.05  # from the threshold: ends of the bands
PAIRS = 6  # shown of each band
COMPONENTS = 6  # shown of each kind
MEMBERS = 9  # shown of a component, beside its keepers
UNLIKE = 3  # of them, the least like their keeper: there a mistake would show
KEEPERS = 5  # shown of a component that is split
NOBODY = "0" * 32  # id of a row that has no decision, which the balance tells of
APART = 12  # pairs shown that a second look told apart


@dataclass(frozen=True)
class Pair:
    """Two rows and how alike they are."""

    a: int
    b: int
    similarity: float


@dataclass(frozen=True)
class Band:
    """Pairs whose similarity is above low, at most high."""

    low: float
    high: float
    count: int
    pairs: tuple[Pair, ...]
    copies: bool


@dataclass(frozen=True)
class Edges:
    """Pairs above the lowest threshold that were compared: a maximum spanning forest of them."""

    count: int
    above: int  # the threshold
    bins: tuple[float, ...]  # edges of the bars
    counts: tuple[int, ...]
    bands: tuple[Band, ...]

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (row for band in self.bands for pair in band.pairs for row in (pair.a, pair.b))


@dataclass(frozen=True)
class Member:
    """A row of a component; its similarity is that to `of`, the keeper (itself, where it is)."""

    row: int
    of: int
    similarity: float
    chained: bool

    @property
    def keeper(self) -> bool:
        """Whether it stays."""
        return self.row == self.of


@dataclass(frozen=True)
class Component:
    """Images that are copies of one another; `members` are a few of them.

    Members of a keeper follow it, the most alike first; the first keeper is not chained.
    """

    name: str
    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Components:
    """Groups of copies.

    Attributes:
        count: of two images and more.
        rows: images in them.
        sizes: components of each size.
        largest: a few, largest first.
        random: a few by the hash of their name.
        chains: a few that hold an image too unlike their first keeper.
        chained: images that are.
    """

    count: int
    rows: int
    sizes: Mapping[int, int]
    largest: tuple[Component, ...]
    random: tuple[Component, ...]
    chains: tuple[Component, ...]
    chained: int

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        groups = (*self.largest, *self.random, *self.chains)
        return (member.row for group in groups for member in group.members)

    @property
    def largest_size(self) -> int:
        """Images in the largest; 0 where there is none."""
        return max(self.sizes, default=0)


@dataclass(frozen=True)
class Apart:
    """Two rows that look alike and differ; `place` says where, in the second of them."""

    a: int
    b: int
    similarity: float
    reason: str
    place: tuple[float, float]

    @property
    def text(self) -> str:
        """What is below the two images."""
        if self.reason == "undecided":
            return f"{self.similarity:.3f}: undecided, so both stay"
        across, down = (round(100 * share) for share in self.place)
        what = "in colour " if self.reason == "colour" else ""
        return f"{self.similarity:.3f}: differ {what}at {across} % across, {down} % down"


@dataclass(frozen=True)
class Looks:
    """Pairs above the threshold that got a second look, and those of them that are no copies."""

    pairs: int
    same: int
    undecided: int
    apart: tuple[Apart, ...]

    @property
    def shown(self) -> Iterator[int]:
        """Rows that are shown."""
        return (row for one in self.apart for row in (one.a, one.b))


def read_edges(tables: TableFiles, threshold: float, seed: int) -> Edges:
    """One pass over the pairs.

    A pair is a copy where it is above the threshold. So bars and bands hold their upper end, and
    the threshold is an end of both.
    """
    ends = [threshold + away for away in (-FAR, -NEAR, 0, NEAR, FAR)]
    ends = [-1.0, *(end for end in ends if end < 1), 1.01]
    below, over = int(np.ceil((threshold + 1) / BIN)), int(np.ceil((1.001 - threshold) / BIN))
    bins = np.round(threshold + BIN * np.arange(-below, over + 1), 12)
    counts, inside = np.zeros(len(bins) - 1, np.int64), np.zeros(len(ends) - 1, np.int64)
    sample = Samples(PAIRS, ["band"], ["draw", "a", "b", "similarity"])
    for _, table in tables.read("edges", ["a", "b", "similarity"]):
        values = table["similarity"].to_numpy().astype(np.float64)
        bars = np.searchsorted(bins, np.clip(values, bins[0] + 1e-9, 1.0), side="left") - 1
        counts += np.bincount(np.clip(bars, 0, len(counts) - 1), minlength=len(counts))
        bands = np.clip(np.searchsorted(ends, values, side="left") - 1, 0, len(inside) - 1)
        inside += np.bincount(bands, minlength=len(inside))
        table = table.append_column("band", pa.array(bands))
        sample.add(table.append_column("draw", pa.array(value_draws(values, seed))))
    used = np.flatnonzero(counts)
    first, last = min([below, *used]), max([below, *(used + 1)])
    shown = tuple(
        Band(
            low=ends[band],
            high=ends[band + 1],
            count=int(inside[band]),
            pairs=tuple(Pair(one["a"], one["b"], one["similarity"]) for one in rows),
            copies=ends[band] >= threshold,
        )
        for band, rows in sample.groups().items()
    )
    return Edges(
        count=int(counts.sum()),
        above=sum(band.count for band in shown if band.copies),
        bins=tuple(map(float, bins[first : last + 1])),
        counts=tuple(map(int, counts[first:last])),
        bands=shown,
    )


def read_components(tables: TableFiles, seed: int) -> Components:
    """Two passes: sizes and names first, then members of those that are shown."""
    rows_of: Counter[int] = Counter()  # by size of their component
    chained = 0
    largest = Samples(COMPONENTS, [], ["falling", "component"])
    random, chains = (Samples(COMPONENTS, [], ["draw", "component"]) for _ in range(2))
    for _, table in tables.read("components", ["component", "size", "chained"]):
        each = table.group_by(["component", "size"]).aggregate(
            [([], "count_all"), ("chained", "any"), ("chained", "sum")]
        )
        for one in each.group_by("size").aggregate([("count_all", "sum")]).to_pylist():
            rows_of[one["size"]] += one["count_all_sum"]
        chained += pc.sum(each["chained_sum"]).as_py() or 0
        each = each.append_column("draw", pa.array(draws(ids(each["component"]), seed)))
        each = each.append_column("falling", pc.negate(each["size"]))
        named = each.select(["component", "size", "draw", "falling"])
        largest.add(named)
        random.add(named)
        chains.add(named.filter(each["chained_any"]))
    shown = {one["component"] for kept in (largest, random, chains) for one in kept.rows()}
    members = _members(tables, shown, seed)

    def components(kept: Samples) -> tuple[Component, ...]:
        return tuple(
            Component(one["component"].hex(), one["size"], members[one["component"]])
            for one in kept.rows()
        )

    # A component of size s has s rows in the table.
    sizes = {size: round(rows / size) for size, rows in sorted(rows_of.items())}
    return Components(
        count=sum(sizes.values()),
        rows=sum(rows_of.values()),
        sizes=sizes,
        largest=components(largest),
        random=components(random),
        chains=components(chains),
        chained=chained,
    )


def _members(tables: TableFiles, shown: set[bytes], seed: int) -> dict[bytes, tuple[Member, ...]]:
    """Of each component a few keepers, members that are least like theirs, and others by chance."""
    columns = ["row", "keeper", "similarity", "chained"]
    keepers = Samples(KEEPERS, ["component"], ["draw", "row"])
    by_chance = Samples(MEMBERS, ["component"], ["draw", "row"])
    unlike = Samples(UNLIKE, ["component"], ["similarity", "row"])
    for _, table in tables.read("components", ["component", *columns]):
        table = table.filter(pc.is_in(table["component"], pa.array(sorted(shown), ID)))
        named = tables.column_of("decisions", table["row"].to_pylist(), "image_id")
        hexes = pa.chunked_array([[named.get(row, NOBODY) for row in table["row"].to_pylist()]])
        hexes = hexes.cast(pa.string())
        table = table.append_column("draw", pa.array(draws(ids(hexes), seed)))
        stays = pc.equal(table["row"], table["keeper"])
        keepers.add(table.filter(stays))
        by_chance.add(table.filter(pc.invert(stays)))
        unlike.add(table.filter(pc.invert(stays)))
    samples = [sample.groups() for sample in (keepers, unlike, by_chance)]
    members = {}
    for name in shown:
        kept, least, others = (groups.get(name, []) for groups in samples)
        kept = sorted(kept, key=lambda one: (one["chained"], one["row"]))
        place = {one["row"]: k for k, one in enumerate(kept)}
        different = {one["row"]: one for one in [*least, *others]}
        beside = [one for one in list(different.values())[:MEMBERS] if one["keeper"] in place]
        order = sorted(
            [*kept, *beside],
            key=lambda m: (place[m["keeper"]], m["row"] != m["keeper"], -m["similarity"]),
        )
        members[name] = tuple(Member(*(one[column] for column in columns)) for one in order)
    return members


def read_looks(tables: TableFiles, seed: int) -> Looks:
    """One pass over the verdicts."""
    pairs = same = undecided = 0
    columns = ["row", "other", "similarity", "reason", "x", "y"]
    sample = Samples(APART, [], ["draw", *columns])
    for _, table in tables.read("looks", ["same", *columns]):
        pairs += len(table)
        same += pc.sum(table["same"]).as_py() or 0
        undecided += pc.sum(pc.equal(table["reason"], "undecided")).as_py() or 0
        apart = table.filter(pc.invert(table["same"]))
        drawn = value_draws(apart["similarity"].to_numpy(), seed)
        sample.add(apart.append_column("draw", pa.array(drawn)))
    rows = [[one[column] for column in columns] for one in sample.rows()]
    shown = tuple(Apart(a, b, alike, reason, (x, y)) for a, b, alike, reason, x, y in rows)
    return Looks(pairs, same, undecided, shown)
