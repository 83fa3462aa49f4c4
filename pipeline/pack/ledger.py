"""What a pack has done, on storage: accounts of finished tasks, the manifest, the last report.

The scratch folder holds `plan.json` (the key of the pack under way), `runs/` and `shards/`
(accounts of finished tasks), and `duplicates/`. When the pack is finished, it holds only
`report.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.value_range import FULL, ValueRange, from_json
from pipeline.pack.bad_files import PackReport
from pipeline.pack.listing import Listing
from pipeline.pack.merge import ROW_GROUP_BYTES, shard_name
from pipeline.pack.sorted_runs import PackSpec
from pipeline.shards.columns import MANIFEST, SCHEMA_VERSION, is_ours
from pipeline.shards.shards import open_shards
from pipeline.storage.claim import ClaimedFolder
from pipeline.storage.places import (
    delete_file,
    file_info,
    list_files,
    make_folder,
    public_uri,
    resolve_uri,
)
from pipeline.storage.transfer import (
    open_patiently,
    read_json,
    read_mark,
    write_bytes_atomic,
)

_PART = re.compile(r"part-\d{5,}\.parquet")
_INTERMEDIATE = re.compile(
    r"(task-\d{6,}\.json|task-\d{6,}-\d{4,}\.(bin|parquet)|shard-\d{6,}\.(json|parquet))"
    r"|\.(task|shard)-[\d-]+\.(json|bin|parquet)\.[0-9a-f]{8}\.tmp"
)
_LEFTOVER = re.compile(r"\.(part-\d{5,}\.parquet|_manifest\.json)\.[0-9a-f]{8}\.tmp")


def key_of(listing: Listing, arguments: Sequence[Any]) -> str:
    """A digest of the source's files (names, sizes, times) and of the arguments."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([SCHEMA_VERSION, ROW_GROUP_BYTES, *arguments]).encode())
    for entry in listing.entries:
        digest.update(os.fsencode(entry.path) + b"\0%d\0%d\n" % (entry.size, entry.stamp))
    for item in listing.refused:
        digest.update(f"{item.source}\0{item.reason}\n".encode())
    return digest.hexdigest()


def _write_json(value: Any, fs: pafs.FileSystem, path: str) -> None:
    write_bytes_atomic(json.dumps(value, indent=1, ensure_ascii=False).encode(), fs, path)


def finished(scratch: str, key: str, shards: str) -> PackReport | None:
    """The report of the same pack, if it was finished and its shards are still there."""
    fs, folder = resolve_uri(scratch)
    stored = read_mark(fs, f"{folder}/report.json")
    if stored.get("key") != key:
        return None
    try:
        report = stored["report"]
        last = PackReport(
            **report
            | {"class_names": tuple(report["class_names"])}
            | {
                "value_range": from_json(report.get("value_range")) or FULL,
                "used_range": from_json(report.get("used_range")),
            }
        )
        return last if open_shards(shards).digest == last.digest else None
    except StorageError:
        raise
    except (DataError, KeyError, TypeError):  # shards or report are not what was written
        return None


def report_of(scratch: str) -> dict[str, Any]:
    """What the last finished pack with this folder said, as JSON has it; empty where none did."""
    stored = read_mark(*resolve_uri(f"{scratch}/report.json")).get("report", {})
    return stored if isinstance(stored, dict) else {}


def unfinished(shards: str) -> bool:
    """Whether a folder has shards and no manifest."""
    fs, folder = resolve_uri(shards)
    names = {info.base_name for info in list_files(fs, folder, recursive=False)}
    return MANIFEST not in names and any(map(_PART.fullmatch, names))


def start(scratch: str, key: str, form: int, source: str, claim: ClaimedFolder) -> list[str]:
    """Make the folders ready: kept where the same pack is under way, emptied of ours otherwise.

    Args:
        scratch: folder of the intermediate files.
        key: of the pack.
        form: of the intermediate files; those of another form are not gone on with.
        source: as it stands in the manifest.
        claim: the folder of the shards.

    Returns:
        Shards that are there, of which `drop` takes away those that are not written again.

    Raises:
        DataError: the output folder holds shards of another source, or parquet files of others.
    """
    fs, folder = resolve_uri(scratch)
    under_way = f"{key}.{form}"
    goes_on = read_mark(fs, f"{folder}/plan.json").get("key") == under_way
    finished_before = read_mark(fs, f"{folder}/report.json").get("key") == key
    old = replaceable(claim, public_uri(source), own=goes_on or finished_before)
    claim.begun = True
    if goes_on:
        return old
    for path in old:
        delete_file(claim.fs, path)
    _clean(fs, folder)
    for name in ("runs", "shards"):
        make_folder(fs, f"{folder}/{name}")
    _write_json({"key": under_way}, fs, f"{folder}/plan.json")
    return []


def drop(claim: ClaimedFolder, stale: Sequence[str], written: Sequence[dict[str, Any]]) -> None:
    """Deletes the old shards whose names were not written again."""
    names = {account["name"] for account in written if account["rows"]}
    for path in stale:
        if path.rpartition("/")[2] not in names:
            delete_file(claim.fs, path)


def replaceable(claim: ClaimedFolder, source: str, *, own: bool) -> list[str]:
    """The old shards in a folder that may go; the manifest that lists them is taken away.

    Args:
        claim: the folder.
        source: as it stands in the manifest.
        own: these very shards were being written, or were finished, by who asks.

    Raises:
        DataError: the folder holds shards of another source, or parquet files of others.
    """
    parts = check_replaceable(claim.uri, source, own=own or claim.inherited, look=True)
    manifest = f"{claim.folder}/{MANIFEST}"
    if file_info(claim.fs, manifest).is_file:
        claim.check()
        # first, so that a half emptied folder is none that is whole
        delete_file(claim.fs, manifest)
    return parts


def check_replaceable(uri: str, source: str, *, own: bool, look: bool = False) -> list[str]:
    """The old shards in a folder that may go. Nothing is changed.

    Args:
        uri: of the folder.
        source: as it stands in the manifest.
        own: unfinished shards in it are of who asks.
        look: opens also the files that are known: whether this project wrote them.

    Raises:
        DataError: the folder holds shards of another source, or parquet files of others.
    """
    fs, folder = resolve_uri(uri)
    shown = public_uri(uri)
    manifest = check_source(uri, source)
    listed = {entry.get("name") for entry in (manifest or {}).get("files", [])}
    parts = [i for i in list_files(fs, folder, recursive=False) if _PART.fullmatch(i.base_name)]
    for info in parts:
        known = own or info.base_name in listed
        if known and not look:
            continue
        with open_patiently(fs, info.path) as file:
            try:
                written_here = is_ours(pq.ParquetFile(file).schema_arrow)
            except pa.ArrowInvalid:  # cut short, and listed
                written_here = known
        if not written_here:
            raise DataError(
                f"{shown} holds {info.base_name}, which this project did not write",
                hint="choose another folder.",
            )
        if not known:
            raise DataError(
                f"{shown} holds {info.base_name}, and no manifest says whose shard that is",
                hint="choose another folder, or delete that file first if nobody needs it.",
            )
    return [str(info.path) for info in parts]


def begun(scratch: str) -> bool:
    """Whether a pack with this folder of intermediate files was begun, or finished."""
    fs, folder = resolve_uri(scratch)
    return any(read_mark(fs, f"{folder}/{name}.json") for name in ("plan", "report"))


def check_source(shards: str, source: str) -> Any:
    """The manifest of a folder, where there is one.

    Raises:
        DataError: it is of shards of another source.
    """
    fs, folder = resolve_uri(shards)
    manifest = read_json(fs, f"{folder}/{MANIFEST}")
    if manifest is not None:
        theirs = manifest.get("source") if isinstance(manifest, dict) else None
        if theirs != source:
            raise DataError(
                f"{public_uri(shards)} holds the shards of {theirs or 'an unknown source'}; these "
                f"would be of {source}",
                hint="choose another folder, or delete that one first.",
            )
    return manifest


def _clean(fs: pafs.FileSystem, folder: str) -> None:
    """Takes away the intermediate files, by their names: nothing else is ever deleted."""
    for name in ("runs", "shards", "duplicates"):
        for info in list_files(fs, f"{folder}/{name}", recursive=False):
            if _INTERMEDIATE.fullmatch(info.base_name):
                delete_file(fs, info.path)
        if isinstance(fs, pafs.LocalFileSystem):
            with contextlib.suppress(OSError):  # a link, or what others have put there
                Path(f"{folder}/{name}").rmdir()
    for name in ("plan.json", "runs.json", "report.json"):
        if file_info(fs, f"{folder}/{name}").type == pafs.FileType.File:
            delete_file(fs, f"{folder}/{name}")


def accounts(
    scratch: str, kind: str, see: Callable[[dict[str, Any]], None] | None = None
) -> dict[int, dict[str, Any]]:
    """Accounts of finished tasks by index; `kind` is "runs" or "shards".

    Args:
        scratch: folder of intermediate files.
        kind: of the tasks.
        see: called with each one when it has been read; may take out what is large.
    """
    fs, folder = resolve_uri(scratch)
    by_index: dict[int, dict[str, Any]] = {}
    for info in list_files(fs, f"{folder}/{kind}", recursive=False):
        account = read_mark(fs, info.path) if info.extension == "json" else {}
        if "index" in account:
            if see is not None:
                see(account)
            by_index[account["index"]] = account
    return by_index


def written(spec: PackSpec) -> dict[int, dict[str, Any]]:
    """Accounts of the shards that are there, with the size their account gives."""
    fs, folder = resolve_uri(spec.shards)
    return {
        index: account
        for index, account in accounts(spec.scratch, "shards").items()
        if not account["rows"]
        or file_info(fs, f"{folder}/{shard_name(index)}").size == account["bytes"]
    }


def write_manifest(
    shards: str,
    source: str,
    class_names: Sequence[str],
    written: Sequence[dict[str, Any]],
    value_range: ValueRange | None = FULL,
    used_range: ValueRange | None = None,
) -> str:
    """Write the manifest, last of all files; returns the digest of ids, labels and class names."""
    fs, folder = resolve_uri(shards)
    digest = hashlib.blake2b(json.dumps([SCHEMA_VERSION, *class_names]).encode(), digest_size=16)
    for account in written:
        digest.update(f"{account['rows']} {account['digest']}\n".encode())
    files = [account for account in written if account["rows"]]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "source": public_uri(source),
        "images": sum(account["rows"] for account in files),
        "labelled": sum(account["labelled"] for account in files),
        "class_names": list(class_names),
        "value_range": value_range,
        "used_range": used_range,
        "digest": digest.hexdigest(),
        "files": [
            {name: account[name] for name in ("name", "rows", "bytes", "row_groups")}
            for account in files
        ],
    }
    _write_json(manifest, fs, f"{folder}/{MANIFEST}")
    return digest.hexdigest()


def finish(scratch: str, key: str, shards: str, report: PackReport) -> None:
    """Keep the report, remove intermediates and what killed tasks left behind."""
    fs, folder = resolve_uri(scratch)
    _clean(fs, folder)
    _write_json({"key": key, "report": dataclasses.asdict(report)}, fs, f"{folder}/report.json")
    fs, folder = resolve_uri(shards)
    for info in list_files(fs, folder, recursive=False):
        if _LEFTOVER.fullmatch(info.base_name):
            delete_file(fs, info.path)
