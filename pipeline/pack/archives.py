"""Images inside archives: tar, plain or compressed, and zip. Nothing is unpacked to disk.

Archives of strangers may be bombs, so what comes out of one is limited, by its own size and by the
largest image that is read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from pipeline.errors import StorageError
from pipeline.images.kinds import HEAD, begins_like_an_image, is_zip, named_as_image
from pipeline.pack.listing import Other, Refused, left_out, readable
from pipeline.pack.source_places import inside
from pipeline.pack.tar import DamagedTarError, Member, Tar
from pipeline.storage.transfer import open_patiently

EXPANSION = 200  # times its size that may come out of an archive, beside ...
ALLOWANCE = 2**30  # ... so many bytes: images hardly shrink, members that are passed over may
_XZ_MEMORY = 2**29  # the decoder of xz takes as much as the file asks for, up to 4 GiB
_PIECE = 2**18
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"\x5d\0\0": "xz",
          b"\x28\xb5\x2f\xfd": "zstd"}  # fmt: skip
# What bad bytes make of the decompressors and of zipfile
DAMAGE = (
    *(DamagedTarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, pa.ArrowException),
    *(OSError, ValueError, EOFError, RuntimeError, NotImplementedError, struct.error, MemoryError),
)


@dataclass(frozen=True)
class Content:
    """A file inside an archive: where it is, what it holds."""

    source: str
    encoded: bytes
    folder: str | None


def read_archive(
    fs: pafs.FileSystem, root: str, path: str, max_bytes: int
) -> Iterator[Content | Refused | Other]:
    """Each file inside an archive, in the order of the archive; one row for what is wrong with it.

    Raises:
        StorageError: remote storage failed after all tries. That says nothing about the archive.
    """
    files = 0
    try:
        with open_patiently(fs, inside(root, path)) as file:
            for item in (_zip if is_zip(path) else _tar)(file, readable(path), max_bytes):
                yield item
                files += 1
    except StorageError:
        raise
    except (FileNotFoundError, PermissionError) as error:
        yield Refused(readable(path), "unreadable", f"the archive cannot be opened: {error}"[:200])
    except DAMAGE as error:
        cut = isinstance(error, EOFError) or "unexpected end" in str(error)
        detail = f"the archive breaks off after {files} files: {error or type(error).__name__}"
        yield Refused(readable(path), "truncated" if cut else "undecodable", detail[:200])


def member_refused(path: str, name: str, kind: str, detail: str) -> Refused | Other | None:
    """What cannot be an image by its place or kind, inside any archive."""
    source = f"{path}/{readable(name)}"
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        return left_out(source, "outside", "the path leads out of the archive")
    if any(part.startswith(".") for part in place.parts):
        return Other(source, "hidden", "hidden: a dot in front")
    if kind == "link":
        return left_out(source, "link", f"link to {detail}"[:200])
    if kind == "sparse":
        return left_out(source, "undecodable", "a sparse file: pack it without --sparse")
    return None if kind == "file" else left_out(source, "not_an_image", "not a regular file")


def too_large(source: str, size: int, most: int, head: bytes) -> Refused | Other:
    """A file that is not read, by its name and first bytes."""
    detail = f"{size} bytes, at most {most} are read"
    if named_as_image(source) or begins_like_an_image(head):
        return Refused(source, "too_large", detail)
    return left_out(source, "too_large", detail)


def _content(path: str, name: str, encoded: bytes) -> Content:
    folder = PurePosixPath(name).parent.name
    return Content(f"{path}/{readable(name)}", encoded, readable(folder) if folder else None)


def _tar(file: Any, path: str, max_bytes: int) -> Iterator[Content | Refused | Other]:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    kind = next((kind for begin, kind in _MAGIC.items() if magic.startswith(begin)), "")
    stream = _decompressed(file, kind) if kind else file
    archive = Tar(stream, EXPANSION * size + ALLOWANCE if kind else None)
    for member in archive:
        if member.kind == "folder":
            continue
        refused = member_refused(path, member.name, member.kind, readable(member.link))
        if refused is not None:
            yield refused
        elif member.size > max_bytes:
            head = archive.read(Member(member.name, "file", HEAD))
            yield too_large(f"{path}/{readable(member.name)}", member.size, max_bytes, head)
        else:
            yield _content(path, member.name, archive.read(member))


def _decompressed(file: Any, kind: str) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    if kind == "bz2":
        return bz2.BZ2File(file)
    if kind == "zstd":
        stream = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
        return io.BufferedReader(_Raw(stream), _PIECE)
    return io.BufferedReader(_Xz(file), _PIECE)


class _Raw(io.RawIOBase):
    """A stream of pyarrow's as Python has them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)


class _Xz(io.RawIOBase):
    """`lzma.LZMAFile` with a limit of memory."""

    def __init__(self, file: Any) -> None:
        self._file, self._decoder = file, self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder.eof:
                more = self._decoder.unused_data or self._file.read(_PIECE)
                while more and not more.strip(b"\0"):  # padding after a stream
                    more = self._file.read(_PIECE)
                if not more:
                    return 0
                self._decoder = self._new()
            elif self._decoder.needs_input:
                more = self._file.read(_PIECE)
                if not more:
                    raise EOFError("the compressed data ends before its end mark")
            else:
                more = b""
            part = self._decoder.decompress(more, len(buffer))
            if part:
                buffer[: len(part)] = part
                return len(part)


def _zip(file: Any, path: str, max_bytes: int) -> Iterator[Content | Refused | Other]:
    size = file.seek(0, io.SEEK_END)
    left = EXPANSION * size + ALLOWANCE
    with zipfile.ZipFile(file) as archive:
        end = 0  # of the data of the last member
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            mode = info.external_attr >> 16
            kind = "link" if stat.S_ISLNK(mode) else "file"
            source = f"{path}/{readable(info.filename)}"
            refused = member_refused(path, info.filename, kind, "a file inside or outside")
            if refused is not None:
                yield refused
                continue
            if info.header_offset < end:  # one piece of data under many names makes a bomb
                yield left_out(source, "undecodable", "it lies inside another file of the archive")
                continue
            end = info.header_offset + info.compress_size
            yield _zip_member(archive, info, source, path, max(0, min(max_bytes, left)))
            left -= min(info.file_size, max_bytes)


def _zip_member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: str, path: str, most: int
) -> Content | Refused | Other:
    try:
        with archive.open(info) as member:
            if info.file_size > most:
                return too_large(source, info.file_size, most, member.read(HEAD))
            encoded = member.read(most + 1)
    except StorageError:
        raise
    except DAMAGE as error:
        encrypted = info.flag_bits & 1
        detail = "encrypted" if encrypted else f"{error or type(error).__name__}"[:200]
        return left_out(source, "undecodable", detail)
    if len(encoded) != info.file_size:
        return left_out(source, "undecodable", f"{len(encoded)} of {info.file_size} bytes")
    return _content(path, info.filename, encoded)
