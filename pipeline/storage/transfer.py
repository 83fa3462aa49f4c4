"""Bytes in and out of storage: every read tried again where it may help, every write whole or not.

On an object store a file becomes visible when its upload is complete, so nothing needs a temporary
name there. It must not be cut short, though: closing a stream of pyarrow's completes the upload,
whatever the reason for closing. So files are made on the local disk and then uploaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from pipeline.errors import DataError, StorageError
from pipeline.storage.places import OBJECT_STORES, keep_pickles_closed, make_folder, resolve_uri
from pipeline.storage.retry import with_retries
from pipeline.uri import Place, is_uri

BLOCK = 16 * 2**20
UPLOADING = 256 * 2**20  # bytes of one upload in memory at once
WRITE_TRIES = 4  # of a whole file, where each part of it was tried several times (storage.py)
BUFFER = 4 * 2**20  # of a remote file that is read from front to end


def read_bytes(fs: pafs.FileSystem, path: str) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the storage failed, or refused.
    """
    keep_pickles_closed()  # the bytes may be those of a table

    def read() -> bytes:
        with fs.open_input_file(path) as file:
            content: bytes = file.read()
        return content

    return with_retries(f"reading {path}", read)


def read_json(fs: pafs.FileSystem, path: str) -> Any:
    """The value in a JSON file; None where there is no such file.

    Raises:
        DataError: it holds something else than JSON.
    """
    try:
        return json.loads(read_bytes(fs, path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} holds no JSON ({str(error).partition(chr(10))[0][:100]})",
            hint="it was changed or damaged: put it back from a copy, or delete it.",
        ) from error


def read_mark(fs: pafs.FileSystem, path: str) -> dict[str, Any]:
    """What a mark of ours says; nothing where it is not there, or not whole.

    Raises:
        StorageError: the storage failed, or refused.
    """
    try:
        content = read_json(fs, path)
    except StorageError:
        raise
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


class _Patient(io.RawIOBase):
    """A remote file whose every read is tried again where it fails."""

    def __init__(self, fs: pafs.FileSystem, path: str) -> None:
        self.path, self.at = path, 0
        self.file = with_retries(f"reading {path}", lambda: fs.open_input_file(path))
        self.bytes = int(self.file.size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.bytes}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self.bytes - self.at))
        if not size:
            return 0
        read = with_retries(f"reading {self.path}", lambda: self.file.read_at(size, self.at))
        buffer[: len(read)] = read
        self.at += len(read)
        return len(read)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def open_patiently(fs: pafs.FileSystem, path: str) -> Any:
    """Open a file that the caller reads in parts.

    Python opens local files, as it takes names that are no UTF-8. Of a remote file, a read that
    fails is tried again.
    """
    if isinstance(fs, pafs.LocalFileSystem):
        return Path(path).open("rb")
    return io.BufferedReader(_Patient(fs, path), BUFFER)


@contextmanager
def atomic_path(fs: pafs.FileSystem, path: str) -> Iterator[str]:
    """Give a path on the local disk; what is written there gets the name `path` at the end, whole.

    On an error nothing is left. For a remote file system the disk of `TMPDIR` needs the space.
    """
    if not isinstance(fs, pafs.LocalFileSystem):
        with tempfile.TemporaryDirectory(prefix="raydino-") as temporary:
            local = Path(temporary) / "file"
            yield str(local)
            upload(local, fs, path)
        return
    folder, _, name = path.rpartition("/")
    Path(folder or "/").mkdir(parents=True, exist_ok=True)
    # The leading dot keeps a file that a kill left behind out of every listing of ours.
    beside = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield beside
        with Path(beside).open("rb") as written:
            os.fsync(written.fileno())
        fs.move(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def upload(local: Path, fs: pafs.FileSystem, path: str, size: int | None = None) -> None:
    """Copies a local file, or its first `size` bytes, to a remote one that is there whole or not.

    Raises:
        StorageError: the storage failed, or refused; what had the name before still has it.
    """
    total = local.stat().st_size if size is None else size
    with_retries(f"writing {path}", lambda: _send(local, total, fs, path), WRITE_TRIES)


def _send(local: Path, total: int, fs: pafs.FileSystem, path: str) -> None:
    direct = fs.type_name in OBJECT_STORES
    folder, _, name = path.rpartition("/")
    place = path if direct else f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    make_folder(fs, folder or "/")
    with local.open("rb") as source:
        stream = getattr(fs, "writer", fs).open_output_stream(place)
        sent, ours = 0, True  # ours: what goes wrong now is not the stream's doing
        try:
            while sent < total:
                block = source.read(min(BLOCK, total - sent))
                if not block:
                    raise EOFError(f"{local} became shorter while it was uploaded")
                ours = False
                stream.write(block)
                sent += len(block)
                if sent % UPLOADING < BLOCK:
                    stream.flush()  # waits: what waits to be sent is in memory
                ours = True
            ours = False
            stream.close()
        except BaseException as error:
            # A stream that failed by itself completes nothing; any other one does, when closed.
            with contextlib.suppress(OSError):
                stream.close()
                if ours or not direct or not isinstance(error, OSError):
                    fs.delete_file(place)
            raise
    if not direct:
        fs.move(place, path)


def write_bytes_atomic(content: bytes, fs: pafs.FileSystem, path: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    with atomic_path(fs, path) as temporary:
        Path(temporary).write_bytes(content)


@contextmanager
def local_copy(place: Place) -> Iterator[Path]:
    """A local file with the content of a place: itself, or a copy that is gone afterwards."""
    if not is_uri(place):
        yield Path(place)
        return
    fs, path = resolve_uri(str(place))
    with tempfile.TemporaryDirectory(prefix="raydino-") as folder:
        copy = Path(folder) / path.rpartition("/")[2]
        download(fs, path, copy)
        yield copy


def download(fs: pafs.FileSystem, path: str, local: Path) -> None:
    """Copies a remote file to a local one, each block tried again where it fails.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the storage failed, or refused.
    """
    with open_patiently(fs, path) as source, local.open("wb") as target:
        shutil.copyfileobj(source, target, BLOCK)


@contextmanager
def parquet_writer_atomic(
    schema: pa.Schema, fs: pafs.FileSystem, path: str
) -> Iterator[pq.ParquetWriter]:
    """A parquet writer whose file is there whole at the end, or not at all.

    Columns of encoded images are not compressed a second time. The bytes depend on what is written
    and on the pyarrow version only.
    """
    images = {field.name for field in schema if pa.types.is_binary(field.type)}
    with (
        atomic_path(fs, path) as temporary,
        pq.ParquetWriter(
            temporary,
            schema,
            filesystem=pafs.LocalFileSystem(),
            compression={name: "none" if name in images else "zstd" for name in schema.names},
            use_dictionary=[name for name in ("format", "label") if name in schema.names],
            # Statistics of image bytes would copy two whole images to the footer.
            write_statistics=[name for name in schema.names if name not in images],
        ) as writer,
    ):
        yield writer


def write_parquet_atomic(
    table: pa.Table, fs: pafs.FileSystem, path: str, row_group_size: int
) -> None:
    """Write a parquet file so that it is there whole or not at all; `row_group_size` in rows."""
    with parquet_writer_atomic(table.schema, fs, path) as writer:
        writer.write_table(table, row_group_size=row_group_size)
