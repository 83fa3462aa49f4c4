"""What people have on their disks: companions, links into a store, archives, patterns and lists."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import stat
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.images.decode import FORMATS
from pipeline.images.kinds import begins_like_an_image
from pipeline.pack import archives, sources
from pipeline.pack import pack as packing
from pipeline.pack.bad_files import unequal_shares
from pipeline.pack.listing import list_source
from pipeline.pack.pack import PackOptions, PackPlaces, pack
from pipeline.pack.sources import Reading, plan_tasks
from pipeline.shards.shards import open_shards
from pipeline.storage import places as storage
from tests.images import hostile as h
from tests.pack.test_pack import bad_of, hub, mistake, others_of, packed, table_of, tar_of, write


@pytest.fixture(autouse=True)
def serial(tasks_here):
    """Each test of this file."""


def photos(root: Path, count: int = 6) -> dict[str, bytes]:
    """Images in three classes; returns source -> bytes."""
    good = {f"c{i % 3}/{i}.jpg": h.jpeg(i) for i in range(count)}
    for source, encoded in good.items():
        write(root / source, encoded)
    return good


def images_of(out: Path) -> dict[str, bytes]:
    return {row["source"]: row["image"] for row in table_of(out).to_pylist()}


def labels_of(out: Path) -> dict[str, int | None]:
    return {row["source"]: row["label"] for row in table_of(out).to_pylist()}


# ---- files that are no images

COMPANIONS = {
    "README.md": b"# photos", "LICENSE": b"MIT", "labels.csv": b"file,label\n", "BMW.txt": b"BMW",
    "c0/Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "P3.txt": b"P3 is a player",
    "c1/desktop.ini": b"[.ShellClassInfo]\r\n", "notes.pdf": b"%PDF-1.7\n", "_SUCCESS": b"",
    "film.mp4": b"\0\0\0\x18ftypisom" + bytes(3000), "c0/0.xmp": b"<x/>", "SHA256SUMS": b"00 x",
    "c0/0.json": b"{}", "c0/0.txt": b"a caption", "sound.wav": b"RIFF\0\0\0\0WAVEfmt ",
    "_delta_log/0.json": b"{}", ".DS_Store": b"\0\0\0\1Bud1", "c1/.gitkeep": b"", "x.npz": b"PK",
}  # fmt: skip


def test_companions_are_counted_apart_and_stop_nothing(tmp_path):
    root = tmp_path / "in"
    good = photos(root)
    for name, content in COMPANIONS.items():
        write(root / name, content)
    # a table without images: beside images it is a companion, alone it is a mistake
    pq.write_table(pa.table({"txn": [1]}), root / "_delta_log" / "0.checkpoint.parquet")
    pq.write_table(pa.table({"file": ["a"]}), root / "metadata.parquet")
    report = packed(root, tmp_path, max_bad_fraction=0.0)
    assert images_of(tmp_path) == good
    left = others_of(tmp_path)
    assert set(left) == {*COMPANIONS, "_delta_log/0.checkpoint.parquet", "metadata.parquet"}
    assert Counter(left.values()) == report.others == {
        "hidden": 2, "unread_archive": 1, "no_image": len(left) - 3
    }  # fmt: skip
    assert report.class_names == ("c0", "c1", "c2")
    pq.write_table(pa.table({"file": ["a"]}), write(tmp_path / "t" / "metadata.parquet", b""))
    assert 'no column "image" (found: file)' in mistake(tmp_path / "t", tmp_path / "2")


def test_what_claims_to_be_an_image_is_bad(tmp_path):
    root = tmp_path / "in"
    photos(root)
    names = {
        "text.JPG": (b"no picture", "not_an_image"),
        "no_ending": (h.jpeg(50)[:300], "truncated"),
        "wrong.txt": (b"\x89PNG\r\n\x1a\n" + bytes(30), "truncated"),
        "empty.webp": (b"", "empty"),
        "in.tar": (b"junk", "truncated"),
    }
    for name, (content, _) in names.items():
        write(root / name, content)
    write(root / "good.txt", h.jpeg(99))  # a picture, whatever its name
    report = packed(root, tmp_path)
    assert bad_of(tmp_path) == {name: reason for name, (_, reason) in names.items()}
    assert report.images_packed == 7
    assert not report.others


def test_every_format_that_is_read_is_known_by_its_first_bytes():
    for form in FORMATS:
        name = {"PPM": "PPM", "JPEG2000": "JPEG2000"}.get(form, form)
        assert begins_like_an_image(h.encode(h.pattern(), name)[:512]), form
    for text in (b"BM", b"P6", b"BMW has cars", b"P5\nis a note", b"GIF me", b"", b"RIFF....AVI "):
        assert not begins_like_an_image(text)


def test_large_files_are_judged_by_name_and_first_bytes(tmp_path):
    root = tmp_path / "in"
    photos(root)
    large = {"film.mp4": b"\0\0\0\x18ftypisom", "picture": h.jpeg(7), "picture.png": b"x"}
    for name, content in large.items():
        write(root / name, content + bytes(20_000))
    packed(root, tmp_path, max_image_bytes=15_000)
    assert bad_of(tmp_path) == {"picture": "too_large", "picture.png": "too_large"}
    assert others_of(tmp_path) == {"film.mp4": "no_image"}


def test_too_many_bad_images_are_named_and_unequal_shares_look_unequal(tmp_path):
    root = tmp_path / "in"
    photos(root, 9)
    for i in range(4):
        write(root / f"x{i}.jpg", b"no")
    write(root / "z.jpg", b"")
    said = mistake(root, tmp_path, max_bad_fraction=0.3571)
    assert "5 of 14 images" in said
    assert "(35.714 %, allowed 35.710 %)" in said
    assert "x0.jpg (not_an_image), z.jpg (empty), x1.jpg (not_an_image)" in said
    assert unequal_shares(3 / 290, 0.01) == "1.03 %, allowed 1.00 %"
    assert unequal_shares(10_001 / 1_000_000, 0.01) == "1.0001 %, allowed 1.0000 %"


# ---- label files


def beside(count: int, value) -> list[tuple[str, bytes]]:
    members = []
    for i in range(count):
        members += [
            (f"{i:04d}.jpg", h.jpeg(i)),
            (f"{i:04d}.cls", value(i)),
            (f"{i:04d}.json", json.dumps({"id": i, "at": {"class": f"n{i % 2}"}}).encode()),
        ]
    return members  # fmt: skip


@pytest.mark.parametrize("order", ["as_written", "any"])
@pytest.mark.parametrize("place", ["tar", "folder"])
def test_label_files_beside_images(tmp_path, monkeypatch, place, order):
    """In any order, over runs and tasks, in archives and in folders."""
    monkeypatch.setattr(packing, "RUN_BYTES", 4_000)
    monkeypatch.setattr(sources, "TASK_FILES", 2)
    members = beside(20, lambda i: b"%d\n" % (i % 3))
    if order == "any":
        random.Random(0).shuffle(members)
    if place == "tar":
        write(tmp_path / "in" / "a.tar", tar_of(members))
    for name, content in members if place == "folder" else ():
        write(tmp_path / "in" / "train" / name, content)
        write(tmp_path / "in" / "val" / "other.jpg", h.jpeg(99))
    report = packed(tmp_path / "in", tmp_path, max_bad_fraction=0.0)
    by_stem = {Path(source).stem: label for source, label in labels_of(tmp_path).items()}
    assert by_stem.pop("other", None) is None  # it has no label file
    assert by_stem == {f"{i:04d}": i % 3 for i in range(20)}
    assert report.class_names == ()
    assert report.others == {"label": 20, "no_image": 20}
    packed(tmp_path / "in", tmp_path / "none", labels="none")
    assert set(labels_of(tmp_path / "none").values()) == {None}
    named = packed(tmp_path / "in", tmp_path / "json", label_member="json:at.class")
    assert named.class_names == ("n0", "n1")
    by_stem = {Path(source).stem: label for source, label in labels_of(tmp_path / "json").items()}
    by_stem.pop("other", None)
    assert by_stem == {f"{i:04d}": i % 2 for i in range(20)}


def test_label_files_that_say_no_class_are_named(tmp_path, caplog):
    bad = {"a": b"", "b": b"\xff\xfe", "c": b"9" * 30 + b"0" * 300, "d": b"two\nlines", "e": b"-1",
           "f": b"7"}  # fmt: skip
    members = [m for k, v in bad.items() for m in ((f"{k}.jpg", h.jpeg(ord(k))), (f"{k}.cls", v))]
    write(tmp_path / "in" / "a.tar", tar_of([*members, ("lonely.cls", b"1")]))
    report = packed(tmp_path / "in", tmp_path)
    assert {Path(s).stem: v for s, v in labels_of(tmp_path).items()} == {
        **dict.fromkeys("abcde"), "f": 7
    }  # fmt: skip
    assert report.others == {"bad_label": 4, "label": 3}
    assert "4 label files say no class" in caplog.text and "a.tar/a.cls" in caplog.text


def test_the_label_of_the_longest_name_counts(tmp_path):
    members = [("x.left.jpg", h.jpeg(1)), ("x.right.jpg", h.jpeg(2)), ("x.cls", b"1"),
               ("x.right.cls", b"2"), ("y.1.jpg", h.jpeg(3)), ("y.2.jpg", h.jpeg(4)),
               ("y.1.cls", b"3"), ("y.2.cls", b"4")]  # fmt: skip
    write(tmp_path / "in" / "a.tar", tar_of(members))
    packed(tmp_path / "in", tmp_path)
    assert {Path(s).name: v for s, v in labels_of(tmp_path).items()} == {
        "x.left.jpg": 1, "x.right.jpg": 2, "y.1.jpg": 3, "y.2.jpg": 4
    }  # fmt: skip


def test_another_ending_of_label_files_is_another_pack(tmp_path):
    write(tmp_path / "in" / "a.jpg", h.jpeg(1))
    write(tmp_path / "in" / "a.cls", b"3")
    for member, label in (("cls", 3), ("", None), ("cls", 3)):
        packed(tmp_path / "in", tmp_path, label_member=member)
        assert labels_of(tmp_path) == {"a.jpg": label}, member


def test_a_name_with_many_dots_is_no_reason_for_one_task(tmp_path, monkeypatch):
    """Frames of one film, each with its label; copies of one picture, all with the same."""
    monkeypatch.setattr(sources, "TASK_FILES", 4)
    truth = {}
    for i in range(20):
        write(tmp_path / "in" / f"film.{i:03d}.jpg", h.jpeg(i))
        write(tmp_path / "in" / f"film.{i:03d}.cls", b"%d" % i)
        write(tmp_path / "in" / f"x.{i}.jpg", h.jpeg(100 + i))
        truth |= {f"film.{i:03d}.jpg": i, f"x.{i}.jpg": 77}
    write(tmp_path / "in" / "x.cls", b"77")
    write(tmp_path / "in" / "x.3.cls", b"78")
    truth["x.3.jpg"] = 78
    reading = Reading("image", "label", 2**20, label_member="cls")
    plan = plan_tasks(str(tmp_path / "in"), list_source(str(tmp_path / "in")), reading)
    assert max(len(task.paths) for task in plan.tasks) <= 2 * 4
    report = packed(tmp_path / "in", tmp_path)
    assert labels_of(tmp_path) == truth
    assert report.others == {"label": 22}  # each one once, though several tasks read it
    table = pq.read_table(tmp_path / "other_files.parquet").to_pylist()
    assert {"source": "x.cls", "reason": "label", "detail": "class 77"} in table


# ---- links


def store(tmp_path: Path) -> Path:
    """A hub cache: a snapshot of links to blobs without endings."""
    snapshot = tmp_path / "hub" / "snapshots" / "0123" / "train"
    snapshot.mkdir(parents=True)
    for i in range(6):
        write(tmp_path / "hub" / "blobs" / f"{i:064x}", h.jpeg(i))
        (snapshot / f"{i}.jpg").symlink_to(f"../../../blobs/{i:064x}")
    write(tmp_path / "hub" / "blobs" / "r", b"# read me")
    (snapshot / "README.md").symlink_to("../../../blobs/r")
    return snapshot


def test_links_into_a_store(tmp_path):
    snapshot = store(tmp_path)
    with pytest.raises(DataError) as caught:
        packed(snapshot, tmp_path / "0")
    assert "7 links were not followed: with data.follow_links=true" in caught.value.hint
    assert bad_of(tmp_path / "0") == {f"{i}.jpg": "link" for i in range(6)}
    assert others_of(tmp_path / "0") == {"README.md": "link"}
    report = packed(snapshot, tmp_path / "1", follow_links=True, max_bad_fraction=0.0)
    assert images_of(tmp_path / "1") == {f"{i}.jpg": h.jpeg(i) for i in range(6)}
    assert report.others == {"no_image": 1}
    odd = {"folder": tmp_path / "hub", "loop": snapshot, "zero.jpg": "/dev/zero",
           "broken.jpg": "nowhere", "long.jpg": "x" * 4000, "circle.jpg": "circle.jpg",
           "memory.jpg": "/proc/self/mem", "note": "nowhere"}  # fmt: skip
    for name, target in odd.items():
        (snapshot / name).symlink_to(target)
    report = packed(snapshot, tmp_path / "2", follow_links=True)
    assert report.images_packed == 6
    assert bad_of(tmp_path / "2") == {
        **dict.fromkeys(("folder", "zero.jpg", "broken.jpg", "long.jpg", "circle.jpg"), "link"),
        "memory.jpg": "empty",  # a file of no bytes, as far as its size says
    }
    assert others_of(tmp_path / "2") == {"README.md": "no_image", "loop": "link", "note": "link"}
    assert report.images_in + sum(report.others.values()) == 7 + len(odd)


def test_the_lock_of_a_job_is_never_followed(tmp_path):
    from pipeline.errors import PipelineError
    from pipeline.storage.run_folder import RunFolder

    victim = write(tmp_path / "victim", b"important")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".job.lock"
    lock.symlink_to(victim)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(PipelineError, match=r"\.job\.lock cannot be locked"), folder.locked():
        pass
    lock.unlink()
    lock.mkdir()
    with pytest.raises(PipelineError, match=r"\.job\.lock cannot be locked"), folder.locked():
        pass
    lock.rmdir()
    lock.hardlink_to(victim)
    with folder.locked():
        pass
    assert victim.read_bytes() == b"important"


# ---- archives

GOOD = {f"c{i % 2}/{i}.jpg": h.jpeg(i) for i in range(6)}
PLAIN = tar_of(list(GOOD.items()))
PACKED = {
    "a.TAR": PLAIN, "a.tar.gz": gzip.compress(PLAIN), "a.TGZ": gzip.compress(PLAIN),
    "a.tar.bz2": bz2.compress(PLAIN), "a.tbz2": bz2.compress(PLAIN),
    "a.tar.xz": lzma.compress(PLAIN), "a.txz": lzma.compress(PLAIN),
    "a.tar.lzma": lzma.compress(PLAIN, lzma.FORMAT_ALONE),
    "a.tar.zst": pa.compress(PLAIN, "zstd", asbytes=True), "wrong_ending.tar": bz2.compress(PLAIN),
}  # fmt: skip


def zipped(members, **options) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


PACKED["a.Zip"] = zipped(GOOD.items())
PACKED["deflated.zip"] = zipped(GOOD.items(), compression=zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize("name", PACKED)
def test_archives_of_every_kind(tmp_path, name):
    write(tmp_path / "in" / name, PACKED[name])
    for number, source in enumerate((tmp_path / "in", tmp_path / "in" / name)):
        report = packed(source, tmp_path / f"{number}", max_bad_fraction=0.0)
        assert images_of(tmp_path / f"{number}") == {f"{name}/{k}": v for k, v in GOOD.items()}
        assert report.class_names == ("c0", "c1")


@pytest.mark.parametrize("name", PACKED)
def test_archives_that_are_cut_or_changed(tmp_path, name):
    """Any damage is one row or more, and never an image that is not of the archive."""
    content = PACKED[name]
    rng = random.Random(name)
    for number in range(12):
        damaged = bytearray(content)
        if number < 5:
            damaged = damaged[: rng.randrange(len(content))]
        else:
            for _ in range(1 + number % 3):
                damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        out = tmp_path / f"{number}"
        write(out / "in" / name, bytes(damaged))
        write(out / "in" / "y.jpg", h.jpeg(77))
        report = packed(out / "in", out)
        assert report.images_in == report.images_packed + report.duplicates + len(bad_of(out))
        if number < 5:
            assert set(images_of(out).values()) <= {*GOOD.values(), h.jpeg(77)}
            assert bad_of(out)


def test_streams_that_were_joined_are_read_to_the_end(tmp_path):
    second = tar_of([("c0/new.jpg", h.jpeg(40))])
    for number, pack_ in enumerate((bytes, gzip.compress, bz2.compress, lzma.compress)):
        write(tmp_path / f"{number}" / "in" / "a.tar", pack_(PLAIN) + pack_(second))
        assert packed(tmp_path / f"{number}" / "in", tmp_path / f"{number}").images_packed == 7


def test_bombs_end_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "ALLOWANCE", 2**24)
    zeros = tarfile.TarInfo("zeros.jpg")
    zeros.size = 2**26
    head = tar_of(list(GOOD.items())).rstrip(b"\0")
    head += bytes(-len(head) % 512)
    bomb = head + zeros.tobuf() + bytes(2**26) + tar_of([("after.jpg", h.jpeg(41))])
    for name, pack_ in (("a.tar.bz2", bz2.compress), ("a.tar.xz", lzma.compress)):
        write(tmp_path / name / "in" / name, pack_(bomb))
        report = packed(tmp_path / name / "in", tmp_path / name, max_image_bytes=2**20)
        assert report.images_packed == 6
        assert bad_of(tmp_path / name) == {f"{name}/zeros.jpg": "too_large", name: "undecodable"}
    write(tmp_path / "plain" / "in" / "a.tar", bomb)  # is as large as it says
    assert packed(tmp_path / "plain" / "in", tmp_path / "plain", max_image_bytes=2**20
                  ).images_packed == 7  # fmt: skip


def test_a_zip_of_a_stranger(tmp_path):
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    members = [
        ("good/1.jpg", h.jpeg(1)), ("../up.jpg", h.jpeg(2)), ("/abs.jpg", h.jpeg(3)),
        (link, b"/etc/passwd"), ("notes.txt", b"words"), ("good/", b""),
        ("huge.png", bytes(200_000)),
        ("__MACOSX/._1.jpg", b"mac"), ("secret.jpg", h.jpeg(4)), ("odd.jpg", h.jpeg(5)),
        ("sum.jpg", h.jpeg(6)),
    ]  # fmt: skip
    data = bytearray(zipped(members))
    for name, change in (("secret.jpg", "flag"), ("odd.jpg", "method"), ("sum.jpg", "crc")):
        for magic, at in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
            place = -1
            while (place := data.find(magic, place + 1)) >= 0:
                length = 30 if magic == b"PK\3\4" else 46
                if data[place + length :].startswith(name.encode()):
                    field = place + at + {"flag": 6, "method": 8, "crc": 14}[change]
                    data[field] ^= {"flag": 1, "method": 77, "crc": 255}[change]
    write(tmp_path / "in" / "a.zip", bytes(data))
    with pytest.warns(UserWarning, match="Duplicate name"):
        twice = zipped([("x.jpg", h.jpeg(8)), ("x.jpg", h.jpeg(9))])
    write(tmp_path / "in" / "twice.zip", twice)
    report = packed(tmp_path / "in", tmp_path, max_image_bytes=100_000)
    assert set(table_of(tmp_path)["image"].to_pylist()) == {h.jpeg(i) for i in (1, 8, 9)}
    assert {k.removeprefix("a.zip/"): v for k, v in bad_of(tmp_path).items()} == {
        "../up.jpg": "outside", "/abs.jpg": "outside", "link.jpg": "link", "huge.png": "too_large",
        "secret.jpg": "undecodable", "odd.jpg": "undecodable", "sum.jpg": "undecodable",
    }  # fmt: skip
    assert report.others == {"no_image": 1, "hidden": 1}
    assert not list(tmp_path.rglob("up.jpg"))


def test_names_of_one_piece_of_a_zip_do_not_multiply_it(tmp_path):
    """Many names for the same bytes: the first is read, the others lie inside of it."""
    data = zipped([("0.jpg", h.jpeg(1)), ("1.jpg", h.jpeg(2))])
    first = data.index(b"PK\1\2")
    entry = data[first : data.index(b"PK\1\2", first + 1)]
    end = data[data.index(b"PK\5\6") :]
    count, size = 50, 50 * len(entry)
    end = end[:8] + count.to_bytes(2, "little") * 2 + size.to_bytes(4, "little") + end[16:]
    write(tmp_path / "in" / "a.zip", data[:first] + entry * count + end)
    report = packed(tmp_path / "in", tmp_path)
    assert (report.images_packed, report.bad) == (1, {"undecodable": 49})


# ---- places


def test_patterns_and_lists(tmp_path):
    root = tmp_path / "set"
    good = {f"train/c{i % 3}/{i}.jpg": h.jpeg(i) for i in range(12)}
    for source, encoded in good.items():
        write(root / source, encoded)
    for i in range(4):
        write(root / f"{i:05d}.tar", tar_of([(f"{i}.png", h.encode(h.pattern(seed=30 + i)))]))
    write(root / "train" / "c0" / ".hidden.jpg", h.jpeg(90))
    for number, (pattern, count, names) in enumerate((
        ("train/**/*.jpg", 12, ("c0", "c1", "c2")), ("train/*", 12, ("c0", "c1", "c2")),
        ("train/c[01]", 8, ("c0", "c1")), ("train/c0/?.jpg", 4, ()), ("{00000..00002}.tar", 3, ()),
        ("train/c0,{}/train/c1", 8, ("c0", "c1")), ("*.tar", 4, ()),
        ("t*n/c{0,2}/*", 8, ("c0", "c2")),
        ("train/c1/,{}/*.tar", 8, ()), ("train/c0, {}/train/c0/0.jpg", 4, ()),
    )):  # fmt: skip
        for scheme in ("", "file://"):
            out = tmp_path / f"{number}{scheme[:4]}"
            source = f"{scheme}{root}/" + pattern.replace("{}", f"{scheme}{root}")
            report = packed(source, out)
            assert (report.images_packed, report.class_names) == (count, names), source
            assert report.bad == {}, source
    assert "nothing fits the pattern" in mistake(root / "*.gif", tmp_path / "x")
    for name in ("{a,b}", "nowhere", "nowhere/*"):
        with pytest.raises(DataError) as caught:
            packed(root / "train" / name, tmp_path / "x", field="evaluate.queries")
        assert "evaluate.queries" in caught.value.hint
    for name in ("a\0b", "x" * 5000, "y" * 5000 + "*"):
        assert "cannot open" in mistake(f"{root}/{name}", tmp_path / "x"), name[:9]
    assert "names no place" in mistake(", ,", tmp_path / "x")
    assert "lies inside the source" in mistake(f"{tmp_path}/*", tmp_path / "x")
    assert packed(f"{tmp_path}/s?t/train", tmp_path / "y").images_packed == 12


def test_names_with_the_signs_of_patterns(tmp_path):
    names = ["[a]", "what?", "{1..3}", "a, b", "*", "x{y", "50% off", "ü", "-n", "🦊 x"]
    names.append(unicodedata.normalize("NFD", "ö"))
    for i, name in enumerate(names):
        write(tmp_path / "in" / name / "0.jpg", h.jpeg(i))
        write(tmp_path / "in" / name / f"{name}.jpg", h.jpeg(100 + i))
    for i, name in enumerate(names):
        out = tmp_path / f"{i}"
        assert packed(tmp_path / "in" / name, out).images_packed == 2, name
        assert packed(tmp_path / "in" / name / f"{name}.jpg", out / "1").images_packed == 1, name
    assert packed(f"{tmp_path}/in/a, b/*.jpg", tmp_path / "c").images_packed == 2
    uri = (tmp_path / "in" / "50% off").as_uri()
    assert packed(f"{uri}/*.jpg", tmp_path / "u").images_packed == 2


def test_places_that_are_not_local(tmp_path, monkeypatch):
    root = tmp_path / "set"
    good = {f"train/c{i % 3}/{i}.jpg": h.jpeg(i) for i in range(12)}
    for source, encoded in good.items():
        write(root / source, encoded)
    write(root / "z.zip", zipped(GOOD.items()))
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    plain = storage._filesystem

    def filesystem(uri):
        if "far://" not in uri:
            return plain(uri)
        return remote, uri.removeprefix("far://").partition("?")[0]

    monkeypatch.setattr(storage, "_filesystem", filesystem)
    for number, (source, count) in enumerate((
        ("far://set/train/**/*.jpg", 12), ("far://set/train/c?", 12), ("far://set/*", 18),
        ("far://set/train/c{0..1}/*?region=x", 8), ("far://set/train/c0,far://set/z.zip", 10),
        ("far://set/z.zip", 6), ("far://set/train?region=x", 12),
    )):  # fmt: skip
        report = pack(
            source,
            f"far://{number}/shards",
            PackPlaces(bad_images=f"far://{number}/bad.parquet", scratch=f"far://{number}/work"),
            PackOptions(max_bad_fraction=0.0),
        )
        assert report.images_in == count, source
    write(tmp_path / "local" / "0.jpg", h.jpeg(1))
    assert "in several storages" in mistake(f"far://set,{tmp_path}/local", tmp_path / "x")
    assert "nothing fits the pattern" in mistake("far://set/*.gif", tmp_path / "x")


def test_tables_by_any_ending_and_shards_beside_each_other(tmp_path):
    for name in ("a.PARQUET", "b.pq", "c.parquet"):
        hub(tmp_path / "in" / name, [h.jpeg(ord(name[0]))])
    assert packed(tmp_path / "in", tmp_path / "out" / "a").images_packed == 3
    photos(tmp_path / "more")
    packed(tmp_path / "more", tmp_path / "out" / "b")
    source = f"{tmp_path}/out/a/shards,{tmp_path}/out/b/shards"
    assert packed(source, tmp_path / "both").images_packed == 9
    (tmp_path / "out" / "b" / "shards" / "_manifest.json").unlink()
    assert "packing was not finished" in mistake(source, tmp_path / "again")
    assert packed(f"{tmp_path}/out/b/shards/part-*", tmp_path / "parts").images_packed == 6


# ---- what goes away, or cannot be read


def test_what_goes_between_listing_and_reading(tmp_path, monkeypatch):
    root = tmp_path / "in"
    photos(root)
    write(root / "a.tar", PLAIN)
    write(root / "a.zip", PACKED["a.Zip"])
    hub(root / "a.parquet", [h.jpeg(30)])
    plan = packing.plan_tasks

    def lose(*args):
        planned = plan(*args)
        for name in ("c0/0.jpg", "a.tar", "a.zip", "a.parquet"):
            (root / name).unlink()
        (root / "c1" / "1.jpg").unlink()
        os.mkfifo(root / "c1" / "1.jpg")  # which no one writes to
        return planned

    monkeypatch.setattr(packing, "plan_tasks", lose)
    assert packed(root, tmp_path).images_packed == 4
    gone = ("c0/0.jpg", "c1/1.jpg", "a.tar", "a.zip", "a.parquet")
    assert bad_of(tmp_path) == dict.fromkeys(gone, "unreadable")


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    """As another user; root may read all, so the refusal is made here."""
    root = tmp_path / "in"
    photos(root)
    scandir = os.scandir

    def refused(path):
        if str(path).endswith(("c1", "nothing")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("pipeline.pack.listing.os.scandir", refused)
    assert packed(root, tmp_path).images_packed == 4
    assert bad_of(tmp_path) == {"c1": "unreadable"}
    (tmp_path / "nothing").mkdir()
    assert "cannot read the folder" in mistake(tmp_path / "nothing", tmp_path / "x")


def test_shards_in_a_folder_that_cannot_be_listed_are_one_sentence(tmp_path):
    root = tmp_path / "in"
    hub(root / "a.parquet", [h.jpeg(1)])
    (root / "long").symlink_to("x" * 4000)
    with pytest.raises(DataError, match="cannot list"):
        open_shards(str(root))
    (root / "long").unlink()
    (root / os.fsdecode(b"\xff.jpg")).write_bytes(h.jpeg(2))
    with pytest.raises(DataError, match="cannot list"):
        open_shards(str(root))
    assert packed(root, tmp_path).images_packed == 2


def test_metadata_of_a_stranger(tmp_path):
    about = lambda names: {"info": {"features": {"label": {"names": names}}}}  # noqa: E731
    marks = [
        {"huggingface": json.dumps(about({"cat": "0", "dog": "1"}))},
        {"huggingface": json.dumps(about([{"a": 1}, None]))},
        {"huggingface": "[" * 200_000},
        {"raydino": '{"schema_version": 1, "class_names": 5}'},
        {"raydino": '{"schema_version": 1, "class_names": []}'},
        {"raydino": "[" * 200_000},
    ]
    for number, mark in enumerate(marks):
        out = tmp_path / f"{number}"
        table = pa.table({"image": [h.jpeg(1), h.jpeg(2)], "label": [0, 1], "source": [3, 4]})
        write(out / "in" / "a.parquet", b"")
        pq.write_table(table.replace_schema_metadata(mark), out / "in" / "a.parquet")
        report = packed(out / "in", out)
        assert (report.images_packed, report.class_names) == (2, ()), mark
        assert sorted(labels_of(out).values()) == [0, 1]
    twice = pa.Table.from_arrays([pa.array([h.jpeg(1)])] * 2, names=["image", "image"])
    pq.write_table(twice, write(tmp_path / "twice" / "a.parquet", b""))
    assert 'a.parquet has 2 columns "image"' in mistake(tmp_path / "twice", tmp_path / "x")
