"""What the report says of copies: pairs by similarity, components by size, examples of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.report.read import Smallest, TableFiles, draws, hex_ids, ids, value_draws

BIN = 0.01  # width of a bar of similarities
NEAR, FAR = 0.02, 0.05  # from the threshold: ends of the bands
PAIRS = 6  # shown of each band
COMPONENTS = 6  # shown of each kind
MEMBERS = 9  # shown of a component, beside its keepers
NOBODY = "0" * 32  # id of a row that has no decision, which the balance tells of
KEEPERS = 5  # shown of a component that is split


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
    def largest_size(self) -> int:
        """Images in the largest; 0 where there is none."""
        return max(self.sizes, default=0)


def read_edges(tables: TableFiles, threshold: float, seed: int) -> Edges:
    """One pass over the pairs."""
    ends = [-1.0, threshold - FAR, threshold - NEAR, threshold, threshold + NEAR, threshold + FAR]
    ends = [end for end in ends if end < 1] + [1.01]
    kept = [Smallest(PAIRS) for _ in ends[1:]]
    inside = np.zeros(len(kept), np.int64)
    # Bars end at the threshold, so that each is on one side of it.
    below, over = int(np.ceil((threshold + 1) / BIN)), int(np.ceil((1.001 - threshold) / BIN))
    bins = np.round(threshold + BIN * np.arange(-below, over + 1), 12)
    counts = np.zeros(len(bins) - 1, np.int64)
    for _, table in tables.read("edges", ["a", "b", "similarity"]):
        values = table["similarity"].to_numpy().astype(np.float64)
        if not len(values):
            continue
        # A pair is a copy where it is above the threshold, so bars hold their upper end.
        places = np.searchsorted(bins, np.clip(values, bins[0] + 1e-9, 1.0), side="left") - 1
        counts += np.bincount(np.clip(places, 0, len(counts) - 1), minlength=len(counts))
        bands = np.searchsorted(ends, values, side="left") - 1
        inside += np.bincount(np.clip(bands, 0, len(kept) - 1), minlength=len(kept))
        pairs = np.stack([table["a"].to_numpy(), table["b"].to_numpy()], 1)
        drawn = value_draws(values, seed)
        for band in np.unique(bands):
            mine = np.flatnonzero(bands == band)
            kept[int(band)].offer(drawn[mine], partial(_pair, pairs[mine], values[mine]))
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (below, below + 1)
    first, last = min(first, below), max(last, below)
    bands_found = [
        Band(
            low, high, int(number), tuple(Pair(*pair) for pair in sample.items()), low >= threshold
        )
        for low, high, number, sample in zip(ends, ends[1:], inside, kept, strict=False)
    ]
    return Edges(
        count=int(counts.sum()),
        above=sum(band.count for band in bands_found if band.copies),
        bins=tuple(map(float, bins[first : last + 1])),
        counts=tuple(map(int, counts[first:last])),
        bands=tuple(band for band in bands_found if band.count),
    )


def read_components(tables: TableFiles, seed: int) -> Components:
    """Two passes: sizes and names first, then members of those that are shown."""
    by_size: Counter[int] = Counter()
    largest, random, chains = Smallest(COMPONENTS), Smallest(COMPONENTS), Smallest(COMPONENTS)
    chained = 0
    columns = ["component", "size", "chained"]
    for _, table in tables.read("components", columns):
        for one in pc.value_counts(table["size"]).to_pylist():
            by_size[one["values"]] += one["counts"]
        chained += int(pc.sum(table["chained"]).as_py() or 0)
        each = table.group_by(["component", "size"]).aggregate([("chained", "any")])
        names = ids(each["component"])
        drawn, sizes = draws(names, seed), each["size"].to_numpy()
        _offer(largest, -sizes.astype(np.float64), names, sizes)
        _offer(random, drawn, names, sizes)
        has = np.flatnonzero(each["chained_any"].to_numpy())
        _offer(chains, drawn[has], names[has], sizes[has])
    chosen = {name: size for sample in (largest, random, chains) for name, size in sample.items()}
    members = _members(tables, chosen, seed)

    def components(sample: Smallest) -> tuple[Component, ...]:
        return tuple(Component(name.hex(), size, members[name]) for name, size in sample.items())

    # A component of size s has s rows in the table.
    sizes_found = {size: round(rows / size) for size, rows in sorted(by_size.items())}
    return Components(
        count=sum(sizes_found.values()),
        rows=sum(by_size.values()),
        sizes=sizes_found,
        largest=components(largest),
        random=components(random),
        chains=components(chains),
        chained=chained,
    )


def _pair(pairs: np.ndarray[Any, Any], values: np.ndarray[Any, Any], place: int) -> Any:
    return int(pairs[place, 0]), int(pairs[place, 1]), float(values[place])


def _offer(
    kept: Smallest,
    draw: np.ndarray[Any, Any],
    names: np.ndarray[Any, Any],
    sizes: np.ndarray[Any, Any],
) -> None:
    """The first of a file, by draw and name; a component with rows in several files once."""
    words = names.view(">u8")
    first = np.lexsort((words[:, 1], words[:, 0], draw))[: 2 * COMPONENTS]
    items = [(names[i].tobytes(), int(sizes[i])) for i in first]
    new = [k for k, item in enumerate(items) if item not in kept.items()]
    kept.offer(draw[first[new]], lambda place: items[new[place]])


def _members(
    tables: TableFiles, chosen: Mapping[bytes, int], seed: int
) -> dict[bytes, tuple[Member, ...]]:
    kept = {name: Smallest(MEMBERS) for name in chosen}
    unlike = {name: Smallest(3) for name in chosen}
    keepers = {name: Smallest(KEEPERS) for name in chosen}
    names = pa.array(sorted(chosen), pa.binary(16))
    columns = ["row", "component", "keeper", "similarity", "chained"]
    for _, table in tables.read("components", columns):
        table = table.filter(pc.is_in(table["component"], names))
        if not len(table):
            continue
        named = tables.column_of("decisions", table["row"].to_pylist(), "image_id")
        hexes = pa.chunked_array([[named.get(row, NOBODY) for row in table["row"].to_pylist()]])
        drawn = draws(hex_ids(hexes), seed)
        for one, draw in zip(table.to_pylist(), drawn, strict=True):
            item = (one["row"], one["keeper"], one["similarity"], bool(one["chained"]))
            name = one["component"]
            sample = keepers if item[0] == item[1] else kept
            sample[name].offer(np.array([draw]), lambda _, item=item: item)  # type: ignore[misc]
            if sample is kept:
                unlike[name].offer(np.array([item[2]]), lambda _, item=item: item)  # type: ignore[misc]
    members = {}
    for name in chosen:
        # The least like ones are where a mistake would show, so three of them are always there.
        unlike_first = {item[0]: item for item in [*unlike[name].items(), *kept[name].items()]}
        stay = sorted(keepers[name].items(), key=lambda item: (item[3], item[0]))
        place = {item[0]: k for k, item in enumerate(stay)}
        others = [item for item in list(unlike_first.values())[:MEMBERS] if item[1] in place]
        order = sorted(
            [*stay, *others], key=lambda item: (place[item[1]], item[0] != item[1], -item[2])
        )
        members[name] = tuple(Member(*item) for item in order)
    return members


# ---- What the report says of pairs that look alike and differ: how many, and some of them.


SHOWN = 12  # pairs


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
    def rows(self) -> Iterator[int]:
        """Rows that are shown."""
        for one in self.apart:
            yield from (one.a, one.b)


def read_looks(tables: TableFiles, seed: int) -> Looks:
    """One pass over the verdicts."""
    pairs = same = undecided = 0
    kept = Smallest(SHOWN)
    columns = ["row", "other", "similarity", "same", "reason", "x", "y"]
    for _, table in tables.read("looks", columns):
        pairs += len(table)
        same += int(pc.sum(table["same"]).as_py() or 0)
        undecided += int(pc.sum(pc.equal(table["reason"], "undecided")).as_py() or 0)
        apart = table.filter(pc.invert(table["same"])).to_pylist()
        if not apart:
            continue
        drawn = value_draws(np.array([one["similarity"] for one in apart]), seed)

        def item(place: int, apart: list[dict[str, float]] = apart) -> tuple[object, ...]:
            one = apart[place]
            names = ("row", "other", "similarity", "reason", "x", "y")
            return tuple(one[name] for name in names)

        kept.offer(drawn, item)
    shown = [Apart(a, b, s, reason, (x, y)) for a, b, s, reason, x, y in kept.items()]
    return Looks(pairs, same, undecided, tuple(shown))
