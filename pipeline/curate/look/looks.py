"""The second look at many pairs, as steps: which pairs that look alike show the same.

Pairs are dealt into buckets of some hundred, in the order of the tables they come from. The images
that a bucket needs are decoded and sent to it (`forms`), then a task looks at its pairs. Nothing is
looked at but the pairs that are asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.curate.look import forms
from pipeline.curate.look.second_look import second_look
from pipeline.curate.rows.bucketed import read_bucket, shelves_of, write_buckets
from pipeline.curate.rows.read_rows import read_range
from pipeline.curate.rows.tables import ID, ROW, InputFile, Inputs, ids_of, read_table, write_table
from pipeline.curate.steps.steps import Account, Result, Task, run_step
from pipeline.images.bad_image import MAX_PIXELS
from pipeline.uri import Place, join

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
REQUESTS = pa.schema([("row", ROW), ("bucket", pa.int64())])
OTHERS = pa.schema([("set", pa.string()), ("image_id", ID), ("bucket", pa.int64())])
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
Source = tuple[str, tuple[Any, ...]]  # its name, and the arguments of the function that reads it


@dataclass(frozen=True)
class Looking:
    """What the second look needs of a curation.

    Attributes:
        inputs: the images that are curated.
        channels: of an image, as it is decoded.
        max_pixels: larger images are refused.
        others: by name the other sets that they are compared with, and the folder of their
            fingerprints ("": shards of ours, which hold ids).
    """

    inputs: Inputs
    channels: int = 3
    max_pixels: int = MAX_PIXELS
    others: Mapping[str, tuple[Inputs, str]] | None = None

    @property
    def key(self) -> Any:
        """Changes with what is looked at."""
        others = {name: inputs.digest for name, (inputs, _) in (self.others or {}).items()}
        return [VERSION, self.inputs.digest, self.channels, self.max_pixels, sorted(others.items())]


@dataclass(frozen=True)
class Looked:
    """Verdicts on the pairs of each source.

    Attributes:
        folder: of `VERDICTS`, a table for each bucket.
        names: of the tables of each source.
        key: of the step.
        steps: all of them.
    """

    folder: str
    names: Mapping[str, tuple[str, ...]]
    key: str
    steps: tuple[Result, ...]


COUNTED = ("pairs", "same", "differ", "colour", "undecided")


def counted(looked: Result) -> dict[str, int]:
    """Of the step of `look_task`: pairs, those that show the same, and the others by reason."""
    return {name: int(looked.total(name)) for name in COUNTED}


def look_at(
    root: Place,
    step: str,
    looking: Looking,
    settings: Any,
    sources: Sequence[Source],
    read: Callable[..., pa.Table],
) -> Looked:
    """Looks at all pairs of some tables.

    Args:
        root: folder of the curation.
        step: name below which the steps are.
        looking: the images.
        settings: keys of the steps that the sources are of, and what they are read with.
        sources: with unique names.
        read: `read(*arguments)` gives the pairs of a source as `PAIRS`.
    """
    key = [looking.key, settings]
    placed = run_step(
        root,
        f"{step}/placed",
        key,
        [Task(name, (name, read, arguments)) for name, arguments in sources],
        place_task,
    )
    first, firsts, names = 0, [], {}
    for (name, _), account in zip(sources, placed.accounts, strict=True):
        firsts.append((name, first, tuple(account["shelves"])))
        names[name] = tuple(f"{first + b:06d}" for b in range(account["buckets"]))
        first += account["buckets"]
    of_names = tuple(name for name, _ in sources)
    offsets = tuple(at for _, at, _ in firsts)
    requests = Requested(placed.folder, of_names, offsets, looking.channels, looking.max_pixels)
    tasks = [Task(f"-{f.name}", ("", f, "", requests)) for f in looking.inputs.files]
    for set_name, (inputs, prints) in sorted((looking.others or {}).items()):
        tasks += [
            Task(f"{set_name}-{f.name}", (set_name, f, prints, requests)) for f in inputs.files
        ]
    formed = run_step(root, f"{step}/forms", [placed.key], tasks, forms_task)
    written = tuple(
        (name, tuple(shelves)) for account in formed.accounts for name, shelves in account["names"]
    )
    tasks = [
        Task(one, (one, placed.folder, (name, shelves), b, at + b, formed.folder, written))
        for name, at, shelves in firsts
        for b, one in enumerate(names[name])
    ]
    looked = run_step(root, f"{step}/looked", [placed.key, formed.key], tasks, look_task)
    return Looked(looked.folder, names, looked.key, (placed, formed, looked))


def place_task(folder: str, name: str, read: Callable[..., pa.Table], arguments: Any) -> Account:
    """Writes the pairs of a source in buckets, and what images they need, by row."""
    table = read(*arguments).cast(PAIRS)
    table = table.take(pa.array(_order(table)))
    bucket = np.arange(len(table)) // BUCKET_PAIRS
    size = write_buckets(str(join(folder, "pairs")), name, table, bucket)
    row, other = (table.column(c).to_numpy() for c in ("row", "other"))
    rows = np.concatenate([row, other[other >= 0]])
    buckets = np.concatenate([bucket, bucket[other >= 0]])
    both = np.unique(np.stack([rows, buckets], 1), axis=0)
    size += write_table(
        pa.table([both[:, 0], both[:, 1]], schema=REQUESTS), str(join(folder, "rows")), name
    )
    away = pa.array(other < 0)
    columns = [table.column(c).filter(away) for c in ("set", "other_id")]
    others = pa.table([*columns, bucket[other < 0]], schema=OTHERS)
    size += write_table(others, str(join(folder, "others")), name)
    buckets_count = int(bucket[-1]) + 1 if len(bucket) else 0
    return {
        "rows": len(table),
        "bytes": size,
        "buckets": buckets_count,
        "shelves": shelves_of(bucket),
    }


def _order(table: pa.Table) -> Any:
    """By row, so that pairs with an image in common are near each other."""
    ids = ids_of(table.column("other_id").fill_null(NOTHING)).view(">u8").reshape(-1, 2)
    keys = (table.column(name).to_numpy() for name in ("other", "row"))
    sets = np.array(table.column("set").to_pylist(), dtype=str)
    return np.lexsort((ids[:, 1], ids[:, 0], sets, *keys))


@dataclass(frozen=True)
class Requested:
    """What images the pairs need.

    Attributes:
        folder: of `place_task`, with `rows` and `others`.
        names: of its tables, a source each.
        offsets: number of the first bucket of each source among those of all.
        channels: of an image, as it is decoded.
        max_pixels: larger images are refused.
    """

    folder: str
    names: Sequence[str]
    offsets: Sequence[int]
    channels: int
    max_pixels: int


def forms_task(
    folder: str, set_name: str, file: InputFile, fingerprints: str, requests: Requested
) -> Account:
    """Writes the forms of a file's images to the buckets that need them.

    Args:
        folder: of the step.
        set_name: of another set; empty: the file is one of those that are curated.
        file: which.
        fingerprints: folder of those of the other set; empty: the file itself holds ids.
        requests: for images.
    """
    places, buckets, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], None
    if set_name:
        ids = _named(forms.ids_of_file(file, fingerprints))
        order = np.argsort(ids, kind="stable")
    for name, offset in zip(requests.names, requests.offsets, strict=True):
        if not set_name:
            end = file.first + file.rows
            for table in read_range(str(join(requests.folder, "rows")), [name], file.first, end):
                places.append(table.column("row").to_numpy() - file.first)
                buckets.append(table.column("bucket").to_numpy() + offset)
            continue
        assert ids is not None
        of_set = [("set", "=", set_name)]
        table = read_table(str(join(requests.folder, "others")), name, filters=of_set)
        if not len(table) or not len(ids):
            continue
        asked = _named(ids_of(table.column("image_id")))
        at = np.minimum(np.searchsorted(ids[order], asked), len(ids) - 1)
        here = ids[order][at] == asked
        places.append(order[at[here]])
        buckets.append(table.column("bucket").to_numpy()[here] + offset)
    of_file = (np.concatenate(places), np.concatenate(buckets))
    own = None if ids is None else np.ascontiguousarray(ids).view(np.uint8).reshape(-1, 16)
    channels, most = requests.channels, requests.max_pixels
    return forms.write_forms(folder, file, set_name, of_file, own, channels, most)


def _named(ids: Any) -> Any:
    """Ids uint8 [n, 16] as n strings of bytes, which can be ordered."""
    return np.ascontiguousarray(ids).view("S16").ravel()


def look_task(
    folder: str,
    name: str,
    placed: str,
    source: tuple[str, Sequence[int]],
    bucket: int,
    number: int,
    forms_folder: str,
    written: Sequence[tuple[str, Sequence[int]]],
) -> Account:
    """Looks at the pairs of a bucket."""
    pairs = pa.concat_tables(list(read_bucket(str(join(placed, "pairs")), [source], bucket)))
    by_row: dict[int, bytes] = {}
    by_id: dict[tuple[str, bytes], bytes] = {}
    for table in read_bucket(forms_folder, written, number):
        for one in table.to_pylist():
            if one["row"] >= 0:
                by_row[one["row"]] = one["form"]
            else:
                by_id[one["set"], one["image_id"]] = one["form"]
    opened: dict[Any, Any] = {}

    def form(key: Any) -> Any:
        if key not in opened:
            stored = by_row.get(key, b"") if isinstance(key, int) else by_id.get(key, b"")
            opened[key] = forms.opened_form(stored) if stored else None
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
    for field, values in zip(list(VERDICTS)[len(PAIRS) :], columns, strict=True):
        pairs = pairs.append_column(field, pa.array(values, field.type))
    reasons = list(columns[1])
    size = write_table(pairs.cast(VERDICTS), folder, name)
    return {
        "rows": len(pairs),
        "bytes": size,
        "pairs": len(pairs),
        "same": reasons.count(""),
        **{reason: reasons.count(reason) for reason in COUNTED[2:]},
    }


def verdicts_of(folder: str, names: Sequence[str], same: bool | None = True) -> pa.Table:
    """Verdicts of some tables: of pairs that show the same, of the others, or (None) all."""
    filters = None if same is None else [("same", "=", same)]
    tables = [VERDICTS.empty_table(), *(read_table(folder, n, filters=filters) for n in names)]
    return pa.concat_tables([table.cast(VERDICTS) for table in tables]).combine_chunks()
