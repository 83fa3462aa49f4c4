"""Reads tar archives of strangers: one pass, bounded memory, every step at least one block forward.

Formats: v7, ustar, GNU and pax. Sizes and names are taken as the archive gives them, and held
against what is there. Blocks of zeros end an archive; where another one follows, as in files that
were joined end to end, it is read as well. Sparse members are named, and not read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
_HEADER_RECORD = 2**20  # bytes of one long name or set of pax records
_SKIP = 2**20  # bytes that are passed over at once
_LARGEST = 2**62
_ZEROS = bytes(BLOCK)
_PLAIN = b"0\x007"  # types of regular files; one that nobody knows is taken for one, as POSIX says
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: their size means nothing
_KINDS = {
    **{b"1": "link", b"2": "link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"},
    b"D": "folder",  # GNU: with a list of what is in it
}
_PASSED_OVER = b"gV"  # pax records for all members, none of which we use; the name of a tape


class DamagedTarError(Exception):
    """The archive cannot be read any further."""


@dataclass
class Member:
    """One thing in an archive. `kind`: file, sparse, or what else it is."""

    name: str
    kind: str
    size: int
    link: str = ""


class Tar:
    """The members of an archive, and the content of the one that was given last."""

    def __init__(self, stream: IO[bytes], limit: int | None = None) -> None:
        """Reads a stream from its beginning.

        Args:
            stream: of the archive, not compressed.
            limit: for a stream that cannot seek, as what comes out of a decompressor: bytes after
                which no more is read (`DamagedTarError`).
        """
        self._stream, self._limit = stream, limit
        self._at = 0  # bytes of the stream that are behind us
        self._left = 0  # bytes of the member's data, with its padding, that are before us

    def __iter__(self) -> Iterator[Member]:
        """Members in the order of the archive.

        Raises:
            EOFError: the archive ends before its end mark.
            DamagedTarError: it cannot be read any further.
        """
        ended = False
        while True:
            self._skip(self._left)
            block = self._block()
            if block == _ZEROS:
                ended = True
                continue
            if ended and len(block) < BLOCK and not block.strip(b"\0"):
                return
            if len(block) < BLOCK:
                raise EOFError("no end mark")
            ended = False
            member = self._member(block)
            if member is not None:
                yield member

    def read(self, member: Member) -> bytes:
        """The content of the member that was given last.

        Raises:
            EOFError: the archive ends in it.
        """
        content = self._exactly(member.size)
        self._left -= len(content)
        if len(content) < member.size:
            raise EOFError(f"{member.name} has {len(content)} of {member.size} bytes")
        return content

    def _block(self) -> bytes:
        self._allow(BLOCK)
        return self._exactly(BLOCK)

    def _exactly(self, size: int) -> bytes:
        """Up to `size` bytes, less only at the end of the stream."""
        parts = []
        while size > 0 and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
            self._at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _allow(self, size: int) -> None:
        if self._limit is not None and self._at + size > self._limit:
            raise DamagedTarError(f"more than {self._limit:,} bytes come out of it")

    def _skip(self, size: int) -> None:
        self._left = 0
        if size > _SKIP and self._limit is None:
            end = self._stream.seek(0, io.SEEK_END)
            if size > end - self._at:
                raise EOFError(f"{size - (end - self._at):,} bytes are missing")
            self._at = self._stream.seek(self._at + size)
            return
        while size > 0:
            self._allow(min(size, _SKIP))
            part = self._exactly(min(size, _SKIP))
            if not part:
                raise EOFError(f"{size:,} bytes are missing")
            size -= len(part)

    def _member(self, block: bytes) -> Member | None:
        """The member that a header and those before it (long names, pax) are about."""
        named: dict[str, bytes] = {}
        while True:
            kind, size = block[156:157], _number(block[124:136])
            if not _sum_is_right(block):
                raise DamagedTarError("a header has the wrong checksum")
            if kind in b"LKxX":
                self._records(kind, size, named)
            elif kind in _PASSED_OVER:
                self._skip(_padded(size))
            else:
                return self._described(block, kind, named)
            block = self._block()
            if len(block) < BLOCK or block == _ZEROS:
                raise EOFError("a long name belongs to no file")

    def _records(self, kind: bytes, size: int, named: dict[str, bytes]) -> None:
        if size > _HEADER_RECORD:
            raise DamagedTarError(f"a header record of {size:,} bytes")
        content = self._exactly(_padded(size))
        if len(content) < size:
            raise EOFError("a header record is cut")
        content = content[:size]
        if kind == b"L":
            named["path"] = content.partition(b"\0")[0]
        elif kind == b"K":
            named["linkpath"] = content.partition(b"\0")[0]
        else:
            named.update(_pax(content))

    def _described(self, block: bytes, kind: bytes, named: dict[str, bytes]) -> Member:
        name = block[:100].partition(b"\0")[0]
        if block[257:262] == b"ustar" and block[257:265] != b"ustar  \0":  # GNU has times there
            prefix = block[345:500].partition(b"\0")[0]
            name = prefix + b"/" + name if prefix else name
        name = named.get("path") or name
        link = named.get("linkpath") or block[157:257].partition(b"\0")[0]
        size = _number(block[124:136])
        if named.get("size"):
            size = _decimal(named["size"])
        sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in named)
        if kind == b"S":
            more = block[482]
            while more:  # lists of holes
                extension = self._block()
                if len(extension) < BLOCK:
                    raise EOFError("the list of holes is cut")
                more = extension[504]
        name = named.get("GNU.sparse.name") or name
        member_kind = _KINDS.get(kind) or ("sparse" if sparse else "file")
        if kind in _PLAIN and name.endswith(b"/") and not size:  # v7 knew no folders
            member_kind = "folder"
        self._left = 0 if kind in _WITHOUT_DATA else _padded(size)
        return Member(_text(name), member_kind, size, _text(link))


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _sum_is_right(block: bytes) -> bool:
    written = _number(block[148:156])
    blanked = block[:148] + b" " * 8 + block[156:]
    total = sum(blanked)
    # Some old programs added up signed bytes.
    return written == total or written == total - 256 * sum(byte > 127 for byte in blanked)


def _number(field: bytes) -> int:
    """An octal number, or GNU's binary one, which the first bit shows."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & (1 << bits) - 1
        value -= (field[0] >> 6 & 1) << bits
    else:
        text = field.partition(b"\0")[0].strip()
        try:
            value = int(text or b"0", 8)
        except ValueError as error:
            raise DamagedTarError(f"a header says {text!r} for a number") from error
    if not 0 <= value <= _LARGEST:
        raise DamagedTarError(f"a header says a size of {value}")
    return value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise DamagedTarError(f"a pax header says a size of {text[:40]!r}")
    return int(text)


def _pax(content: bytes) -> dict[str, bytes]:
    """The records `length key=value` of a pax header."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(content) and content[at]:  # zeros after the last one are padding
        length, blank, _ = content[at : at + 20].partition(b" ")
        size = int(length) if length.isdigit() else 0
        record = content[at : at + size]
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        whole = len(record) == size and record.endswith(b"\n")
        if not (blank and equals and whole and size > len(length) + 1):
            raise DamagedTarError("a pax header is no list of records")
        records[key.decode("utf-8", "replace")] = value[:-1].partition(b"\0")[0]
        at += size
    return records
