"""A flipped bit in a stored image and an edited manifest are noticed by all who read a set."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import DataError
from pipeline.images.bad_image import REASONS, BadImage
from pipeline.shards.row_group import read_row_group
from pipeline.shards.shards import open_shards
from pipeline.stream.decoder import make_chunk
from pipeline.stream.reader import encoded_images, reading_of
from tests.data import packed
from tests.stream.test_reader import BATCH, spec_of

IMAGES, FLIPPED = 24, (3, 17)
OPTIONS: dict[str, Any] = {"max_bad_fraction": 0.5, "row_group_images": 8}


@pytest.fixture
def good(tmp_path: Path, tasks_here: None) -> Path:
    """Bitmaps in two classes: what is flipped in one decodes as before."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        file = tmp_path / "photos" / f"k{i % 2}" / f"{i}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 20, 3), np.uint8)).save(file)
    packed(tmp_path / "photos", tmp_path, **OPTIONS)
    return tmp_path / "shards"


def flip(shards: Path) -> set[str]:
    """Turns one bit of two images where they lie in the file; gives their ids."""
    (file,) = shards.glob("*.parquet")
    table, content = pq.read_table(file), bytearray(file.read_bytes())
    for row in FLIPPED:
        encoded = table["image"][row].as_py()
        content[content.index(encoded) + len(encoded) - 40] ^= 1
    file.write_bytes(content)
    changed = pq.read_table(file)["image"]
    for row in FLIPPED:
        assert changed[row].as_py() != table["image"][row].as_py()
        Image.open(io.BytesIO(changed[row].as_py())).load()
    return {table["image_id"][row].as_py() for row in FLIPPED}


def test_training_drops_and_names_them_within_two_passes(good: Path) -> None:
    damaged = flip(good)
    shards = open_shards(str(good))
    groups = [read_row_group(shards, 0, g) for g in range(3)]
    portion = encoded_images(groups, np.repeat(np.arange(3), 8), np.tile(np.arange(8), 3))
    assert portion.named and type(portion).of(portion.table()).named
    spec = spec_of(reading_of(shards, seed=1, global_batch=BATCH, window=BATCH))
    bad = {}
    for number, at in product(range(2), range(0, IMAGES, BATCH)):
        chunk = make_chunk(replace(portion, pass_index=number), at, at + BATCH, spec)
        ids = [bytes(name).hex() for name in chunk["image_ids"][~chunk["valid"]]]
        bad |= dict(zip(ids, chunk["reason"][~chunk["valid"]], strict=True))
    assert {name: REASONS[reason] for name, reason in bad.items()} == dict.fromkeys(
        damaged, "damaged"
    )


def test_rows_are_checked_and_hub_rows_have_nothing_to_check(good: Path, tmp_path: Path) -> None:
    damaged = flip(good)
    shards, bad = open_shards(str(good)), set()
    for g in range(3):
        group = read_row_group(shards, 0, g)
        for row in range(len(group)):
            try:
                assert group.checked(row) == group.image(row)
            except BadImage as error:
                assert error.reason == "damaged"
                bad.add(group.hex_ids[row])
    assert bad == damaged
    (tmp_path / "hub").mkdir()
    table = pq.read_table(next(good.glob("*.parquet"))).replace_schema_metadata({})
    pq.write_table(table.select(["image", "label"]), tmp_path / "hub" / "a.parquet")
    group = read_row_group(open_shards(str(tmp_path / "hub")), 0, 0)
    assert not group.named and len([group.checked(row) for row in range(len(group))]) == IMAGES


def test_curation_counts_them_as_bad(good: Path, tmp_path: Path) -> None:
    from pipeline.curate.images.fingerprint import Decoding, fingerprint_file
    from pipeline.curate.rows.tables import POOL, Inputs
    from pipeline.curate.steps.steps import Output

    damaged = flip(good)
    (file,) = Inputs.of([("pool", POOL, open_shards(str(good)))]).files
    fingerprint_file(Output(str(tmp_path / "prints"), file.name), file, Decoding())
    rows = pq.read_table(tmp_path / "prints" / f"{file.name}.parquet").to_pylist()
    assert {row["image_id"].hex(): row["error"] for row in rows if row["error"]} == dict.fromkeys(
        damaged, "damaged"
    )


def test_packing_again_refuses_them(good: Path, tmp_path: Path) -> None:
    flip(good)
    report = packed(good, tmp_path / "again", **OPTIONS)
    assert report.bad == {"damaged": 2} and report.images_packed == IMAGES - 2
    rows = pq.read_table(tmp_path / "again" / "bad.parquet").to_pylist()
    assert {row["reason"] for row in rows} == {"damaged"}


def first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["files"][0].update(changes)


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "rows": first(rows=10),
    "row groups and rows doubled": first(row_groups=[16, 16, 16], rows=48),
    "row groups of the same sum": first(row_groups=[12, 12]),
    "order of row groups": first(row_groups=[4, 12, 8]),
    "a row group more": lambda m: m["files"][0]["row_groups"].append(8),
    "a row group less, and its rows": first(row_groups=[8, 8], rows=16),
    "file twice": lambda m: m["files"].append(m["files"][0]),
    "no files": lambda m: m["files"].clear(),
    "negative": first(rows=-5, row_groups=[-5]),
    "fraction": first(rows=24.0),
    "yes": first(row_groups=[True] * 24),
    "class order": lambda m: m["class_names"].reverse(),
    "class more": lambda m: m["class_names"].append("k2"),
    "class less": lambda m: m["class_names"].pop(),
    "class renamed": lambda m: m.update(class_names=["k0", "cat"]),
    "labelled": lambda m: m.update(labelled=0),
    "labelled less": lambda m: m.update(labelled=23),
    "labelled text": lambda m: m.update(labelled="24"),
    "images": lambda m: m.update(images=23),
    "name outside": first(name="../photos/k0/0.bmp"),
    "name": first(name="part-00001.parquet"),
    "no name": lambda m: m["files"][0].pop("name"),
    "files of numbers": lambda m: m.update(files=[1, 2]),
    "files of null": lambda m: m.update(files=None),
    "digest": lambda m: m.update(digest=None),
    "version": lambda m: m.update(schema_version="1"),
    "range": lambda m: m.update(value_range=[0, 4095]),
    "no range": lambda m: m.update(value_range=None),
    **{
        f"{name} {value!r}": lambda m, n=name, v=value: m.update({n: v})
        for name in ("value_range", "used_range")
        for value in (
            "abc",
            [1],
            [5, 1],
            [1, 1],
            ["0", "9"],
            [0, float("nan")],
            [0, 10**400],
            {},
            7,
        )
    },
}


def test_an_edited_manifest_is_one_sentence(good: Path, tmp_path: Path) -> None:
    whole = json.loads((good / "_manifest.json").read_text())
    assert open_shards(str(good)).rows == IMAGES
    texts = {name: "" for name in EDITS}
    for name, edit in EDITS.items():
        changed = json.loads(json.dumps(whole))
        edit(changed)
        texts[name] = json.dumps(changed)
        assert texts[name] != json.dumps(whole)
    texts |= {t: t for t in ("[]", "null", "{}", "", "5", '"x"', '{"files"', "[" * 100_000, "\0")}
    for name, text in texts.items():
        (good / "_manifest.json").write_text(text)
        try:
            shards = open_shards(str(good))
        except DataError as error:
            assert error.hint and len(error.what) < 400, name[:40]
            continue
        raise AssertionError(f"{name[:40]}: read as {shards.rows} rows of {shards.class_names}")


def test_files_that_the_manifest_does_not_list(good: Path, tmp_path: Path) -> None:
    open_shards(str(good))
    (file,) = good.glob("*.parquet")
    shutil.copy(file, good / "part-00001.parquet")
    with pytest.raises(DataError, match=r"part-00001.parquet, which its _manifest.json does not"):
        open_shards(str(good))
    (good / "part-00001.parquet").unlink()
    file.unlink()
    with pytest.raises(DataError):
        open_shards(str(good))


def test_another_shard_under_the_name_and_size(good: Path, tmp_path: Path) -> None:
    """Rows and groups fit; the classes do not."""
    (file,) = good.glob("*.parquet")
    table = pq.read_table(file)
    names = table.schema.metadata[b"raydino"].replace(b'"k0", "k1"', b'"k1", "k0"')
    assert names != table.schema.metadata[b"raydino"]
    table = table.replace_schema_metadata({b"raydino": names})
    pq.write_table(table, file, row_group_size=8, compression="none")
    manifest = json.loads((good / "_manifest.json").read_text())
    manifest["files"][0]["bytes"] = file.stat().st_size
    (good / "_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="has the classes"):
        open_shards(str(good))
