"""The second look at many pairs, as steps: which pairs that look alike show the same.

Pairs are dealt into buckets of some hundred, in the order of the tables they come from. The images
that a bucket needs are decoded and sent to it (`forms`), then a task looks at its pairs. Nothing is
looked at but the pairs that are asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.curate.images.fingerprint import Decoding
from pipeline.curate.look.forms import FormsOf, opened_form, write_forms
from pipeline.curate.look.second_look import second_look
from pipeline.curate.rows.first_of_each import in_order
from pipeline.curate.rows.tables import ID, ROW, Inputs, ids_of
from pipeline.curate.steps.steps import Account, Output, Step, Steps

VERSION = 2  # of the look; another one looks again
BUCKET_PAIRS = 256  # of a task: half a minute, and at most 512 forms

# Pairs to look at: of two rows, or of a row and an image of another set (`other` is then -1).
PAIRS = pa.schema(
    [
        ("row", ROW),
        ("other", ROW),
        ("set", pa.string()),
        ("other_id", ID),
        ("similarity", pa.float64()),
    ]
)
# Images that the pairs of a bucket need: by their row, or of other sets by their id.
REQUESTS = pa.schema([("set", pa.string()), ("row", ROW), ("image_id", ID), ("bucket", pa.int64())])
VERDICTS = pa.schema(
    [
        *PAIRS,
        ("same", pa.bool_()),
        ("reason", pa.string()),  # as in `second_look.Verdict`
        ("score", pa.float32()),
        ("x", pa.float32()),
        ("y", pa.float32()),
    ]
)
NOTHING = bytes(16)
COUNTED = ("pairs", "same", "differ", "colour", "undecided")


@dataclass(frozen=True)
class Looking:
    """What the second look needs of a curation.

    Attributes:
        inputs: the images that are curated.
        decoding: of images.
        others: by name the other sets that they are compared with, and their fingerprints (None:
            shards of ours, which hold ids).
    """

    inputs: Inputs
    decoding: Decoding = field(default_factory=Decoding)
    others: Mapping[str, tuple[Inputs, Step | None]] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, FormsOf]:
        """All files, a task each."""
        files = [FormsOf(file) for file in self.inputs.files]
        for name, (inputs, prints) in sorted(self.others.items()):
            files += [FormsOf(file, name, prints) for file in inputs.files]
        return {one.name: one for one in files}


@dataclass(frozen=True)
class Looked:
    """Verdicts on the pairs of each source.

    Attributes:
        step: with `VERDICTS`, a table for each bucket.
        names: of the tables of each source.
    """

    step: Step
    names: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Bucket:
    """The pairs of a task: bucket `bucket` of a source, which is number `number` of all."""

    source: str
    bucket: int
    number: int


def counted(looked: Step) -> dict[str, int]:
    """Of `look_at_bucket`: pairs, those that show the same, and the others by reason."""
    return {name: int(looked.total(name)) for name in COUNTED}


def look_at(
    steps: Steps,
    name: str,
    looking: Looking,
    sources: Mapping[str, Any],
    read: Callable[..., pa.Table],
    **arguments: Any,
) -> Looked:
    """Looks at all pairs of some tables.

    Args:
        steps: of the curation.
        name: below which the steps are.
        looking: the images.
        sources: by unique names.
        read: `read(source, **arguments)` gives the pairs of a source as `PAIRS`.
        arguments: what they are read from.
    """
    placed = steps.run(f"{name}/placed", place_pairs, sources, version=VERSION, read=read,
                       arguments=arguments)  # fmt: skip
    # Buckets of all sources are numbered through, for a file's forms go to buckets of any source.
    counts = [account["buckets"] for account in placed.accounts]
    firsts = dict(zip(sources, np.cumsum([0, *counts]).tolist(), strict=False))
    forms = steps.run(f"{name}/forms", write_requested, looking.files, version=VERSION,
                      placed=placed, firsts=firsts, decoding=looking.decoding)  # fmt: skip
    buckets = {
        f"{firsts[source] + b:06d}": Bucket(source, b, firsts[source] + b)
        for source, count in zip(sources, counts, strict=True)
        for b in range(count)
    }
    looked = steps.run(f"{name}/looked", look_at_bucket, buckets, version=VERSION, placed=placed,
                       forms=forms)  # fmt: skip
    names: dict[str, list[str]] = {source: [] for source in sources}
    for table, bucket in buckets.items():
        names[bucket.source].append(table)
    return Looked(looked, {source: tuple(tables) for source, tables in names.items()})


def place_pairs(
    out: Output, source: Any, read: Callable[..., pa.Table], arguments: Mapping[str, Any]
) -> Account:
    """Task: the pairs of a source in buckets, and what images they need, by row."""
    table = read(source, **arguments).cast(PAIRS)
    table = table.take(pa.array(_order(table)))
    bucket = np.arange(len(table)) // BUCKET_PAIRS
    out.buckets(table, bucket, sub="pairs")
    row, other, away = table["row"], table["other"], table["other_id"].is_valid()
    bucket_of = pa.array(bucket)
    none = pa.nulls(len(table), ID)
    own, others = (pa.array(np.full(len(table), value)) for value in ("", -1))
    of_others = [table["set"], others, table["other_id"], bucket_of]
    requests = [
        pa.table([own, row, none, bucket_of], schema=REQUESTS),
        pa.table([own, other, none, bucket_of], schema=REQUESTS).filter(pc.invert(away)),
        pa.table(of_others, schema=REQUESTS).filter(away),
    ]
    out.table(pa.concat_tables(requests), sub="requests")
    return {"rows": len(table), "buckets": int(bucket[-1]) + 1 if len(bucket) else 0}


def _order(table: pa.Table) -> Any:
    """By row, so that pairs with an image in common are near each other."""
    ids = ids_of(table.column("other_id").fill_null(NOTHING))
    sets = np.unique(np.array(table["set"].to_pylist(), dtype=str), return_inverse=True)[1]
    return in_order(table["row"].to_numpy(), table["other"].to_numpy(), sets, ids)


def write_requested(
    out: Output, images: FormsOf, placed: Step, firsts: Mapping[str, int], decoding: Decoding
) -> Account:
    """Task: the forms of a file's images, in the buckets of the pairs that need them.

    Args:
        out: where to.
        images: a file.
        placed: the pairs, with the `requests` for images.
        firsts: number of the first bucket of each source among those of all.
        decoding: of the images.
    """
    first = images.file.first
    of_file: list[tuple[str, str, Any]] = [("set", "=", images.set)]
    if not images.set:
        of_file += [("row", ">=", first), ("row", "<", images.file.end)]
    ids = images.ids() if images.set else None
    places, buckets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for source in placed.tables:
        table = placed.read(source, filters=of_file, sub="requests")
        if ids is not None:  # of a set of several files, the images that are in this one
            table = table.filter(pc.is_in(table["image_id"], ids))
            place = pc.index_in(table["image_id"], ids).to_numpy()
        else:
            place = table["row"].to_numpy() - first
        places.append(place.astype(np.int64))
        buckets.append(table["bucket"].to_numpy() + firsts[source])
    both = np.unique(np.stack([np.concatenate(places), np.concatenate(buckets)], 1), axis=0)
    return write_forms(out, images, both[:, 0], both[:, 1], decoding)


def look_at_bucket(out: Output, bucket: Bucket, placed: Step, forms: Step) -> Account:
    """Task: looks at the pairs of a bucket."""
    pairs = placed.bucket(bucket.bucket, PAIRS, sub="pairs", only=bucket.source)
    stored: dict[Any, bytes] = {}
    for table in forms.buckets(bucket.number):
        for one in table.to_pylist():
            key = one["row"] if one["row"] >= 0 else (one["set"], one["image_id"])
            stored[key] = one["form"]
    opened: dict[Any, Any] = {}

    def form(key: Any) -> Any:
        if key not in opened:
            opened[key] = opened_form(stored[key]) if stored.get(key) else None
        return opened[key]

    verdicts = []
    for pair in pairs.to_pylist():
        if len(opened) > BUCKET_PAIRS // 4:  # forms of 0.8 MB
            opened.clear()
        other = pair["other"] if pair["other"] >= 0 else (pair["set"], pair["other_id"])
        a, b = form(pair["row"]), form(other)
        if a is None or b is None:
            verdicts.append((False, "undecided", 0.0, 0.5, 0.5))
            continue
        verdict = second_look(a, b)
        verdicts.append((verdict.same, verdict.reason, verdict.score, *verdict.place))
    columns = list(zip(*verdicts, strict=True))
    for one, values in zip(list(VERDICTS)[len(PAIRS) :], columns, strict=True):
        pairs = pairs.append_column(one, pa.array(values, one.type))
    out.table(pairs.cast(VERDICTS))
    reasons = list(columns[1])
    by_reason = {reason: reasons.count(reason) for reason in COUNTED[2:]}
    return {"pairs": len(pairs), "same": reasons.count(""), **by_reason}


def verdicts_of(looked: Step, names: Sequence[str], same: bool = True) -> pa.Table:
    """Verdicts of some tables: of pairs that show the same, or of the others."""
    return looked.every(VERDICTS, [("same", "=", same)], only=names)


def pairs_of_rows(row: Any, other: Any, similarity: Any) -> pa.Table:
    """Pairs of rows, as `PAIRS`."""
    none = [pa.array([""] * len(row), pa.string()), pa.nulls(len(row), ID)]
    return pa.table([row, other, *none, similarity], schema=PAIRS)


def pairs_with_others(row: Any, similarity: Any, sets: Any, ids: Any) -> pa.Table:
    """Pairs of rows with images of other sets, as `PAIRS`."""
    return pa.table([row, pa.array(np.full(len(row), -1)), sets, ids, similarity], schema=PAIRS)
