"""The manifest of a packed set: what it says, and whether its files agree with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.images.value_range import ValueRange, from_json, shown
from pipeline.shards.classes import canonical
from pipeline.shards.columns import (
    MANIFEST,
    SCHEMA_VERSION,
    class_names_of,
    is_ours,
    value_range_of,
)
from pipeline.shards.shard_set import (
    ShardFile,
    ShardSet,
    column_chunks,
    open_parquet,
    row_group_rows,
)
from pipeline.storage.places import public_uri

CHECKED = 1000  # files of a set whose footers are compared with its manifest, evenly spaced
REMEMBERED = 64  # comparisons that are not made again
_compared: dict[bytes, bool] = {}


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
        there = sizes.get(f"{path}/{name}")
        if there != size:
            state = "is missing" if there is None else f"has {there} bytes instead of {size}"
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


def check_footers(
    fs: pafs.FileSystem,
    shards: ShardSet,
    manifest: dict[str, Any],
    infos: Sequence[pafs.FileInfo],
) -> None:
    """Compare a manifest with the files themselves, once for a state of both.

    Raises:
        DataError: rows, row groups, labels, class names or the range of a file are others.
    """
    state = [shards.uri, manifest, [[info.path, info.size, info.mtime_ns] for info in infos]]
    key = hashlib.blake2b(json.dumps(state).encode()).digest()
    if key in _compared:
        return
    step = max(1, -(-len(shards.files) // CHECKED))
    files = shards.files[::step]

    def check(file: ShardFile) -> int | None:
        """How many labels the file has, if its footer tells."""
        with open_parquet(fs, file.path) as parquet:
            meta, schema = parquet.metadata, parquet.schema_arrow
        groups = row_group_rows(meta)
        if groups != file.row_groups:
            said, there = (_shown(rows) for rows in (file.row_groups, groups))
            raise _edited(shards.uri, f"{file.name} has row groups of {there} images, not {said}")
        if not is_ours(schema):
            raise _edited(shards.uri, f"{file.name} is no shard of this project")
        if (names := canonical(class_names_of(schema))) != shards.class_names:
            said, there = _shown(shards.class_names), _shown(names)
            raise _edited(shards.uri, f"{file.name} has the classes {there}, not {said}")
        if (mapped := value_range_of(schema)) != shards.value_range:
            said, there = (shown(r) if r else "nothing" for r in (shards.value_range, mapped))
            raise _edited(shards.uri, f"value_range is {said}, {file.name} has {there}")
        return _values(meta, "label")

    with ThreadPoolExecutor(8) as pool:  # footers of remote files are a round trip each
        labels = list(pool.map(check, files))
    known = [count for count in labels if count is not None]
    if step == 1 and len(known) == len(labels) and sum(known) != manifest["labelled"]:
        raise _edited(
            shards.uri, f"labelled is {manifest['labelled']}, its files have {sum(known)} labels"
        )
    while len(_compared) >= REMEMBERED:
        _compared.pop(next(iter(_compared)))
    _compared[key] = True


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:6])) + (", …" if len(values) > 6 else "")


def _values(meta: pq.FileMetaData, column: str) -> int | None:
    """How many values of a column are not null, by the footer; None where it does not say."""
    total = 0
    for chunk in column_chunks(meta, column):
        if chunk.statistics is None or not chunk.statistics.has_null_count:
            return None
        total += chunk.num_values - chunk.statistics.null_count
    return total
