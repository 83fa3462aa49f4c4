"""Curated shards against the images that went in and a plain sort of those that are kept."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.curate.decide.decide import Mix, decide, starts_of
from pipeline.curate.decide.file_rows import Known
from pipeline.curate.decide.shard_form import form_of
from pipeline.curate.decide.shard_write import Selection
from pipeline.curate.decide.shards import write_curated
from pipeline.curate.decide.tally import Sources
from pipeline.curate.rows.tables import AS_IS, POOL, Inputs
from pipeline.curate.steps import tasks
from pipeline.curate.steps.steps import Steps
from pipeline.errors import DataError
from pipeline.images.decode import decode, image_format
from pipeline.shards.columns import image_id
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from tests.curate.piles import fingerprints, hub, picture
from tests.data import packed
from tests.images.test_dicom import dicom
from tests.standins import tasks_here


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    tasks_here(monkeypatch)


def pile(tmp_path: Path, monkeypatch) -> list:
    """A pack of 30 photos of two classes, 40 rows of a hub in three files with extra columns."""
    for seed in range(30):
        place = tmp_path / "photos" / ("cat" if seed % 2 else "dog") / f"{seed}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(seed))
    packed(tmp_path / "photos", tmp_path / "pack", row_group_images=8)
    pack = open_shards(str(tmp_path / "pack" / "shards"))
    images = [picture(100 + i, quality=i % 2) for i in range(40)]
    loose = hub(
        tmp_path / "hub",
        [images[:15], images[15:15], images[15:]],
        caption=[f"number {i}" for i in range(40)],
        width=[str(i) for i in range(40)],
    )
    return [("pool", POOL, loose), ("seeds", AS_IS, pack)]


def decisions(tmp_path: Path, sets: list, share: float = 0.7):
    inputs = Inputs.of(sets)
    prints = fingerprints(tmp_path / "fp", inputs)
    step = Steps(tmp_path).run(
        "decisions",
        decide,
        inputs.by_name,
        starts=starts_of(inputs),
        known=Known(prints),
        sources={name: Sources(name) for name, _, _ in sets},
        mix=Mix(1, {"pool": share}),
    )
    return inputs, prints.folder, step


def curated(
    tmp_path: Path,
    sets: list,
    share: float = 0.7,
    size: int = 4000,
    rows: int = 7,
    shards: Path | None = None,
):
    inputs, prints, result = decisions(tmp_path, sets, share)
    named = [(name, shards) for name, _, shards in sets]
    return (
        write_curated(
            shards or tmp_path / "curated", tmp_path / "work",
            Selection(named, inputs, result, prints), shard_bytes=size, row_group_images=rows,
        ),
        result,
    )  # fmt: skip


def test_what_is_kept_is_in_the_shards_in_order_of_ids(tmp_path, monkeypatch):
    sets = pile(tmp_path, monkeypatch)
    (written, _), result = curated(tmp_path, sets)
    assert written.packed and len(written.files) > 3
    opened = open_shards(str(tmp_path / "curated"))
    assert opened == written
    table = pa.concat_tables([pq.read_table(f.path) for f in written.files])
    ids = table.column("image_id").to_pylist()
    kept = [
        row["image_id"]
        for name in ("00000", "00001", "00002", "00003")
        for row in pq.read_table(tmp_path / "decisions" / f"{name}.parquet").to_pylist()
        if row["kept"]
    ]
    assert ids == sorted(kept) and len(set(ids)) == len(ids) == result.total("kept") > 40
    for name, encoded in zip(ids, table.column("image").to_pylist(), strict=True):
        assert image_id(encoded) == name
    assert max(max(f.row_groups) for f in written.files) <= 7
    group = read_row_group(written, 0, 0)
    assert group.hex_ids == ids[: len(group)]


def test_columns_of_both_kinds_of_sets(tmp_path, monkeypatch):
    sets = pile(tmp_path, monkeypatch)
    (written, _), _ = curated(tmp_path, sets, share=1.0)
    table = pa.concat_tables([pq.read_table(f.path) for f in written.files])
    assert table.schema.names == [
        "image_id", "image", "width", "height", "format", "source", "label",
        "caption", "original_width",
    ]  # fmt: skip
    rows = {row["image_id"]: row for row in table.to_pylist()}
    for i in range(40):
        row = rows[image_id(picture(100 + i, quality=i % 2))]
        assert (row["caption"], row["original_width"]) == (f"number {i}", str(i))
        assert row["format"] == ("JPEG" if i % 2 else "PNG")
        assert (row["width"], row["height"], row["label"]) == (24, 24, None)
    assert written.class_names == ("cat", "dog")
    for seed in range(30):
        row = rows[image_id(picture(seed))]
        name = "cat" if seed % 2 else "dog"
        assert (row["source"], row["caption"]) == (f"{name}/{seed}.png", None)
        assert written.class_names[row["label"]] == name


def test_the_digest_says_which_images_they_are(tmp_path, monkeypatch):
    sets = pile(tmp_path, monkeypatch)
    (one, _), _ = curated(tmp_path, sets)
    stamps = [Path(file.path).stat().st_mtime_ns for file in one.files]
    (again, _), _ = curated(tmp_path, sets)
    assert again == one  # and nothing was written again
    assert [Path(file.path).stat().st_mtime_ns for file in again.files] == stamps
    (less, _), _ = curated(tmp_path, sets, share=0.5)
    assert less.digest != one.digest and less.rows < one.rows
    manifest = json.loads((tmp_path / "curated" / "_manifest.json").read_text())
    assert manifest["images"] == less.rows and manifest["source"].startswith("curated from ")
    (back, _), _ = curated(tmp_path, sets)
    assert back.digest == one.digest
    (other, _), _ = curated(tmp_path, sets, size=10**9)
    assert len(other.files) == 1
    assert other.rows == back.rows and not (tmp_path / "curated" / "part-00001.parquet").exists()


def test_a_packed_set_in_other_pieces_gives_the_same_shards(tmp_path, monkeypatch):
    """Loose files and a pack of the same images: the same ids in the same shards."""
    images = {f"{seed}.png": picture(seed) for seed in range(25)}
    for name, encoded in images.items():
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(encoded)
    packed(tmp_path / "photos", tmp_path / "pack")
    pack = open_shards(str(tmp_path / "pack" / "shards"))
    loose = hub(tmp_path / "hub", [list(images.values())[:9], list(images.values())[9:]])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (a, _), _ = curated(tmp_path / "a", [("pool", POOL, pack)])
    (b, _), _ = curated(tmp_path / "b", [("pool", POOL, loose)])
    assert a.digest == b.digest
    assert [f.rows for f in a.files] == [f.rows for f in b.files]


def test_a_shard_that_is_gone_is_written_again(tmp_path, monkeypatch):
    sets = pile(tmp_path, monkeypatch)
    (one, _), _ = curated(tmp_path, sets)
    before = {f.name: Path(f.path).read_bytes() for f in one.files}
    Path(one.files[1].path).unlink()
    (again, _), _ = curated(tmp_path, sets)
    assert again.digest == one.digest
    assert {f.name: Path(f.path).read_bytes() for f in again.files} == before


def test_a_kill_between_two_shards(tmp_path, monkeypatch):
    sets = pile(tmp_path, monkeypatch)
    (whole, _), _ = curated(tmp_path, sets)
    before = {f.name: Path(f.path).read_bytes() for f in whole.files}
    (tmp_path / "again").mkdir()
    plain, calls = tasks._task, []

    def dies(folder, task, function):
        if folder.endswith("/curated"):
            calls.append(int(task.name))
            if calls == [0, 1, 2]:
                raise KeyboardInterrupt
        return plain(folder, task, function)

    monkeypatch.setattr(tasks, "_task", dies)
    with pytest.raises(KeyboardInterrupt):
        curated(tmp_path / "again", sets)
    with pytest.raises(DataError, match="packing was not finished"):
        open_shards(str(tmp_path / "again" / "curated"))
    (written, _), _ = curated(tmp_path / "again", sets)
    assert written.digest == whole.digest
    assert {f.name: Path(f.path).read_bytes() for f in written.files} == before
    assert calls.count(2) == 2
    assert calls.count(0) == calls.count(1) == 1


def test_nothing_kept_is_one_sentence(tmp_path, monkeypatch):
    sets = [("pool", POOL, hub(tmp_path / "hub", [[picture(1), picture(2)]]))]
    with pytest.raises(DataError) as caught:
        curated(tmp_path, sets, share=0.0)
    assert caught.value.what == "curation kept none of 2 images"
    assert not (tmp_path / "curated").exists()


def test_a_folder_of_others_is_left_alone(tmp_path, monkeypatch):
    sets = [("pool", POOL, hub(tmp_path / "hub", [[picture(1), picture(2)]]))]
    (tmp_path / "curated").mkdir()
    (tmp_path / "curated" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="holds something that no curation wrote"):
        curated(tmp_path, sets)
    assert (tmp_path / "curated" / "thesis.tex").read_text() == "mine"


def test_shards_of_another_curation_are_left_alone(tmp_path, monkeypatch):
    a, b = (
        [("pool", POOL, hub(tmp_path / name, [[picture(first + i) for i in range(6)]]))]
        for name, first in (("a", 0), ("b", 50))
    )

    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "curated").glob("part-*")}

    def refused(match: str) -> None:
        before = contents()
        with pytest.raises(DataError, match=match):
            curated(tmp_path / "other", b, share=1.0, shards=tmp_path / "curated")
        assert contents() == before

    (tmp_path / "other").mkdir()
    curated(tmp_path, a, share=1.0, size=1000)
    for name in ("notes.txt", "old/part-00000.parquet", "work/runs/mine.txt"):
        place = tmp_path / ("" if name.startswith("work") else "curated") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("mine")
    refused("holds the shards of curated from .*/a; these would be of curated from .*/b")
    manifest = tmp_path / "curated" / "_manifest.json"
    manifest.rename(tmp_path / "aside")
    refused("no manifest says whose shard that is")
    (tmp_path / "aside").rename(manifest)

    plain = tasks._task

    def meanwhile(folder, *arguments):  # another run comes while this one writes
        if folder == str(tmp_path / "curated"):
            refused("another job is writing shards of curated from .*/a")
        return plain(folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "_task", meanwhile)
        curated(tmp_path, a, share=1.0, size=10**9)
    # the same run may curate other images into it
    curated(tmp_path, b, share=1 - 1e-9)  # a key of its own for the decisions
    remaining = open_shards(str(tmp_path / "curated"))
    left = pa.concat_tables([pq.read_table(f.path) for f in remaining.files])[
        "image_id"
    ].to_pylist()
    assert sorted(left) == sorted(image_id(picture(50 + i)) for i in range(6))
    assert (tmp_path / "curated" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "curated" / "old" / "part-00000.parquet").read_text() == "mine"
    assert (tmp_path / "work" / "runs" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("count", [1, 2])
def test_one_and_two_images(tmp_path, monkeypatch, count):
    sets = [("pool", POOL, hub(tmp_path / "hub", [[picture(i) for i in range(count)], []]))]
    (written, _), _ = curated(tmp_path, sets, share=1.0)
    assert written.rows == count and written.packed


def test_labels_of_several_sets(tmp_path, monkeypatch):
    def named(folder: str, names: list[str], labels: list[int], first: int):
        shards = hub(tmp_path / folder, [[picture(first + i) for i in range(3)]], label=labels)
        path = shards.files[0].path
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        pq.write_table(pq.read_table(path).replace_schema_metadata(meta), path)
        return open_shards(str(tmp_path / folder))

    a = named("a", ["cat", "dog"], [0, 1, -1], 0)  # hubs write -1 where there is no class
    b = named("b", ["e\u0301mu", "dog"], [0, 1, 1], 10)  # in another Unicode form than `text`
    text = hub(tmp_path / "t", [[picture(20), picture(21)]], label=["\u00e9mu", "ant"])
    form = form_of([("a", a), ("b", b), ("text", text)])
    assert form.class_names == ("ant", "cat", "dog", "\u00e9mu")
    assert form.labels == {"a": (1, 2), "b": (3, 2), "text": (0, 3)}
    sets = [("a", POOL, a), ("b", POOL, b), ("text", POOL, text)]
    (written, _), _ = curated(tmp_path, sets, share=1.0)
    rows = pa.concat_tables([pq.read_table(f.path) for f in written.files]).to_pylist()
    labels = {row["image_id"]: row["label"] for row in rows}
    expected = {0: 1, 1: 2, 2: None, 10: 3, 11: 2, 12: 2, 20: 3, 21: 0}
    assert labels == {image_id(picture(seed)): label for seed, label in expected.items()}
    c = hub(tmp_path / "c", [[picture(30)]], label=[5])  # ids without names
    assert form_of([("c", c)]).labels == {"c": ()}
    with pytest.raises(DataError, match=r"have names \(cat, dog\), the labels of c are numbers"):
        form_of([("a", a), ("c", c)])
    beyond = named("beyond", ["cat", "dog"], [0, 1, 2], 40)
    with pytest.raises(DataError, match="is 2, but only 2 classes have names"):
        curated(tmp_path / "beyond_out", [("beyond", POOL, beyond)], share=1.0)


def test_columns_that_cannot_be_one(tmp_path):
    a = hub(tmp_path / "a", [[picture(0)]], extra=["text"])
    b = hub(tmp_path / "b", [[picture(1)]], extra=[{"a": 1}])
    with pytest.raises(DataError, match="the sets a, b disagree about a column"):
        form_of([("a", a), ("b", b)])


def test_formats_are_those_that_decoding_names(tmp_path, monkeypatch):
    """Hub files of DICOM, deep TIFF and (where it is installed) HEIC: more than Pillow knows."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    still, apple = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels[::2]).save(still, "JPEG")
    # A TIFF of 16 bits, and one of five bands: Pillow does not open the latter.
    deep, five = (plain_tiff(pixels.astype("u2")), plain_tiff(np.dstack((pixels, pixels[..., :2]))))
    images = [deep, still.getvalue(), dicom()]
    if importlib.util.find_spec("pillow_heif"):
        heif = importlib.import_module("pillow_heif")
        heif.from_pillow(Image.fromarray(pixels[:, ::2])).save(apple)
        images.append(apple.getvalue())
    names = [decode(encoded)[1] for encoded in images]
    assert names == ["TIFF", "JPEG", "DICOM", "HEIF"][: len(images)]
    assert [image_format(encoded) for encoded in images] == names
    assert image_format(five) == decode(five, channels=5)[1] == "TIFF"
    sets = [("pool", POOL, hub(tmp_path / "hub", [images]))]
    (written, _), _ = curated(tmp_path, sets, share=1.0)
    table = pa.concat_tables([pq.read_table(f.path) for f in written.files])
    assert sorted(table.column("format").to_pylist()) == sorted(names)


def plain_tiff(array: np.ndarray) -> bytes:
    """Bands side by side, without compression: all tags that such a file needs."""
    height, width, bands = array.shape
    tags = [(256, width), (257, height), (258, 8 * array.itemsize), (259, 1)]
    tags += [(262, 2 if bands == 3 else 1), (273, 8), (277, bands), (278, height)]
    tags += [(279, array.nbytes)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + array.nbytes) + array.tobytes() + directory


def test_numpy_images_keep_their_format(tmp_path, monkeypatch):
    stream = io.BytesIO()
    np.save(stream, np.zeros((24, 24, 3), np.uint8))
    still = io.BytesIO()
    Image.new("L", (24, 24)).save(still, "WEBP")
    sets = [("pool", POOL, hub(tmp_path / "hub", [[stream.getvalue(), still.getvalue()]]))]
    (written, _), _ = curated(tmp_path, sets, share=1.0)
    table = pa.concat_tables([pq.read_table(f.path) for f in written.files])
    assert sorted(table.column("format").to_pylist()) == ["NPY", "WEBP"]
