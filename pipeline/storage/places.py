"""Opens and lists places, local paths and pyarrow URIs alike. `transfer` moves the bytes."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.images.kinds import is_table
from pipeline.storage.retry import retries, with_retries
from pipeline.uri import is_uri
from pipeline.uri import public as public_uri

__all__ = [
    "absolute_uri",
    "delete_file",
    "exists",
    "file_info",
    "keep_pickles_closed",
    "list_files",
    "list_parquet",
    "make_folder",
    "public_uri",
    "resolve_uri",
    "retries",
    "with_retries",
]

OBJECT_STORES = ("s3", "gcs", "abfs")  # an upload that is not complete cannot be seen
CONNECT_S, ANSWER_S = 5.0, 30.0  # until a request counts as failed
PART_TRIES = 4  # of one part of an upload, by the client; the whole upload is tried again by us


def absolute_uri(uri: str) -> str:
    """The same place by a name that holds in any process: a local path is made absolute.

    Raises:
        DataError: it begins with the home of somebody who has none.
    """
    if is_uri(uri):
        return uri
    try:
        return str(Path(os.path.expandvars(uri)).expanduser().absolute())
    except RuntimeError:
        raise DataError(
            f"{uri} begins with ~, and this user has no home, or there is no such user",
            "give the whole path",
        ) from None


class _S3(pafs.S3FileSystem):  # type: ignore[misc]
    """S3 without the client's own retries, which nobody counts; uploads go by `writer`."""

    writer: pafs.FileSystem


def _s3(plain: pafs.S3FileSystem) -> _S3:
    _, (options,) = plain.__reduce__()  # what pyarrow read from the URI and the environment
    options = {**options, "connect_timeout": CONNECT_S, "request_timeout": ANSWER_S}
    once, several = (
        pafs.AwsStandardS3RetryStrategy(max_attempts=tries) for tries in (1, PART_TRIES)
    )
    filesystem = _S3(**options, retry_strategy=once)
    # A failed part alone is sent again, not the whole file.
    filesystem.writer = pafs.S3FileSystem(**options, retry_strategy=several)
    return filesystem


@functools.lru_cache(maxsize=64)  # an S3 client asks for the region of its bucket when made
def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if not is_uri(uri):
        return pafs.LocalFileSystem(), uri
    shown = public_uri(uri)
    try:
        filesystem, path = with_retries(
            f"opening {shown}", lambda: pafs.FileSystem.from_uri(uri), tries=3
        )
    except DataError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        said = str(error).splitlines()[0].replace(uri, shown)
        raise DataError(
            f"cannot open {shown}: {said}",
            hint="use a local path or a URI that pyarrow reads, such as s3://bucket/folder.",
        ) from error
    if filesystem.type_name == "s3":
        filesystem = _s3(filesystem)
    return filesystem, path.rstrip("/") or "/"


def resolve_uri(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system of a local path or URI, and the path in it.

    Raises:
        DataError: the URI names a scheme or bucket that cannot be opened.
    """
    keep_pickles_closed()
    return _filesystem(absolute_uri(str(uri)))


def keep_pickles_closed() -> None:
    """Makes a column of pickled Python objects a column of bytes, as it is without Ray Data, which
    registers a type of arrow's whose values are unpickled when they are read. None of ours has it.
    """
    with contextlib.suppress(pa.ArrowKeyError):  # it is not registered
        pa.unregister_extension_type("ray.data.arrow_pickled_object")


def file_info(fs: pafs.FileSystem, path: str, tries: int | None = None) -> pafs.FileInfo:
    """What is at a path: type, size, time of the last change."""
    return with_retries(f"looking up {path}", lambda: fs.get_file_info(path), tries)


def exists(fs: pafs.FileSystem, path: str) -> bool:
    """Whether there is a file or a folder at a path."""
    return bool(file_info(fs, path).type != pafs.FileType.NotFound)


def list_files(
    fs: pafs.FileSystem,
    path: str,
    *,
    recursive: bool = True,
    missing: bool = True,
    folders: bool = False,
) -> list[pafs.FileInfo]:
    """The files under a folder, and its folders where they are asked for; none where there is no
    such folder and `missing` allows that.
    """
    selector = pafs.FileSelector(path, recursive=recursive, allow_not_found=missing)
    infos = with_retries(f"listing {path}", lambda: fs.get_file_info(selector))
    kinds = (pafs.FileType.File, *[pafs.FileType.Directory] * folders)
    return [info for info in infos if info.type in kinds]


def list_parquet(
    fs: pafs.FileSystem, path: str, uri: str, field: str = "data.shards"
) -> list[pafs.FileInfo]:
    """The parquet files at a path, sorted; hidden files and folders are left out.

    Args:
        fs: where the path is.
        path: in that file system.
        uri: of the path, as it was given.
        field: of the config that named it.

    Raises:
        DataError: there is no such path or no parquet file in it.
    """
    folder, _, pattern = path.rpartition("/")
    if "*" in pattern:
        infos = _files(fs, folder, uri, field, recursive=False)
        tables = [i for i in infos if fnmatch.fnmatchcase(i.base_name, pattern)]
        root = folder
    else:
        infos = _files(fs, path, uri, field, recursive=True)
        tables = [i for i in infos if is_table(i.base_name) or i.path == path]
        root = path
    tables = [i for i in tables if not _hidden(i.path[len(root) :])]
    if not tables:
        raise DataError(
            f"no parquet files under {public_uri(uri)}",
            hint=f"pack a folder of images first: python jobs/pack.py "
            f"data.source={public_uri(uri)} data.shards=shards/",
        )
    return sorted(tables, key=lambda info: str(info.path))


def _files(
    fs: pafs.FileSystem, path: str, uri: str, field: str, *, recursive: bool
) -> list[pafs.FileInfo]:
    try:
        info = file_info(fs, path, tries=3)
        if info.type == pafs.FileType.Directory:
            infos = list_files(fs, path, recursive=recursive)
            # A name is decoded when it is asked for.
            return infos if all(item.path for item in infos) else []
    except StorageError:
        raise
    except (OSError, ValueError) as error:  # no right to look; names that are too long, or no UTF-8
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot list {public_uri(uri)}: {said}"[:400],
            hint=f"check the rights, links and names of files in {field} (and the mount).",
        ) from error
    if info.type == pafs.FileType.NotFound:
        raise DataError(
            f"no such path: {public_uri(uri)}",
            hint=f"check this path, which is {field} (and the mount).",
        )
    return [info]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def make_folder(fs: pafs.FileSystem, path: str) -> None:
    """Makes a folder, where there are such things; an object store needs none."""
    if fs.type_name not in OBJECT_STORES:
        fs.create_dir(path, recursive=True)


def delete_file(fs: pafs.FileSystem, path: str) -> None:
    """Deletes a file; one that is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        with_retries(f"deleting {path}", lambda: fs.delete_file(path))
