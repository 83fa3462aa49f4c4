"""Cuts a source of images into reading tasks; they depend on the source and the settings alone.

Parquet files are sets of images, archives hold images, and every other file is tried as an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.kinds import is_archive, is_table, named_as_image
from pipeline.pack.labels import LabelFiles, names_of
from pipeline.pack.listing import Listing, Other, Refused, readable
from pipeline.pack.source_places import Entry, inside
from pipeline.shards.columns import (
    IMAGE_SHARD_SCHEMA,
    MANIFEST,
    check_columns,
    check_fit,
    class_names_of,
    is_image_type,
    is_ours,
)
from pipeline.shards.shard_set import open_parquet
from pipeline.storage.once import once
from pipeline.storage.places import public_uri, resolve_uri
from pipeline.storage.transfer import open_patiently

TASK_BYTES = 64 * 2**20  # of source in one task: small enough for a small machine and for a retry
TASK_FILES = 1000
HARD = 2  # times both limits, after which images of one label file are cut as well


@dataclass(frozen=True)
class Reading:
    """How a source is read, the same for all of its tasks."""

    image_column: str
    label_column: str
    max_image_bytes: int
    labels: bool = True  # False: label columns are not looked at
    label_member: str = ""  # see `labels.LabelFiles`; empty: no file holds a label
    # further columns of parquet files, as the shards will have them: known when all is planned
    extras: pa.Schema = dataclasses.field(default_factory=lambda: pa.schema([]))


@dataclass(frozen=True)
class Task:
    """Part of a source for one reading task: some files, one archive, or row groups of one file."""

    kind: (
        str  # "files", "large" (files of which only the first bytes are read), "archive", "parquet"
    )
    paths: tuple[str, ...]
    row_groups: tuple[int, ...] = ()
    names: int = -1  # which of `Plan.name_lists` the labels of the file count in
    own: bool = False  # the file is a shard of this project


@dataclass(frozen=True)
class Plan:
    """All tasks, what needs no reading, and what the output takes from all files together."""

    tasks: tuple[Task, ...]
    refused: tuple[Refused, ...]
    others: tuple[Other, ...]
    name_lists: tuple[tuple[str, ...], ...]  # of class names, in parquet files
    extras: pa.Schema  # extra columns of the output
    labelled: bool  # files beside the images hold their labels
    images: int  # that files and tables seem to hold; 0 where there are archives: not known


def plan_tasks(uri: str, listing: Listing, reading: Reading, fit: bool = True) -> Plan:
    """Cut a listing into tasks; footers of parquet files are read here.

    With `fit`, columns whose type differs between files are read: whether one type holds all their
    values.

    Raises:
        DataError: a parquet file without usable columns, an unfinished pack, or extra columns of
            the same name that do not fit together.
    """

    def planned() -> tuple[Listing, Plan]:  # the listing is kept, so that its id stays its own
        return listing, _planned(uri, listing, reading, fit)

    return once(("plan", uri, id(listing), reading, fit), planned)[1]


def _planned(uri: str, listing: Listing, reading: Reading, fit: bool) -> Plan:
    tables = _Tables(uri, listing, reading)
    label_files = LabelFiles(reading.label_member)
    keys = {label_files.key(entry.path) for entry in listing.entries} - {None}
    refused = [*listing.refused, *tables.refused]
    tasks = list(tables.tasks)
    # Two tasks are filled at once: files that are read whole, and such as are too large for that,
    # whose first bytes only say whether they are images.
    batches: dict[str, list[str]] = {"files": [], "large": []}
    size = 0  # bytes of the files that are read whole
    # Files of one label follow each other, its label files first: `beside` are those read so far,
    # which a task that goes on with the same label must read again.
    last, beside = "", list[str]()
    for key, entry in _by_label(listing.entries, label_files) if keys else _each(listing.entries):
        if is_table(entry.path):
            continue
        if is_archive(entry.path):
            tasks.append(Task("archive", (entry.path,)))
            continue
        if entry.size > reading.max_image_bytes and named_as_image(entry.path):
            detail = f"{entry.size} bytes, at most {reading.max_image_bytes} are read"
            refused.append(Refused(readable(entry.path), "too_large", detail))
            continue
        kind = "large" if entry.size > reading.max_image_bytes else "files"
        batch, same = batches[kind], key == last
        beside = beside if same else []
        limit = HARD if same else 1  # an image is read by a task that reads its label
        over = kind == "files" and size + entry.size > limit * TASK_BYTES
        if batch and (len(batch) >= limit * TASK_FILES or over):
            tasks.append(Task(kind, tuple(batch)))
            batch[:] = beside if kind == "files" else []
            size = size if kind == "large" else 0
        batch.append(entry.path)
        beside += [entry.path] * (label_files.key(entry.path) is not None)
        size, last = size + entry.size * (kind == "files"), key
    tasks += [Task(kind, tuple(batch)) for kind, batch in batches.items() if batch]
    if not tasks and tables.useless is not None:
        raise tables.useless
    others = (*listing.others, *tables.others)
    archives = any(task.kind == "archive" for task in tasks)
    images = tables.rows + sum(named_as_image(entry.path) for entry in listing.entries)
    return Plan(
        tasks=tuple(tasks),
        refused=tuple(refused),
        others=others,
        name_lists=tuple(tables.name_lists),
        extras=tables.joined(uri, listing, fit),
        labelled=bool(keys),
        images=0 if archives else images,
    )


def _each(entries: Sequence[Entry]) -> Iterator[tuple[str, Entry]]:
    return ((entry.path, entry) for entry in entries)


def _by_label(entries: Sequence[Entry], label_files: LabelFiles) -> Iterator[tuple[str, Entry]]:
    """The entries with a name for the label each one has; those of one label follow each other,
    and its files come first.
    """
    keys = {label_files.key(entry.path) for entry in entries} - {None}
    groups: dict[str, tuple[list[Entry], list[Entry]]] = {}
    for entry in entries:
        own = label_files.key(entry.path)
        key = own if own is not None else next((n for n in names_of(entry.path) if n in keys), None)
        name = f"label {key}" if key is not None else f"file {entry.path}"
        groups.setdefault(name, ([], []))[own is None].append(entry)
    for name, (labels, others) in groups.items():
        yield from ((name, entry) for entry in (*labels, *others))


class _Tables:
    """The parquet files of a listing: tasks, and what is wrong with the others."""

    def __init__(self, uri: str, listing: Listing, reading: Reading) -> None:
        self.labels = reading.labels
        self.tasks: list[Task] = []
        self.refused: list[Refused] = []
        self.others: list[Other] = []
        self.name_lists: list[tuple[str, ...]] = []
        self.schemas: list[pa.Schema] = []
        self.kept: list[tuple[Entry, list[tuple[str, pa.Field]]]] = []  # columns of each schema
        self.rows = 0
        self.useless: DataError | None = None  # of the first file that has no images
        fs, _ = resolve_uri(listing.uri)
        entries = [entry for entry in listing.entries if is_table(entry.path)]
        with ThreadPoolExecutor(8) as pool:  # remote footers are a round trip each
            footers = list(pool.map(lambda e: _footer(fs, inside(listing.root, e.path)), entries))
        for entry, footer in zip(entries, footers, strict=True):
            if isinstance(footer, str):
                self.refused.append(Refused(readable(entry.path), "undecodable", footer))
                continue
            own = is_ours(footer[0])
            folder = entry.path.rpartition("/")[0]
            if own and folder not in listing.packed and not listing.chosen:
                raise DataError(
                    f"{public_uri(uri)} holds packed shards but no {MANIFEST}: "
                    "packing was not finished",
                    hint="finish that pack first, or name the files as folder/part-*.parquet.",
                )
            named = reading.image_column, reading.label_column
            self._add(entry, footer, own, ("image", "label") if own else named)

    def joined(self, uri: str, listing: Listing, fit: bool) -> pa.Schema:
        """The further columns of all files, of types that hold every value.

        Raises:
            DataError: there is no such type for a column.
        """
        schema, (fs, _) = _join(uri, self.schemas), resolve_uri(listing.uri)
        for entry, kept in self.kept if fit else ():
            place = inside(listing.root, entry.path)
            check_fit(
                readable(entry.path), partial(open_parquet, fs, place, piecewise=True), kept, schema
            )
        return schema

    def _add(
        self,
        entry: Entry,
        footer: tuple[pa.Schema, pq.FileMetaData],
        own: bool,
        columns: tuple[str, str],
    ) -> None:
        schema, meta = footer
        try:
            check_columns(schema, entry.path, columns[0], columns[1] if self.labels else "")
        except DataError as error:
            if columns[0] in schema.names or any(is_image_type(field.type) for field in schema):
                raise
            self.useless = self.useless or error
            detail = "a table without a column of encoded images"
            self.others.append(Other(readable(entry.path), "no_image", detail))
            return
        kept = extra_fields(schema, *columns, own=own)
        self.schemas.append(pa.schema([field for _, field in kept]))
        self.kept.append((entry, kept))
        names = class_names_of(schema, columns[1]) if self.labels else ()
        if names and names not in self.name_lists:
            self.name_lists.append(names)
        index = self.name_lists.index(names) if names else -1
        self.rows += meta.num_rows
        for groups in _row_group_runs(meta):
            self.tasks.append(Task("parquet", (entry.path,), groups, index, own))


def _footer(fs: pafs.FileSystem, path: str) -> tuple[pa.Schema, pq.FileMetaData] | str:
    try:
        with open_patiently(fs, path) as file, pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            names = schema.names
            return (schema, parquet.metadata) if names else "a table without columns"
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"not a readable parquet file: {said}"[:200]


def _row_group_runs(meta: pq.FileMetaData) -> Iterator[tuple[int, ...]]:
    groups: list[int] = []
    size = 0
    for group in range(meta.num_row_groups):
        groups.append(group)
        size += meta.row_group(group).total_byte_size
        if size >= TASK_BYTES:
            yield tuple(groups)
            groups, size = [], 0
    if groups:
        yield tuple(groups)


def extra_fields(
    schema: pa.Schema, image_column: str, label_column: str, *, own: bool
) -> list[tuple[str, pa.Field]]:
    """Columns of a source file that are kept: (name there, field in the shards).

    A foreign column with a name of ours (`width`, `source`, ...) is kept as `original_<name>`.
    """
    kept = []
    for field in schema:
        taken = field.name in IMAGE_SHARD_SCHEMA.names
        if field.name in (image_column, label_column) or (own and taken):
            continue
        name = f"original_{field.name}" if taken else field.name
        kept.append((field.name, field.with_name(name).with_nullable(True).remove_metadata()))
    return kept


def _join(uri: str, schemas: Sequence[pa.Schema]) -> pa.Schema:
    try:
        joined = pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the parquet files under {public_uri(uri)} disagree: {str(error).splitlines()[0]}",
            hint="pack them apart, or give the column one type.",
        ) from error
    return pa.schema(sorted(joined, key=lambda field: str(field.name)))
