"""The bad files of a source, listed in tables, and what a pack has counted in all."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import DataError
from pipeline.images.bad_image import INSTALL
from pipeline.images.value_range import FULL, ValueRange
from pipeline.pack.listing import Listing, Other, Refused
from pipeline.pack.sources import Plan
from pipeline.shards.columns import BAD_IMAGE_SCHEMA
from pipeline.storage.places import public_uri, resolve_uri
from pipeline.storage.transfer import write_parquet_atomic

log = logging.getLogger("pipeline.pack")


@dataclass(frozen=True)
class PackReport:
    """What a pack did. images_in == images_packed + duplicates + the sum of bad."""

    images_in: int
    images_packed: int
    duplicates: int  # byte for byte equal to an image that was packed
    bad: dict[str, int]  # reason: count
    bytes: int  # of all shards
    shards: int
    digest: str
    class_names: tuple[str, ...]
    seconds: float
    retries: int = 0  # remote calls that were tried again
    # files that are no images, by reason
    others: dict[str, int] = dataclasses.field(default_factory=dict)
    value_range: ValueRange = FULL  # of deep images, that becomes 0 to 255
    used_range: ValueRange | None = None  # of the values that they have; None: there are none
    disagreeing: int = 0  # of the duplicates, those of another class than the image that was packed


@dataclass(frozen=True)
class Outcome:
    """What was read of a source, and where it is listed."""

    source: str
    images_in: int
    bad: Sequence[Refused]
    others: Sequence[Other]
    links: int  # that were not followed
    bad_images: str  # place of the table of bad images
    other_files: str

    @classmethod
    def of(
        cls,
        listing: Listing,
        plan: Plan,
        accounts: Sequence[dict[str, Any]],
        *,
        source: str,
        bad_images: str,
        other_files: str,
    ) -> Outcome:
        """Adds up what was refused without reading and the accounts of the reading tasks."""
        bad = [Refused(*row) for account in accounts for row in account["bad"]]
        others = [Other(*row) for account in accounts for row in account["others"]]
        return cls(
            source=public_uri(source),
            images_in=len(plan.refused) + sum(account["images"] for account in accounts),
            bad=[*plan.refused, *bad],
            others=listed_once([*plan.others, *others]),
            links=listing.links,
            bad_images=bad_images,
            other_files=other_files,
        )

    def write(self) -> None:
        """Writes both tables, and says what may be images or labels and was not read."""
        _write_bad_images(self.bad, self.bad_images)
        _write_other_files(self.others, self.other_files)
        _warn(self.others)

    def check(self, limit: float) -> None:
        """Refuse a source without an image, or with too many bad ones.

        Raises:
            DataError: names three bad images, and says where all are listed.
        """
        counts = ", ".join(
            f"{n} {reason}" for reason, n in Counter(b.reason for b in self.bad).most_common()
        )
        listed = f"each one is listed with its reason in {public_uri(self.bad_images)}"
        needed = sorted({item.detail for item in self.bad if INSTALL in item.detail})
        listed = "; ".join([*needed, listed])
        links = ""
        if self.links:
            links = (
                f"; {self.links} links were not followed: with data.follow_links=true links to "
                "files are read, wherever they lead"
            )
        if len(self.bad) == self.images_in:
            others = f"{len(self.others)} other file{'s' * (len(self.others) != 1)} left alone"
            raise DataError(
                f"no image under {self.source} could be read: "
                + ", ".join(filter(None, [counts, others if self.others else ""])),
                hint=(listed if self.bad else f"they are listed in {public_uri(self.other_files)}")
                + links,
            )
        if len(self.bad) > limit * self.images_in:
            named = ", ".join(f"{item.source} ({item.reason})" for item in _first(self.bad))
            shares = unequal_shares(len(self.bad) / self.images_in, limit)
            raise DataError(
                f"{len(self.bad)} of {self.images_in} images under {self.source} are bad "
                f"({shares}): {counts}; such as {named}",
                hint=f"{listed}; take them away, or set data.max_bad_fraction higher and run "
                f"again: it goes on where it stopped{links}",
            )


def listed_once(others: Sequence[Other]) -> list[Other]:
    """Label files once, though several tasks may read one; as used where one of them used it."""
    of_labels: dict[tuple[str, str], Other] = {}
    for item in others:
        if item.reason in ("label", "bad_label"):
            key = item.source, item.reason
            of_labels[key] = min(item, of_labels.get(key, item), key=lambda o: o.detail)
    return [o for o in others if o.reason not in ("label", "bad_label")] + [*of_labels.values()]


def _first(bad: Sequence[Refused]) -> list[Refused]:
    """Three bad images, of different reasons where there are some."""
    by_reason = {item.reason: item for item in reversed(sorted(bad, key=lambda b: b.source))}
    first = sorted(by_reason.values(), key=lambda item: item.source)[:3]
    more = (item for item in sorted(bad, key=lambda b: b.source) if item not in first)
    return [*first, *itertools.islice(more, 3 - len(first))]


def unequal_shares(share: float, allowed: float) -> str:
    """Two shares of which the first is larger, with as many digits as it takes to see that."""
    for digits in range(2, 17):
        first, second = f"{share:.{digits}%}", f"{allowed:.{digits}%}"
        if first != second:
            break
    return f"{first[:-1]} %, allowed {second[:-1]} %"


def _warn(others: Sequence[Other]) -> None:
    """Say what may be images, or labels, and was not read."""
    for reason, what in (
        ("bad_label", "label files say no class; their images have none"),
        ("unread_archive", "archives are of kinds that are not read"),
    ):
        named = [item for item in others if item.reason == reason]
        if named:
            first = "; ".join(f"{item.source}: {item.detail}" for item in named[:3])
            log.warning("%d %s, such as %s", len(named), what, first)


def _write_bad_images(bad: Sequence[Refused], uri: str) -> None:
    """Write the bad image table, sorted by source."""
    rows = sorted(
        (item.source, item.image_id or "", "pack", item.reason, item.detail) for item in bad
    )
    columns = list(zip(*rows, strict=True)) or [()] * len(BAD_IMAGE_SCHEMA)
    columns[1] = tuple(name or None for name in columns[1])
    arrays = [pa.array(c, f.type) for c, f in zip(columns, BAD_IMAGE_SCHEMA, strict=True)]
    write_parquet_atomic(
        pa.table(arrays, schema=BAD_IMAGE_SCHEMA), *resolve_uri(uri), row_group_size=65_536
    )


def _write_other_files(others: Sequence[Other], uri: str) -> None:
    """Write the table of files that are no images, sorted by source."""
    rows = sorted(dataclasses.astuple(item) for item in others)
    names = ("source", "reason", "detail")
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(names))]
    table = pa.table(columns, names=list(names))
    write_parquet_atomic(table, *resolve_uri(uri), row_group_size=65_536)
