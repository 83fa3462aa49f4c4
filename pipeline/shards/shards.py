"""Open image shards: packed by this project, or parquet files as a hub stores them.

What a shard is stands in `columns`; `row_group` reads a row group of one.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.value_range import FULL, ValueRange, from_json, shown
from pipeline.shards.classes import canonical, label_kind, label_names
from pipeline.shards.columns import (
    MANIFEST,
    SCHEMA_VERSION,
    check_columns,
    class_names_of,
    is_ours,
    value_range_of,
)
from pipeline.storage.places import absolute_uri, list_parquet, public_uri, resolve_uri
from pipeline.storage.retry import with_retries
from pipeline.storage.transfer import open_patiently, read_json

CHECKED = 1000  # files of a set whose footers are compared with its manifest, evenly spaced
REMEMBERED = 64  # comparisons that are not made again
_compared: dict[bytes, bool] = {}


@dataclass(frozen=True)
class ShardFile:
    """One parquet file: path in its file system, rows, rows of each row group, bytes."""

    path: str
    rows: int
    row_groups: tuple[int, ...]
    bytes: int

    @property
    def name(self) -> str:
        """The file name without its folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class ShardColumns:
    """Where a set's files are and which of their columns are read: all that a read task needs.

    `names` are the classes where the label column holds names and no ids.
    """

    uri: str
    image: str
    label: str
    labels: bool = True  # False: the label column is not looked at
    names: tuple[str, ...] = ()
    value_range: ValueRange = FULL


@dataclass(frozen=True)
class ShardSet:
    """A set of shards as a stage sees it. Small, holds no open file: safe to send to a task."""

    uri: str
    files: tuple[ShardFile, ...]
    rows: int
    class_names: tuple[str, ...]
    packed: bool  # written by this project: unique ids, rows ordered by id over all files
    digest: str
    image_column: str
    label_column: str
    has_labels: bool
    reads_labels: bool = True  # False: the label column is not looked at
    labels_are_names: bool = False  # the label column holds names and no ids
    value_range: ValueRange | None = None  # that its images are decoded with; None: not known
    used_range: ValueRange | None = None  # of values of deep images; None: none, or not known

    @property
    def image_bytes(self) -> float:
        """Mean size of an encoded image, by the sizes of the files."""
        return sum(file.bytes for file in self.files) / max(1, self.rows)

    @property
    def columns(self) -> ShardColumns:
        """The small part of this that a read task needs."""
        names = self.class_names if self.labels_are_names else ()
        return ShardColumns(
            self.uri,
            self.image_column,
            self.label_column,
            self.reads_labels,
            names,
            self.value_range or FULL,
        )

    def parquet(self, file_index: int) -> pq.ParquetFile:
        """Open one file, for a stage that reads other columns than `read_row_group` gives.

        Every read of a remote file is tried again where it fails.
        """
        return open_parquet(resolve_uri(self.uri)[0], self.files[file_index].path, piecewise=True)


def open_shards(
    uri: str,
    image_column: str = "image",
    label_column: str = "label",
    field: str = "data.shards",
    labels: bool = True,
) -> ShardSet:
    """Find the shards at `uri`: a folder (of any depth), one file, or `folder/train-*.parquet`.

    A folder that this project packed is opened by its manifest, which knows the columns and is
    compared with the footers of up to `CHECKED` files; of other files all footers are read, and a
    label column that holds names.

    Args:
        uri: a path or URI.
        image_column: of files that are not packed.
        label_column: likewise, of class ids or class names.
        field: of the config that named the place.
        labels: False: the label column of files of others is not looked at.

    Raises:
        DataError: no such path, no parquet file, packing not finished, a shard missing or cut, no
            image column, or columns of a type that cannot be used.
    """
    uri = absolute_uri(str(uri))
    fs, path = resolve_uri(uri)
    infos = list_parquet(fs, path, uri, field)
    if infos[0].path != path and "*" not in path:
        manifest = read_json(fs, f"{path}/{MANIFEST}")
        if manifest is not None:
            found = shards_of_manifest(uri, path, manifest, infos)
            _check_footers(fs, found, manifest, infos)
            return found
    return _from_footers(
        uri, fs, path, infos, ShardColumns(uri, image_column, label_column, labels)
    )


def shards_of_manifest(
    uri: str, path: str, manifest: dict[str, Any], infos: Sequence[pafs.FileInfo]
) -> ShardSet:
    """The set that a manifest describes.

    Args:
        uri: of the set.
        path: its folder in the file system.
        manifest: what `_manifest.json` holds.
        infos: the files that are there.

    Raises:
        DataError: another schema version, a shard that is missing, too many or of another size, or
            a manifest that was edited.
    """
    if not isinstance(manifest, dict):
        raise _edited(uri, "it holds no object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{public_uri(uri)} has schema version {manifest.get('schema_version')}, "
            f"this code reads {SCHEMA_VERSION}",
            hint="pack the images again, or use the version that wrote them.",
        )
    _check_types(uri, manifest)
    sizes = {info.path: info.size for info in infos}
    listed = {entry["name"] for entry in manifest["files"]}
    for info in infos:
        if info.path.rpartition("/")[0] == path and info.base_name not in listed:
            raise DataError(
                f"{public_uri(uri)} holds {info.base_name}, which its {MANIFEST} does not list",
                hint="take that file away, or pack all of it into a new folder.",
            )
    files = []
    for entry in manifest["files"]:
        name, size = entry["name"], entry["bytes"]
        found = sizes.get(f"{path}/{name}")
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DataError(
                f"shard {name} of {public_uri(uri)} {state}",
                hint="copy the folder again, or pack again: a second run writes what is missing.",
            )
        files.append(
            ShardFile(f"{path}/{name}", entry["rows"], tuple(entry["row_groups"]), int(size))
        )
    return ShardSet(
        uri=uri,
        files=tuple(files),
        rows=sum(file.rows for file in files),
        class_names=canonical(manifest["class_names"]),
        packed=True,
        digest=str(manifest["digest"]),
        image_column="image",
        label_column="label",
        has_labels=manifest["labelled"] > 0,
        value_range=_range(uri, manifest, "value_range"),
        used_range=_range(uri, manifest, "used_range"),
    )


def _range(uri: str, manifest: dict[str, Any], name: str) -> ValueRange | None:
    try:
        return from_json(manifest.get(name), name)
    except DataError as error:
        raise _edited(uri, error.what) from error


def _edited(uri: str, what: str) -> DataError:
    return DataError(
        f"{MANIFEST} of {public_uri(uri)} is not as it was written: {what}",
        hint="put it back from a copy, or delete the folder and pack again.",
    )


def _check_types(uri: str, manifest: dict[str, Any]) -> None:
    """Refuse a manifest that does not hold what `ledger.write_manifest` writes."""
    files, names = manifest.get("files"), manifest.get("class_names")
    if not isinstance(files, list) or not all(isinstance(entry, dict) for entry in files):
        raise _edited(uri, "files is no list of objects")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _edited(uri, "class_names is no list of names")
    if not isinstance(manifest.get("digest"), str):
        raise _edited(uri, "digest is no text")
    seen: set[str] = set()
    for entry in files:
        name, groups = entry.get("name"), entry.get("row_groups")
        if not isinstance(name, str) or not name or "/" in name or name in seen:
            raise _edited(uri, f"the file name {name!r} stands twice or is none")
        seen.add(name)
        if not isinstance(groups, list) or not all(_count(rows, 1) for rows in groups):
            raise _edited(uri, f"row_groups of {name} is no list of rows")
        counted = _count(entry.get("bytes"), 1) and _count(entry.get("rows"), 0)
        if not counted or entry["rows"] != sum(groups):
            raise _edited(uri, f"{name} has {entry.get('rows')} rows and row groups {groups[:8]}")
    rows = sum(entry["rows"] for entry in files)
    if not _count(manifest.get("labelled"), 0) or manifest["labelled"] > rows:
        raise _edited(uri, f"labelled is {manifest.get('labelled')!r} of {rows} images")
    if manifest.get("images", rows) != rows:
        raise _edited(uri, f"images is {manifest['images']!r}, its files have {rows}")


def _count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _check_footers(
    fs: pafs.FileSystem,
    found: ShardSet,
    manifest: dict[str, Any],
    infos: Sequence[pafs.FileInfo],
) -> None:
    """Compare a manifest with the files themselves, once for a state of both.

    Raises:
        DataError: rows, row groups, labels, class names or the range of a file are others.
    """
    state = [found.uri, manifest, [[info.path, info.size, info.mtime_ns] for info in infos]]
    key = hashlib.blake2b(json.dumps(state).encode()).digest()
    if key in _compared:
        return
    step = max(1, -(-len(found.files) // CHECKED))
    files = found.files[::step]

    def check(file: ShardFile) -> int | None:
        """How many labels the file has, if its footer tells."""
        with open_parquet(fs, file.path) as parquet:
            meta, schema = parquet.metadata, parquet.schema_arrow
        groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        if groups != file.row_groups:
            said, there = (_shown(rows) for rows in (file.row_groups, groups))
            raise _edited(found.uri, f"{file.name} has row groups of {there} images, not {said}")
        if not is_ours(schema):
            raise _edited(found.uri, f"{file.name} is no shard of this project")
        if (names := canonical(class_names_of(schema))) != found.class_names:
            said, there = _shown(found.class_names), _shown(names)
            raise _edited(found.uri, f"{file.name} has the classes {there}, not {said}")
        if (mapped := value_range_of(schema)) != found.value_range:
            said, there = (shown(r) if r else "nothing" for r in (found.value_range, mapped))
            raise _edited(found.uri, f"value_range is {said}, {file.name} has {there}")
        return _values(meta, "label")

    with ThreadPoolExecutor(8) as pool:  # footers of remote files are a round trip each
        labels = list(pool.map(check, files))
    known = [count for count in labels if count is not None]
    if step == 1 and len(known) == len(labels) and sum(known) != manifest["labelled"]:
        raise _edited(
            found.uri, f"labelled is {manifest['labelled']}, its files have {sum(known)} labels"
        )
    while len(_compared) >= REMEMBERED:
        _compared.pop(next(iter(_compared)))
    _compared[key] = True


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:6])) + (", …" if len(values) > 6 else "")


def _values(meta: pq.FileMetaData, column: str) -> int | None:
    """How many values of a column are not null, by the footer; None where it does not say."""
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    if column not in paths:
        return 0
    total = 0
    for group in range(meta.num_row_groups):
        chunk = meta.row_group(group).column(paths.index(column))
        stats = chunk.statistics
        if stats is None or not stats.has_null_count:
            return None
        total += chunk.num_values - stats.null_count
    return total


def _from_footers(
    uri: str, fs: pafs.FileSystem, path: str, infos: Sequence[pafs.FileInfo], columns: ShardColumns
) -> ShardSet:
    label = columns.label if columns.labels else ""

    def footer(info: pafs.FileInfo) -> tuple[ShardFile, pa.Schema, bool]:
        with open_parquet(fs, info.path) as parquet:
            meta, schema = parquet.metadata, parquet.schema_arrow
            check_columns(schema, info.base_name, columns.image, label)
            groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
            labelled = label in schema.names and _any_value(meta, label)
        return ShardFile(info.path, meta.num_rows, groups, info.size), schema, labelled

    with ThreadPoolExecutor(8) as pool:  # footers of remote files are a round trip each
        found = list(pool.map(footer, infos))
    ours = [is_ours(schema) for _, schema, _ in found]
    whole = len(infos) > 1 or infos[0].path != path
    if any(ours) and whole and "*" not in path:
        raise DataError(
            f"{public_uri(uri)} holds packed shards but no {MANIFEST}: packing was not finished",
            hint="run the same pack again; it goes on where it stopped.",
        )
    digest = hashlib.blake2b(digest_size=16)
    for file, _, _ in found:
        digest.update(f"{file.name}\0{file.bytes}\0{file.rows}\n".encode())
    labelled = [(file, schema) for file, schema, has in found if has]
    kinds = {label_kind(schema.field(label).type) for _, schema in labelled}
    lists = {() if "names" in kinds else class_names_of(schema, label) for _, schema in labelled}
    if len(lists) > 1 or len(kinds) > 1:
        raise DataError(
            f"the files under {public_uri(uri)} have different class names, or some have names "
            "and others only ids",
            hint="pack them into one set first, which brings names together: python jobs/pack.py "
            f"data.source={public_uri(uri)} data.shards=shards/",
        )
    names = next(iter(lists or {class_names_of(schema, label) for _, schema, _ in found}), ())
    if kinds == {"names"}:
        names = _names_in(uri, label, tuple((file.path, file.bytes) for file, _ in labelled))
    return ShardSet(
        uri=uri,
        files=tuple(file for file, _, _ in found),
        rows=sum(file.rows for file, _, _ in found),
        class_names=names,
        packed=all(ours),
        digest=digest.hexdigest(),
        image_column=columns.image,
        label_column=columns.label,
        has_labels=bool(labelled),
        reads_labels=columns.labels,
        labels_are_names=kinds == {"names"},
        value_range=value_range_of(found[0][1]) if found else None,
    )


@functools.lru_cache(16)
def _names_in(uri: str, label: str, files: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """The names that a label column of names holds, sorted; only that column is read.

    Args:
        uri: of the set.
        label: the column.
        files: path and bytes of each file.
    """
    fs, _ = resolve_uri(uri)

    def distinct(path: str) -> set[str]:
        with open_parquet(fs, path, piecewise=True) as parquet:
            return {
                str(name)
                for batch in parquet.iter_batches(columns=[label])
                for name in label_names(pa.chunked_array([batch.column(0)])).unique().to_pylist()
                if name is not None
            }

    with ThreadPoolExecutor(8) as pool:
        return tuple(sorted(set().union(*pool.map(distinct, [path for path, _ in files]))))


def _any_value(meta: pq.FileMetaData, column: str) -> bool:
    """Whether a column has a value that is neither null nor below 0, by the footer; True where it
    does not say.
    """
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    if column not in paths:
        return False
    for group in range(meta.num_row_groups):
        chunk = meta.row_group(group).column(paths.index(column))
        stats = chunk.statistics
        if stats is None or not stats.has_null_count:
            return True
        below = stats.has_min_max and isinstance(stats.max, int) and stats.max < 0
        if stats.null_count < chunk.num_values and not below:
            return True
    return False


def open_parquet(fs: pafs.FileSystem, path: str, piecewise: bool = False) -> pq.ParquetFile:
    """Open one file.

    Args:
        fs: where it is.
        path: of the file.
        piecewise: each read is tried again where it fails. Without it a reader tries the whole call
            again, which lets Arrow read several columns of a remote file at once.

    Raises:
        DataError: it is not readable as parquet.
    """
    remote = not isinstance(fs, pafs.LocalFileSystem)

    def opened() -> pq.ParquetFile:
        return pq.ParquetFile(
            open_patiently(fs, path) if piecewise and remote else fs.open_input_file(path)
        )

    try:
        return with_retries(f"reading {path}", opened)
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}",
            hint="it may have been cut while it was copied: fetch it again or take it away.",
        ) from error
