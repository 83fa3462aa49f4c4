"""Our reader of tar files against the standard library's, and against archives made to harm."""

from __future__ import annotations

import io
import random
import tarfile
import time

import pytest

from pipeline.pack.tar import DamagedTarError, Tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def contents(data: bytes) -> list[tuple[str, str, bytes]]:
    archive = Tar(io.BytesIO(data))
    members = []
    for member in archive:
        is_file = member.kind == "file"
        members.append((member.name, member.kind, archive.read(member) if is_file else b""))
    return members


def random_archive(rng: random.Random, form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for i in range(rng.randrange(12)):
            long = form != tarfile.USTAR_FORMAT
            length = rng.choice([1, 50, 99, 100, 101, 155] + [300, 5000] * long)
            name = "/".join(["ö" if long and rng.random() < 0.2 else "d", "x" * length, str(i)])
            info = tarfile.TarInfo(name[-length:].lstrip("/"))
            info.type = rng.choice([tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
            info.linkname = "y" * rng.choice([1, 100] + [200] * long) * (info.type == b"2")
            body = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])) * (info.type == b"0")
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return stream.getvalue()


def test_members_are_those_of_tarfile() -> None:
    rng = random.Random(0)
    kinds = {b"0": "file", b"5": "folder", b"2": "link"}
    for i in range(90):
        data = random_archive(rng, FORMATS[i % 3])
        want = []
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                body = archive.extractfile(member) if member.isfile() else None
                content = body.read() if body else b""
                want.append((member.name.rstrip("/"), kinds[member.type], content))
        assert [(n.rstrip("/"), k, b) for n, k, b in contents(data)] == want


def test_archives_that_were_joined_are_read_to_the_end() -> None:
    rng = random.Random(1)
    parts = [random_archive(rng, FORMATS[i % 3]) for i in range(5)]
    want = [item for part in parts for item in contents(part)]
    assert len(want) > 10
    assert contents(b"".join(parts)) == want


def header(name: str = "x", size: bytes = b"", kind: bytes = b"0", more: bytes = b"\0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[156:157], block[482:483] = kind, more
    if size:
        block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(content: bytes) -> bytes:
    return header("p", b"%o" % len(content), b"x") + content + bytes(-len(content) % 512)


BEFORE = header("0", b"3") + b"abc" + bytes(509)
DAMAGED = {
    "size -1": header(size=b"\xff" * 12),
    "size 2^94": header(size=b"\x80" + b"\x7f" * 11),
    "size 2^63": header(size=b"\x80\0\0\0\x80" + bytes(7)),
    "size of letters": header(size=b"zzzz"),
    "pax size -512": pax(b"13 size=-512\n") + header(),
    "pax size of 20 digits": pax(b"29 size=99999999999999999999\n") + header(),
    "a record of 2^40 bytes": header("p", b"\x80\0\0\0\0\0\0\x01" + bytes(4), b"x"),
    "a record of length 0": pax(b"0 a=b\n") + header(),
    "a record of length -5": pax(b"-5 a=b\n") + header(),
    "a record that is longer than the header": pax(b"999 a=b\n") + header(),
    "a record without =": pax(b"6 abc\n") + header(),
    "holes without end": header(kind=b"S", more=b"\1"),
    "a wrong checksum": b"y" + header()[1:],
    "60 GB that are not there": header(size=b"700000000000"),
    "a long name of nothing": header("p", b"5", b"L") + b"abcd\0" + bytes(507),
    "no end": b"",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_ends_the_archive_and_keeps_what_came_before(name: str) -> None:
    data = BEFORE + DAMAGED[name]
    for limit in (None, 10**9):
        archive, members = Tar(io.BytesIO(data), limit), []
        begin = time.process_time()
        with pytest.raises((EOFError, DamagedTarError)):
            for member in archive:
                members.append(archive.read(member) if member.size < 1000 else b"")
        assert members[0] == b"abc"
        assert time.process_time() - begin < 1


def test_thousands_of_headers_before_one_file() -> None:
    for one in (header("p", b"5", b"L") + b"abcd\0" + bytes(507), pax(b"10 path=y\n")):
        end = header("z", b"1") + b"q" + bytes(511) + bytes(1024)
        assert [c for _, _, c in contents(BEFORE + one * 3000 + end)] == [b"abc", b"q"]


def test_sparse_members_are_named_and_passed_over() -> None:
    keys = (b"22 GNU.sparse.major=1\n", b"27 GNU.sparse.map=a,b,c,d,\n", b"20 GNU.sparse.size=\n")
    for record in keys:
        data = pax(record) + header("s", b"4") + b"abcd" + bytes(508) + BEFORE + bytes(1024)
        assert contents(data) == [("s", "sparse", b""), ("0", "file", b"abc")]


def test_no_more_comes_out_than_is_allowed() -> None:
    data = (
        header("big", b"%o" % 10**7) + bytes(10**7) + bytes(-(10**7) % 512) + BEFORE + bytes(1024)
    )
    assert [m.name for m in Tar(io.BytesIO(data), 2 * 10**7)] == ["big", "0"]
    with pytest.raises(DamagedTarError, match="more than 5,000,000 bytes"):
        list(Tar(io.BytesIO(data), 5 * 10**6))
