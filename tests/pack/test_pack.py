"""pack against planted truth: what was put into a source is what comes out, each image once."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import fs as pafs

from pipeline.errors import DataError
from pipeline.pack import ledger, merge, sources
from pipeline.pack import pack as packing
from pipeline.pack import sorted_runs as runs
from pipeline.pack.listing import list_source
from pipeline.pack.merge import id_range
from pipeline.pack.pack import PackOptions, PackPlaces, pack
from pipeline.shards.columns import IMAGE_SHARD_SCHEMA, image_id
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.storage import places as storage
from tests import data
from tests.images import hostile as h


def packed(source, out: Path, **options):
    return data.packed(source, out, **{"max_bad_fraction": 1.0, "row_group_images": 8} | options)


def table_of(out: Path) -> pa.Table:
    files = sorted((out / "shards").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files])


def bad_of(out: Path) -> dict[str, str]:
    rows = pq.read_table(out / "bad.parquet").to_pylist()
    assert all(row["stage"] == "pack" and row["detail"] for row in rows)
    return {row["source"]: row["reason"] for row in rows}


def others_of(out: Path) -> dict[str, str]:
    rows = pq.read_table(out / "other_files.parquet").to_pylist()
    assert all(row["detail"] for row in rows)
    return {row["source"]: row["reason"] for row in rows}


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def plant(root: Path, classes=("ant", "bee", "cow"), each=9) -> dict[str, bytes]:
    """Good images by class; returns source -> bytes."""
    good = {}
    for c, name in enumerate(classes):
        for i in range(each):
            form = ("JPEG", "PNG", "WEBP")[i % 3]
            encoded = h.encode(h.pattern(20 + c, 30 + i, seed=10 * c + i), form)
            good[f"{name}/{i:03d}.{form.lower()}"] = encoded
    for source, encoded in good.items():
        write(root / source, encoded)
    return good


# ---- folders


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_duplicates_of_several_runs_and_shards_are_listed_beside_what_stays(
    tmp_path, tasks_here, monkeypatch, labels
):
    """A loop over the files: of equal bytes the first by name stays, each other is listed."""
    monkeypatch.setattr(packing, "RUN_BYTES", 2000)  # a run of some images
    root, out = tmp_path / "photos", tmp_path / "out"
    files = plant(root, each=12)
    rng = random.Random(0)
    for number in range(30):
        source = rng.choice(sorted(files))
        copy = f"{rng.choice(['ant', 'bee', 'cow'])}/copy_{number:02d}.{source[-3:]}"
        files[copy] = files[source]
        write(root / copy, files[copy])
    stays: dict[bytes, str] = {}
    expected = []
    for source in sorted(files):
        first = stays.setdefault(files[source], source)
        if first != source:
            classes = [x.split("/")[0] if labels == "auto" else None for x in (source, first)]
            expected.append((source, image_id(files[source]), classes[0], first, classes[1]))
    report = packed(root, out, labels=labels, shard_bytes=4000)
    assert report.shards > 3
    listed = pq.read_table(out / "duplicates.parquet").to_pylist()
    assert sorted(tuple(row.values()) for row in listed) == expected
    assert report.duplicates == len(expected) == 30
    assert report.disagreeing == sum(row[2] != row[4] for row in expected)
    assert set(table_of(out)["source"].to_pylist()) == set(stays.values())
    assert [p.name for p in (out / "work").iterdir()] == ["report.json"]


def test_a_folder_gives_each_image_once_and_lists_the_rest(tmp_path, tasks_here, caplog):
    root, out = tmp_path / "photos", tmp_path / "out"
    good = plant(root)
    copies = {"bee/a_copy.jpg": good["ant/000.jpeg"], "cow/z_copy.png": good["cow/001.png"]}
    broken = {f"bee/{kind}.jpg": kind for kind in h.BROKEN_KINDS}
    for source, encoded in copies.items():
        write(root / source, encoded)
    for source, kind in broken.items():
        write(root / source, h.broken(kind))
    write(root / "notes.txt", b"who took them")
    write(root / ".hidden" / "x.jpg", h.jpeg(77))
    write(root / "ant" / ".DS_Store", b"junk")

    report = packed(root, out)
    assert report.images_in == len(good) + len(copies) + len(broken)
    assert report.images_packed == len(good)
    assert report.duplicates == 2
    want_bad = {source: h.BROKEN_REASONS[kind] for source, kind in broken.items()}
    assert report.others == {"hidden": 2, "no_image": 1}
    assert others_of(out) == {
        "notes.txt": "no_image", ".hidden/x.jpg": "hidden", "ant/.DS_Store": "hidden"
    }  # fmt: skip
    assert bad_of(out) == want_bad
    assert report.bad == Counter(want_bad.values())
    assert report.class_names == ("ant", "bee", "cow")
    listed = pq.read_table(out / "duplicates.parquet").drop(["image_id"]).to_pylist()
    assert sorted(tuple(row.values()) for row in listed) == [
        ("bee/a_copy.jpg", "bee", "ant/000.jpeg", "ant"),
        ("cow/z_copy.png", "cow", "cow/001.png", "cow"),
    ]
    assert report.disagreeing == 1
    assert "bee/a_copy.jpg and ant/000.jpeg" in caplog.text

    table = table_of(out)
    assert table.schema.equals(IMAGE_SHARD_SCHEMA)
    rows = {row["source"]: row for row in table.to_pylist()}
    # Of byte-identical images the smallest source stays: ant/000 < bee/a_copy, cow/001 < cow/z.
    assert {source: row["image"] for source, row in rows.items()} == good
    for source, row in rows.items():
        with Image.open(io.BytesIO(row["image"])) as image:
            assert (row["width"], row["height"], row["format"]) == (*image.size, image.format)
        assert row["image_id"] == image_id(row["image"])
        assert report.class_names[row["label"]] == source.split("/")[0]
    ids = table["image_id"].to_pylist()
    assert ids == sorted(set(ids))
    bad = {row["source"]: row for row in pq.read_table(out / "bad.parquet").to_pylist()}
    assert bad["bee/text.jpg"]["image_id"] == image_id(h.broken("text"))


def test_the_manifest_tells_the_truth(tmp_path, tasks_here):
    plant(tmp_path / "photos")
    report = packed(tmp_path / "photos", tmp_path, shard_bytes=8_000)
    assert report.shards > 1
    shards = open_shards(str(tmp_path / "shards"))
    assert (shards.packed, shards.has_labels, shards.rows) == (True, True, 27)
    assert shards.digest == report.digest
    assert sum(file.bytes for file in shards.files) == report.bytes
    size = sum(len(image) for image in table_of(tmp_path)["image"].to_pylist())
    for index, file in enumerate(shards.files):
        meta = pq.ParquetFile(file.path).metadata
        groups = tuple(meta.row_group(i).num_rows for i in range(meta.num_row_groups))
        assert file.row_groups == groups
        assert max(groups) <= 8
        low, high = id_range(int(file.name[5:10]), -(-size // 8_000))
        for group in range(len(groups)):
            assert all(low <= name < high for name in read_row_group(shards, index, group).hex_ids)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("labels", "folders", "names"),
    [
        ("auto", ("ant", "bee"), ("ant", "bee")),
        ("auto", ("ant",), ()),
        ("folder", ("ant",), ("ant",)),
        ("none", ("ant", "bee"), ()),
        ("auto", ("deep/er/ant", "bee"), ("ant", "bee")),
    ],
)
def test_labels_by_folder(tmp_path, tasks_here, labels, folders, names):
    for i, folder in enumerate(folders):
        write(tmp_path / "photos" / folder / "x.jpg", h.jpeg(i))
    write(tmp_path / "photos" / "loose.jpg", h.jpeg(99))
    report = packed(tmp_path / "photos", tmp_path, labels=labels)
    assert report.class_names == names
    for row in table_of(tmp_path).to_pylist():
        want = row["source"].split("/")[-2] if names and "/" in row["source"] else None
        assert (None if row["label"] is None else names[row["label"]]) == want
    assert open_shards(str(tmp_path / "shards")).has_labels == bool(names)


def test_links_and_pipes(tmp_path, tasks_here):
    root = tmp_path / "photos"
    write(root / "real.jpg", h.jpeg(1))
    secret = write(tmp_path / "elsewhere" / "secret.jpg", h.jpeg(2))
    (root / "out.jpg").symlink_to(secret)
    (root / "climb.jpg").symlink_to("../elsewhere/secret.jpg")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "broken.jpg").symlink_to("nothing.jpg")
    (root / "inside.jpg").symlink_to("real.jpg")
    os.mkfifo(root / "pipe.jpg")
    report = packed(root, tmp_path)
    assert bad_of(tmp_path) == {
        name: "link" for name in ("out.jpg", "climb.jpg", "folder", "broken.jpg")
    } | {"pipe.jpg": "not_an_image"}
    assert others_of(tmp_path) == {"loop": "link"}  # what is behind it is read where it lies
    assert table_of(tmp_path)["source"].to_pylist() == ["inside.jpg"]
    assert report.duplicates == 1


def test_a_name_that_is_no_utf8(tmp_path, tasks_here):
    (tmp_path / "photos").mkdir()
    name = os.fsencode(tmp_path / "photos") + b"/caf\xe9.jpg"
    Path(os.fsdecode(name)).write_bytes(h.jpeg(1))
    write(tmp_path / "photos" / "näme ✓.jpg", h.jpeg(2))
    packed(tmp_path / "photos", tmp_path)
    assert set(table_of(tmp_path)["source"].to_pylist()) == {"caf\\xe9.jpg", "näme ✓.jpg"}


def test_limits(tmp_path, tasks_here):
    write(tmp_path / "photos" / "a.jpg", h.jpeg(1))
    write(tmp_path / "photos" / "heavy.png", h.encode(np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), np.uint8)))  # fmt: skip
    write(tmp_path / "photos" / "large.jpg", h.jpeg(2, 80, 80))
    packed(tmp_path / "photos", tmp_path, max_image_bytes=10_000, max_pixels=6_000)
    assert bad_of(tmp_path) == {"heavy.png": "too_large", "large.jpg": "too_large"}


def test_a_file_that_cannot_be_read(tmp_path, tasks_here, monkeypatch):
    write(tmp_path / "photos" / "a.jpg", h.jpeg(1))
    write(tmp_path / "photos" / "gone.jpg", h.jpeg(2))
    plan = sources.plan_tasks

    def plan_then_lose(*args):
        planned = plan(*args)
        (tmp_path / "photos" / "gone.jpg").unlink()
        return planned

    monkeypatch.setattr(packing, "plan_tasks", plan_then_lose)
    packed(tmp_path / "photos", tmp_path)
    assert bad_of(tmp_path) == {"gone.jpg": "unreadable"}


# ---- archives


def tar_of(members, mode="w", **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode, **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                archive.addfile(info)
    return stream.getvalue()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz", "photos.tgz"])
def test_archives(tmp_path, tasks_here, name, form):
    long_name = "ant/" + "x" * 150 + ".jpg"
    good = {
        "ant/1.jpg": h.jpeg(1),
        "deep/bee/2.png": h.encode(h.pattern(seed=2)),
        long_name: h.jpeg(3),
        "root.jpg": h.jpeg(4),
    }
    hostile = [
        ("../evil.jpg", h.jpeg(5)),
        ("/abs.jpg", h.jpeg(6)),
        ("ant/../../evil.jpg", h.jpeg(7)),
        ("ant/link.jpg", (tarfile.SYMTYPE, "/etc/passwd")),
        ("ant/hard.jpg", (tarfile.LNKTYPE, "ant/1.jpg")),
        ("ant/pipe.jpg", (tarfile.FIFOTYPE, "")),
        ("ant/cut.jpg", h.cut(h.jpeg(8))),
    ]
    left = {
        "ant/._1.jpg": (b"mac", "hidden"), "./.x/y.jpg": (h.jpeg(9), "hidden"),
        "ant/notes.txt": (b"words", "no_image"), "fifo": ((tarfile.FIFOTYPE, ""), "no_image"),
    }  # fmt: skip
    skipped = [("ant", (tarfile.DIRTYPE, "")), *((n, content) for n, (content, _) in left.items())]
    mode = "w" if name.endswith(".tar") else "w:gz"
    encoded = tar_of([*good.items(), *hostile, *skipped], mode, format=form)
    write(tmp_path / "in" / name, encoded)
    report = packed(tmp_path / "in", tmp_path)
    assert report.images_in == len(good) + len(hostile)
    rows = {row["source"]: row for row in table_of(tmp_path).to_pylist()}
    assert {s: row["image"] for s, row in rows.items()} == {
        f"{name}/{k}": v for k, v in good.items()
    }
    assert report.class_names == ("ant", "bee")
    assert rows[f"{name}/deep/bee/2.png"]["label"] == 1
    assert rows[f"{name}/root.jpg"]["label"] is None
    assert bad_of(tmp_path) == {
        f"{name}/../evil.jpg": "outside",
        f"{name}//abs.jpg": "outside",
        f"{name}/ant/../../evil.jpg": "outside",
        f"{name}/ant/link.jpg": "link",
        f"{name}/ant/hard.jpg": "link",
        f"{name}/ant/pipe.jpg": "not_an_image",
        f"{name}/ant/cut.jpg": "truncated",
    }
    assert others_of(tmp_path) == {f"{name}/{n}": reason for n, (_, reason) in left.items()}
    assert not list(tmp_path.rglob("*evil*"))


def test_a_broken_archive_is_never_taken_for_a_whole_one(tmp_path, tasks_here):
    members = [(f"a/{i}.jpg", h.jpeg(i)) for i in range(4)]
    whole = tar_of(members)
    end = whole.rindex(b"\xff\xd9") + 2  # what follows is padding and the end mark
    for number, size in enumerate((100, 512, 700, end // 2, end - 1, end)):
        out = tmp_path / f"{number}"
        write(out / "in" / "x.tar", whole[:size])
        write(out / "in" / "y.jpg", h.jpeg(50))
        report = packed(out / "in", out)
        assert bad_of(out)["x.tar"] in ("truncated", "undecodable"), size
        assert report.images_packed >= 1
    zipped = gzip.compress(whole, mtime=0)
    damaged = bytearray(whole)
    second = damaged.index(b"a/1.jpg")
    damaged[second : second + 512] = b"?" * 512
    cases = {
        "cut.tgz": zipped[: len(zipped) // 2],
        "head.tar": bytes(damaged),
        "text.tar": b"hello",
        "empty.tar": b"",
        "text.tgz": b"hello" * 300,
    }
    for name, content in cases.items():
        write(tmp_path / "in" / name, content)
    write(tmp_path / "in" / "y.jpg", h.jpeg(50))
    packed(tmp_path / "in", tmp_path)
    assert {s: r for s, r in bad_of(tmp_path).items() if s in cases} == {
        "cut.tgz": "truncated", "head.tar": "undecodable", "text.tar": "truncated",
        "empty.tar": "truncated", "text.tgz": "undecodable",
    }  # fmt: skip
    assert "head.tar/a/0.jpg" in table_of(tmp_path)["source"].to_pylist()


def test_a_header_record_that_would_fill_the_memory(tmp_path, tasks_here):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    write(tmp_path / "in" / "bomb.tar", info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    write(tmp_path / "in" / "y.jpg", h.jpeg(50))
    packed(tmp_path / "in", tmp_path)
    assert bad_of(tmp_path) == {"bomb.tar": "undecodable"}


# ---- parquet


def hub(path: Path, images, labels=None, names=None, extra=None, **options):
    table = data.hub_table(images, labels, names or (), **extra or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)


def test_hub_parquet_with_extra_columns(tmp_path, tasks_here):
    images = [h.jpeg(i) for i in range(5)]
    extra = {
        "caption": pa.array([f"picture {i}" for i in range(5)]),
        "boxes": pa.array([[[i, 2, 3, 4]] for i in range(5)], pa.list_(pa.list_(pa.int32()))),
        "source": pa.array(["camera"] * 5),
    }
    hub(tmp_path / "in" / "a.parquet", [*images, None, b"junk"], [0, 1, 2, -1, None, 0, 0],
        ["x", "y", "z"], {k: pa.concat_arrays([v, pa.nulls(2, v.type)]) for k, v in extra.items()},
        row_group_size=3)  # fmt: skip
    hub(tmp_path / "in" / "b.parquet", [h.jpeg(9)], [2], ["x", "y", "z"])
    report = packed(tmp_path / "in", tmp_path)
    assert (report.images_in, report.images_packed) == (8, 6)
    assert bad_of(tmp_path) == {"a.parquet#5": "empty", "a.parquet#6": "not_an_image"}
    assert report.class_names == ("x", "y", "z")
    rows = {row["source"]: row for row in table_of(tmp_path).to_pylist()}
    assert [rows[f"a.parquet#{i}"]["label"] for i in range(5)] == [0, 1, 2, None, None]
    assert [rows[f"a.parquet#{i}"]["image"] for i in range(5)] == images
    assert rows["a.parquet#3"]["boxes"] == [[3, 2, 3, 4]]
    assert rows["a.parquet#3"]["caption"] == "picture 3"
    assert rows["a.parquet#3"]["original_source"] == "camera"
    assert rows["b.parquet#0"]["caption"] is None
    assert rows["b.parquet#0"]["label"] == 2


def test_a_mixed_source_has_one_list_of_classes(tmp_path, tasks_here):
    hub(tmp_path / "in" / "a.parquet", [h.jpeg(1), h.jpeg(2)], [0, 1], ["dog", "cat"])
    hub(tmp_path / "in" / "b.parquet", [h.jpeg(3)], [0], ["bee"])
    write(tmp_path / "in" / "cat" / "x.jpg", h.jpeg(4))
    write(tmp_path / "in" / "ant" / "y.jpg", h.jpeg(5))
    write(tmp_path / "in" / "more.tar", tar_of([("ant/z.jpg", h.jpeg(6))]))
    report = packed(tmp_path / "in", tmp_path)
    assert report.class_names == ("ant", "bee", "cat", "dog")
    labels = {r["source"]: report.class_names[r["label"]] for r in table_of(tmp_path).to_pylist()}
    assert labels == {
        "a.parquet#0": "dog", "a.parquet#1": "cat", "b.parquet#0": "bee", "cat/x.jpg": "cat",
        "ant/y.jpg": "ant", "more.tar/ant/z.jpg": "ant",
    }  # fmt: skip


def test_other_column_names_and_labels_without_names(tmp_path, tasks_here):
    table = pa.table({"img": [h.jpeg(1), h.jpeg(2)], "cls": pa.array([7, 3], pa.uint8())})
    write(tmp_path / "in" / "a.parquet", b"")
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    report = packed(tmp_path / "in", tmp_path, image_column="img", label_column="cls")
    assert report.class_names == ()
    assert sorted(table_of(tmp_path)["label"].to_pylist()) == [3, 7]
    write(tmp_path / "in" / "ant" / "x.jpg", h.jpeg(3))
    write(tmp_path / "in" / "bee" / "x.jpg", h.jpeg(4))
    with pytest.raises(DataError, match="without class names"):
        packed(tmp_path / "in", tmp_path, image_column="img", label_column="cls")
    report = packed(
        tmp_path / "in", tmp_path, image_column="img", label_column="cls", labels="none"
    )
    assert report.images_packed == 4
    assert table_of(tmp_path)["label"].null_count == 4


def labelled(path: Path, first: int, column: pa.Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([h.jpeg(first + i) for i in range(len(column))], pa.binary())
    pq.write_table(pa.table({"image": images, "label": column}), path)


def names_by_source(out: Path, names) -> dict[str, str | None]:
    rows = table_of(out).to_pylist()
    return {r["source"]: None if r["label"] is None else names[r["label"]] for r in rows}


def test_label_columns_of_names_become_classes(tmp_path, tasks_here):
    text = ["cat", None, "e\u0301mu", ""]
    labelled(tmp_path / "in" / "a.parquet", 0, pa.array(text))
    labelled(tmp_path / "in" / "b.parquet", 10, pa.array(["\u00e9mu", "ant"]).dictionary_encode())
    labelled(tmp_path / "in" / "c.parquet", 20, pa.array([True, False]))
    hub(tmp_path / "in" / "d.parquet", [h.jpeg(30), h.jpeg(31)], [1, -1], ["cat", "dog"])
    write(tmp_path / "in" / "bee" / "x.jpg", h.jpeg(40))
    report = packed(tmp_path / "in", tmp_path, labels="folder")
    assert report.class_names == ("ant", "bee", "cat", "dog", "false", "true", "\u00e9mu")
    assert names_by_source(tmp_path, report.class_names) == {
        "a.parquet#0": "cat", "a.parquet#1": None, "a.parquet#2": "\u00e9mu", "a.parquet#3": None,
        "b.parquet#0": "\u00e9mu", "b.parquet#1": "ant", "c.parquet#0": "true",
        "c.parquet#1": "false", "d.parquet#0": "dog", "d.parquet#1": None, "bee/x.jpg": "bee",
    }  # fmt: skip


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path, tasks_here):
    for i, name in enumerate(("e\u0301toile", "\u00e9toile", "zebra")):
        write(tmp_path / "in" / f"{i}" / name / "x.jpg", h.jpeg(i))
    report = packed(tmp_path / "in", tmp_path)
    assert report.class_names == ("zebra", "\u00e9toile")
    labels = {r["source"]: r["label"] for r in table_of(tmp_path).to_pylist()}
    assert [labels[source] for source in sorted(labels)] == [1, 1, 0]


def test_label_columns_that_are_no_classes_and_labels_none(tmp_path, tasks_here):
    columns = {
        "double": pa.array([0.5, float("nan")]), "list": pa.array([[1], [2]]),
        "struct": pa.array([{"a": 1}, None]), "timestamp": pa.array([1, 2], pa.timestamp("s")),
        "decimal": pa.array([1, 2]).cast(pa.decimal128(30, 2)), "text": pa.array(["a", "b"]),
    }  # fmt: skip
    for name, column in columns.items():
        labelled(tmp_path / name / "a.parquet", 0, column)
        if name != "text":
            with pytest.raises(DataError, match=f'column "label" of a.parquet holds {name}'):
                packed(tmp_path / name, tmp_path / f"{name}_out")
        # two files that disagree about the column: it is not looked at
        labelled(tmp_path / name / "b.parquet", 10, pa.array([7, 8]))
        report = packed(tmp_path / name, tmp_path / f"{name}_out", labels="none")
        assert (report.images_packed, report.class_names) == (4, ())
        table = table_of(tmp_path / f"{name}_out")
        assert table["label"].null_count == 4
        assert table.schema.names == IMAGE_SHARD_SCHEMA.names


def test_names_in_one_file_and_bare_ids_in_another_are_refused(tmp_path, tasks_here):
    hub(tmp_path / "in" / "a.parquet", [h.jpeg(1)], [0], ["cat", "dog"])
    hub(tmp_path / "in" / "b.parquet", [h.jpeg(2)], [1])
    with pytest.raises(DataError, match="label ids without class names beside"):
        packed(tmp_path / "in", tmp_path)
    # without a label the file says nothing about classes
    hub(tmp_path / "in" / "b.parquet", [h.jpeg(2)], [-1])
    assert packed(tmp_path / "in", tmp_path).class_names == ("cat", "dog")
    labelled(tmp_path / "text" / "a.parquet", 0, pa.array(["cat"]))
    hub(tmp_path / "text" / "b.parquet", [h.jpeg(2)], [1])
    with pytest.raises(DataError, match="label ids without class names beside"):
        packed(tmp_path / "text", tmp_path / "out")


def test_an_extra_column_of_two_types_keeps_its_values_or_is_named(tmp_path, tasks_here):
    # whole numbers beside fractions: exact where a double holds them, else refused
    exact = {"k": pa.array([7, None])}
    hub(tmp_path / "small" / "a.parquet", [h.jpeg(1), h.jpeg(2)], extra=exact)
    hub(tmp_path / "small" / "b.parquet", [h.jpeg(3)], extra={"k": pa.array([0.5])})
    assert packed(tmp_path / "small", tmp_path / "s").images_packed == 3
    assert sorted(filter(None, table_of(tmp_path / "s")["k"].to_pylist())) == [0.5, 7.0]
    cases = {
        "wide": (pa.array([2**60 + 1]), pa.array([0.5]), "int64"),
        "unsigned": (pa.array([2**63 + 5], pa.uint64()), pa.array([1]), "uint64"),
        "nested": (pa.array([[2**60 + 1]]), pa.array([[0.5]]), "list"),
    }
    for name, (first, second, kind) in cases.items():
        hub(tmp_path / name / "a.parquet", [h.jpeg(1)], extra={"k": first})
        hub(tmp_path / name / "b.parquet", [h.jpeg(2)], extra={"k": second})
        with pytest.raises(DataError, match=f'column "k" is {kind}.* in a.parquet'):
            packed(tmp_path / name, tmp_path / f"{name}_out")


def test_damaged_parquet(tmp_path, tasks_here):
    hub(tmp_path / "in" / "a.parquet", [h.jpeg(i) for i in range(6)], row_group_size=3,
        compression="none", use_dictionary=False)  # fmt: skip
    content = bytearray((tmp_path / "in" / "a.parquet").read_bytes())
    chunk = pq.ParquetFile(tmp_path / "in" / "a.parquet").metadata.row_group(1).column(0)
    content[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    write(tmp_path / "in" / "a.parquet", bytes(content))
    write(tmp_path / "in" / "b.parquet", b"PAR1 no")
    report = packed(tmp_path / "in", tmp_path)
    assert report.images_packed == 3
    assert bad_of(tmp_path) == {f"a.parquet#{i}": "undecodable" for i in (3, 4, 5)} | {
        "b.parquet": "undecodable"
    }


def test_packing_packed_shards_changes_nothing(tmp_path, tasks_here):
    plant(tmp_path / "photos")
    first = packed(tmp_path / "photos", tmp_path / "one", shard_bytes=9_000)
    second = packed(tmp_path / "one" / "shards", tmp_path / "two", shard_bytes=9_000)
    assert (second.images_packed, second.digest) == (27, first.digest)
    for file in (tmp_path / "one" / "shards").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "two" / "shards" / file.name).read_bytes()


# ---- the same bytes, whatever happens


def contents(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "shards").iterdir())}


def mixed(root: Path) -> Path:
    good = plant(root)
    write(root / "cow" / "copy.png", good["ant/001.png"])
    write(root / "ant" / "bad.jpg", b"bad")
    write(
        root / "x.tar", tar_of([("dog/1.jpg", h.jpeg(61)), ("dog/copy.png", good["ant/001.png"])])
    )
    hub(root / "y.parquet", [h.jpeg(i) for i in range(70, 80)], extra={"n": pa.array(range(10))},
        row_group_size=2)  # fmt: skip
    return root


def test_tasks_runs_and_their_order_do_not_show(tmp_path, monkeypatch):
    source = mixed(tmp_path / "photos")
    monkeypatch.setattr(packing, "_each", lambda function, items: map(function, items))
    packed(source, tmp_path / "one", shard_bytes=9_000)

    def shuffled(function, items):
        return map(function, random.Random(1).sample(list(items), len(items)))

    monkeypatch.setattr(packing, "_each", shuffled)
    monkeypatch.setattr(sources, "TASK_BYTES", 2_000)
    monkeypatch.setattr(packing, "RUN_BYTES", 1_500)
    packed(source, tmp_path / "many", shard_bytes=9_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert bad_of(tmp_path / "one") == bad_of(tmp_path / "many") == {"ant/bad.jpg": "not_an_image"}
    tables = [(tmp_path / name / "bad.parquet").read_bytes() for name in ("one", "many")]
    assert tables[0] == tables[1]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("kind", "number"), [("read", 1), ("read", 3), ("write", 1), ("write", 2)])
def test_a_killed_pack_goes_on(tmp_path, monkeypatch, tasks_here, kind, number):
    source = mixed(tmp_path / "photos")
    monkeypatch.setattr(sources, "TASK_BYTES", 4_000)
    packed(source, tmp_path / "straight", shard_bytes=9_000)
    calls = Counter()

    def counted(name, function):
        def call(*args):
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(packing, "write_runs", counted("read", runs.write_runs))
    monkeypatch.setattr(packing, "write_shard", counted("write", merge.write_shard))
    tasks = {}

    def kill(what, done, total):
        tasks[what] = total
        if (what, done) == (kind, number):
            raise Killed

    with pytest.raises(Killed):
        packed(source, tmp_path / "out", shard_bytes=9_000, progress=kill)
    with pytest.raises(DataError):
        open_shards(str(tmp_path / "out" / "shards"))
    write(tmp_path / "out" / "shards" / ".part-00001.parquet.0123abcd.tmp", b"half a shard")
    again = packed(source, tmp_path / "out", shard_bytes=9_000,
                   progress=lambda what, done, total: tasks.update({what: total}))  # fmt: skip
    assert calls == tasks  # each task ran once, over both runs
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert again.images_in == again.images_packed + again.duplicates + sum(again.bad.values())


def test_a_lost_shard_is_written_again(tmp_path, tasks_here, monkeypatch):
    source = mixed(tmp_path / "photos")
    first = packed(source, tmp_path, shard_bytes=9_000)
    before = contents(tmp_path)
    assert packed(source, tmp_path, shard_bytes=9_000) == first  # nothing to do
    (tmp_path / "shards" / "part-00001.parquet").unlink()
    packed(source, tmp_path, shard_bytes=9_000)
    assert contents(tmp_path) == before

    def stop(what, done, total):
        if (what, done) == ("write", 3):
            raise Killed

    write(tmp_path / "photos" / "new.jpg", h.jpeg(123))  # a changed source is another pack
    with pytest.raises(Killed):
        packed(source, tmp_path, shard_bytes=9_000, progress=stop)
    cut = tmp_path / "shards" / "part-00000.parquet"
    cut.write_bytes(cut.read_bytes()[:100])
    report = packed(source, tmp_path, shard_bytes=9_000)
    assert report.images_in == first.images_in + 1
    assert (
        open_shards(str(tmp_path / "shards")).rows
        == report.images_packed
        == len(table_of(tmp_path))
    )


@given(st.integers(1, 300), st.integers(0, 2**128 - 1))
def test_every_id_is_in_exactly_one_range(shards, value):
    ranges = [id_range(i, shards) for i in range(shards)]
    assert sum(low <= f"{value:032x}" < high for low, high in ranges) == 1


# ---- mistakes


def test_too_many_bad_images_end_it_after_the_table_is_written(tmp_path, tasks_here):
    good = plant(tmp_path / "photos")
    write(tmp_path / "photos" / "a.jpg", b"")
    write(tmp_path / "photos" / "b.jpg", b"text")
    with pytest.raises(DataError) as caught:
        packed(tmp_path / "photos", tmp_path, max_bad_fraction=0.01)
    assert f"2 of {len(good) + 2} images" in caught.value.what
    assert "1 empty, 1 not_an_image" in caught.value.what
    assert "such as a.jpg (empty), b.jpg (not_an_image)" in caught.value.what
    assert str(tmp_path / "bad.parquet") in caught.value.hint
    assert bad_of(tmp_path) == {"a.jpg": "empty", "b.jpg": "not_an_image"}
    ran = []
    packed(tmp_path / "photos", tmp_path, max_bad_fraction=0.1,
           progress=lambda what, *_: ran.append(what))  # fmt: skip
    assert ran == ["write"]  # what was read before is used


def mistake(*args, **options):
    with pytest.raises(DataError) as caught:
        packed(*args, **options)
    assert caught.value.hint
    return caught.value.what


def test_mistakes_have_sentences(tmp_path, tasks_here):
    assert "no such path" in mistake(tmp_path / "nowhere", tmp_path)
    assert "no such path" in mistake(tmp_path / "nowhere" / "*.tar", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no files under" in mistake(tmp_path / "empty", tmp_path)
    write(tmp_path / "note", b"words")
    (tmp_path / "empty" / "away").symlink_to(tmp_path / "note")
    (tmp_path / "empty" / ".hidden").touch()
    with pytest.raises(DataError, match=r"but 2 .* such as \.hidden \(hidden\), away") as error:
        list_source(str(tmp_path / "empty"))
    assert "data.follow_links=true" in error.value.hint
    write(tmp_path / "texts" / "a.txt", b"words")
    assert "could be read: 1 other file left alone" in mistake(tmp_path / "texts", tmp_path)
    write(tmp_path / "texts" / "b.jpg", b"words")
    said = mistake(tmp_path / "texts", tmp_path)
    assert "could be read: 1 not_an_image, 1 other file left alone" in said
    hub(tmp_path / "cols" / "a.parquet", [h.jpeg(1)])
    said = mistake(tmp_path / "cols", tmp_path, image_column="picture")
    assert 'no column "picture" (found: image)' in said
    assert "lies inside the source" in mistake(tmp_path, tmp_path / "out")
    hub(tmp_path / "many" / "a.parquet", [h.jpeg(1)], [5], ["only", "two"])
    assert "a label is 5 but a.parquet names only 2" in mistake(tmp_path / "many", tmp_path)


def test_nothing_of_others_is_overwritten(tmp_path, tasks_here):
    plant(tmp_path / "photos")
    plant(tmp_path / "others", each=3)
    packed(tmp_path / "photos", tmp_path)
    before = contents(tmp_path)
    assert "holds the shards of" in mistake(tmp_path / "others", tmp_path)
    assert contents(tmp_path) == before
    write(tmp_path / "x" / "shards" / "part-00000.parquet", b"")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x" / "shards" / "part-00000.parquet")
    assert "which this project did not write" in mistake(tmp_path / "photos", tmp_path / "x")
    # The same source with other arguments replaces its older shards.
    assert packed(tmp_path / "photos", tmp_path, shard_bytes=5_000).shards > 1
    assert len(table_of(tmp_path)) == 27


def test_an_unfinished_pack_is_no_source(tmp_path, tasks_here):
    plant(tmp_path / "photos")
    packed(tmp_path / "photos", tmp_path, shard_bytes=9_000)
    (tmp_path / "shards" / "_manifest.json").unlink()
    assert "packing was not finished" in mistake(tmp_path / "shards", tmp_path / "again")


# ---- other channels than RGB


def numpy_file(seed: int, channels: int = 6) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.random.default_rng(seed).integers(0, 256, (20, 30, channels), np.uint8))
    return stream.getvalue()


def bands(root: Path) -> dict[str, bytes]:
    """Numpy files of six channels in a folder, an archive and a table: source -> bytes."""
    write(root / "sea" / "a.npy", numpy_file(0))
    with tarfile.open(root / "more.tar", "w") as archive:
        for i in (1, 2):
            about = tarfile.TarInfo(f"sea/{i}.npy")
            about.size = len(numpy_file(i))
            archive.addfile(about, io.BytesIO(numpy_file(i)))
    pq.write_table(pa.table({"image": [numpy_file(3)]}), root / "table.parquet")
    places = ("sea/a.npy", "more.tar/sea/1.npy", "more.tar/sea/2.npy", "table.parquet#0")
    return {place: numpy_file(i) for i, place in enumerate(places)}


def test_numpy_files_are_packed_as_they_came(tmp_path, tasks_here):
    good = bands(tmp_path / "land")
    bad = {"sea/rgb.png": h.encode(h.pattern()), "sea/three.npy": numpy_file(9, channels=3)}
    for source, encoded in bad.items():
        write(tmp_path / "land" / source, encoded)
    write(tmp_path / "land" / "sea" / "cut.npy", numpy_file(8)[:-1])
    report = packed(tmp_path / "land", tmp_path / "six", channels=6)
    assert bad_of(tmp_path / "six") == dict.fromkeys(bad, "undecodable") | {
        "sea/cut.npy": "truncated"
    }
    assert report.images_packed == len(good)
    rows = {row["source"]: row for row in table_of(tmp_path / "six").to_pylist()}
    assert {source: row["image"] for source, row in rows.items()} == good
    for row in rows.values():
        assert (row["width"], row["height"], row["format"]) == (30, 20, "NPY")
    # As RGB, the other two are the good ones.
    assert packed(tmp_path / "land", tmp_path / "three").images_packed == 2
    assert set(bad_of(tmp_path / "three")) == {*good, "sea/cut.npy"}


def test_other_channels_are_another_pack_and_three_are_not(tmp_path, tasks_here, monkeypatch):
    plant(tmp_path / "photos")
    keys = []
    kept = ledger.key_of
    monkeypatch.setattr(
        ledger, "key_of", lambda *a: keys.append((kept(*a), list(a[1]))) or keys[-1][0]
    )
    for options in ({}, {"channels": 3}, {"channels": 1}, {"channels": 4}):
        assert packed(tmp_path / "photos", tmp_path, **options).images_packed == 27
    assert keys[0] == keys[1]
    assert len({key for key, _ in keys}) == 3
    assert keys[0][1][-2:] == [256 * 2**20, 8]  # the key of before there was a choice


# ---- other file systems


def test_uris(tmp_path, tasks_here):
    source = mixed(tmp_path / "a folder")
    packed(source, tmp_path / "plain", shard_bytes=9_000)
    pack(
        source.as_uri(),
        (tmp_path / "uri" / "shards").as_uri(),
        PackPlaces(
            bad_images=(tmp_path / "uri" / "bad.parquet").as_uri(),
            scratch=(tmp_path / "uri" / "work").as_uri(),
        ),
        PackOptions(max_bad_fraction=1.0, row_group_images=8, shard_bytes=9000),
    )
    plain, uri = contents(tmp_path / "plain"), contents(tmp_path / "uri")
    assert {k: v for k, v in plain.items() if k != "_manifest.json"} == {
        k: v for k, v in uri.items() if k != "_manifest.json"
    }


def test_a_file_system_that_is_not_local(tmp_path, tasks_here, monkeypatch):
    source = mixed(tmp_path / "photos")
    packed(source, tmp_path / "plain", shard_bytes=9_000)
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    plain = storage._filesystem

    def filesystem(uri):
        return (remote, uri.removeprefix("far://")) if uri.startswith("far://") else plain(uri)

    monkeypatch.setattr(storage, "_filesystem", filesystem)
    pack(
        "far://photos",
        "far://far/shards",
        PackPlaces(bad_images="far://far/bad.parquet", scratch="far://far/work"),
        PackOptions(max_bad_fraction=1.0, row_group_images=8, shard_bytes=9000),
    )
    plain_files, far_files = contents(tmp_path / "plain"), contents(tmp_path / "far")
    assert (
        json.loads(far_files.pop("_manifest.json"))["digest"]
        == json.loads(plain_files.pop("_manifest.json"))["digest"]
    )
    assert far_files == plain_files


def test_keys_in_a_uri_are_not_written_down():
    assert storage.public_uri("s3://KEY:SECRET@bucket/a?region=x") == "s3://bucket/a?region=x"


# ---- on Ray


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_the_shards_are_the_same(tmp_path, monkeypatch, capfd):
    source = mixed(tmp_path / "photos")
    monkeypatch.setattr(sources, "TASK_BYTES", 20_000)
    seen = []
    report = packed(source, tmp_path / "ray", shard_bytes=20_000,
                    progress=lambda *a: seen.append(a))  # fmt: skip
    assert report.seconds > 0
    assert [a for a in seen if a[0] == "write"][-1][1] == report.shards
    assert capfd.readouterr() == ("", "")  # no bars, no notes of Ray
    monkeypatch.setattr(packing, "_each", lambda function, items: map(function, items))
    packed(source, tmp_path / "serial", shard_bytes=20_000)
    assert contents(tmp_path / "ray") == contents(tmp_path / "serial")


@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_a_storage_error_is_one_sentence(tmp_path):
    plant(tmp_path / "photos")
    write(tmp_path / "out" / "shards" / "part-00000.parquet" / "x", b"in the way")
    with pytest.raises(DataError, match="packing stopped") as caught:
        packed(tmp_path / "photos", tmp_path / "out")
    assert "part-00000.parquet" in caught.value.what
    assert "goes on where it stopped" in caught.value.hint
    (tmp_path / "out" / "shards" / "part-00000.parquet" / "x").unlink()
    (tmp_path / "out" / "shards" / "part-00000.parquet").rmdir()
    assert packed(tmp_path / "photos", tmp_path / "out").images_packed == 27


@pytest.mark.usefixtures("ray_cluster")
def test_cifar10_is_no_longer_sorted_by_class(shared, tmp_path):
    source = shared / "data" / "cifar10" / "test-*.parquet"
    report = packed(source, tmp_path, row_group_images=256)
    assert (report.images_in, report.images_packed, report.bad) == (10_000, 10_000, {})
    assert report.class_names[3] == "cat"
    table = table_of(tmp_path)
    labels = table["label"].to_numpy()
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 1000))
    # Equal neighbours: 9,991 of 9,999 before; 1 in 10 (sd 30) in a random order.
    assert abs((labels[1:] == labels[:-1]).sum() - 1000) < 150
    assert min(np.bincount(labels[:1000], minlength=10)) > 60
    original = pq.read_table(next((shared / "data" / "cifar10").glob("test-*.parquet")))
    want = {
        (image_id(image["bytes"]), label)
        for image, label in zip(
            original["image"].to_pylist(), original["label"].to_pylist(), strict=True
        )
    }
    assert set(zip(table["image_id"].to_pylist(), labels.tolist(), strict=True)) == want


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_thousand_photos_and_thirty_broken_files(shared, tmp_path):
    photos = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))
    assert len(photos) == 1000
    (tmp_path / "photos").mkdir()
    for photo in photos:
        (tmp_path / "photos" / photo.name).write_bytes(photo.read_bytes())
    want = {}
    for kind in h.BROKEN_KINDS:
        for seed in range(3):
            name = f"broken_{kind}_{seed}.jpg"
            write(tmp_path / "photos" / name, h.broken(kind, seed))
            want[name] = h.BROKEN_REASONS[kind]
    assert len(want) == 30
    with pytest.raises(DataError, match=r"30 of 1030 images .* are bad \(2.91 %, allowed 1.00 %\)"):
        packed(tmp_path / "photos", tmp_path, max_bad_fraction=0.01)
    assert bad_of(tmp_path) == want
    report = packed(tmp_path / "photos", tmp_path, max_bad_fraction=0.05, shard_bytes=2**25)
    assert (report.images_in, report.images_packed, report.duplicates) == (1030, 1000, 0)
    rows = {row["source"]: row for row in table_of(tmp_path).to_pylist()}
    assert {photo.name: photo.read_bytes() for photo in photos} == {
        source: row["image"] for source, row in rows.items()
    }
