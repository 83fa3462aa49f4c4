"""Fingerprints, quality marks and equal images against planted truth."""

from __future__ import annotations

import io
from collections import defaultdict
from hashlib import blake2b

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.curate.images import equal_images, fingerprint, quality
from pipeline.curate.images.descriptor import describe
from pipeline.curate.images.fingerprint import Decoding
from pipeline.curate.images.measure import measure
from pipeline.curate.images.quality import Rules, marks, sample_counts
from pipeline.curate.rows import read_rows
from pipeline.curate.rows.tables import AS_IS, EXACT, FINGERPRINT, POOL, QUALITY, matrix
from pipeline.curate.steps.steps import Steps
from pipeline.images.decode import decode_image
from pipeline.shards.columns import image_id
from tests.curate.images import inputs_of, scene, shard
from tests.data import encoded
from tests.images.hostile import pattern, png
from tests.standins import run_here

BAD = {b"": "empty", b"no image at all": "not_an_image"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    run_here(monkeypatch)


def fingerprinted(tmp_path, images, group=4):
    shard(tmp_path / "in" / "a.parquet", images, group)
    inputs = inputs_of(tmp_path / "in")
    prints = fingerprint.fingerprint(Steps(tmp_path / "out"), inputs, Decoding())
    return inputs, prints, pq.read_table(f"{prints.folder}/00000.parquet")


def test_one_row_for_each_image_with_what_was_planted(tmp_path):
    deep = png([b"\x40\x11" * 60 + b"\xc0\x22" * 60] * 80, 120, 16, 0)
    inks = Image.fromarray(scene(3)).convert("CMYK")
    cut = encoded(scene(4), "JPEG")[:-400]
    images = [
        encoded(scene(0)),
        b"",
        encoded(inks, "JPEG"),
        deep,
        b"no image at all",
        cut,
        encoded(scene(0), "BMP"),
        encoded(pattern(30, 200), "JPEG", quality=95),
        encoded(scene(5, 700, 900)),
    ]
    _, result, table = fingerprinted(tmp_path, images, group=2)
    assert table.schema == FINGERPRINT and result.accounts[0]["rows"] == 9
    rows = table.to_pylist()
    assert [row["row"] for row in rows] == list(range(9))
    errors = ["", "empty", "", "", "not_an_image", "truncated", "", "", ""]
    assert [row["error"] for row in rows] == errors and result.accounts[0]["bad"] == 3
    assert [row["source"] for row in rows] == [f"a/{i}.img" for i in range(9)]
    for row, image in zip(rows, images, strict=True):
        assert row["image_id"].hex() == image_id(image) and row["bytes"] == len(image)
        if row["error"]:
            assert row["pixel_hash"] == bytes(16) and not any(row["descriptor"])
            continue
        pixels = decode_image(image)
        assert (row["height"], row["width"]) == pixels.shape[:2]
        shape = np.array(pixels.shape, "<i8").tobytes()
        assert row["pixel_hash"] == blake2b(shape + pixels.tobytes(), digest_size=16).digest()
        thumbnail = Image.open(io.BytesIO(row["thumbnail"]))
        assert max(thumbnail.size) == min(96, max(pixels.shape[:2]))
        reduced = min(pixels.shape[:2]) >= 512
        full, crops = describe(pixels)
        assert np.dot(full.astype(float), row["descriptor"]) > (0.995 if reduced else 0.999)
        assert np.allclose(row["views"], crops.ravel(), atol=0.2 if reduced else 0)
    assert rows[0]["pixel_hash"] == rows[6]["pixel_hash"] != rows[2]["pixel_hash"]
    assert matrix(table.column("descriptor"), 143).shape == (9, 143)


@pytest.mark.long
@pytest.mark.parametrize("batch", [3, 256])
def test_rows_are_numbered_once_whatever_the_groups_of_the_files(tmp_path, monkeypatch, batch):
    """Groups that are larger, smaller and as large as what is described at once; several files."""
    monkeypatch.setattr(fingerprint, "BATCH", batch)
    files = [[8, 3, 1, 7], [2, 4]] if batch == 3 else [[300, 20], [513]]
    tiles = np.random.default_rng(0).integers(0, 256, (sum(map(sum, files)), 16, 16, 3), np.uint8)
    images = [encoded(tile) for tile in tiles]
    at = 0
    for number, groups in enumerate(files):
        mine = images[at : at + sum(groups)]
        shard(tmp_path / "in" / f"{number}.parquet", mine, groups=groups)
        at += len(mine)
    inputs = inputs_of(tmp_path / "in")
    assert [list(file.file.row_groups) for file in inputs.files] == files
    prints = fingerprint.fingerprint(Steps(tmp_path / "out"), inputs, Decoding())
    tables = [pq.read_table(f"{prints.folder}/{file.name}.parquet") for file in inputs.files]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["row"] for row in rows] == list(range(len(images)))
    assert [row["image_id"].hex() for row in rows] == [image_id(image) for image in images]
    shape = np.array((16, 16, 3), "<i8").tobytes()
    hashes = [blake2b(shape + tile.tobytes(), digest_size=16).digest() for tile in tiles]
    assert [row["pixel_hash"] for row in rows] == hashes


def test_no_rows(tmp_path):
    inputs, result, table = fingerprinted(tmp_path, [])
    assert len(table) == 0 and result.accounts[0]["rows"] == 0
    marked = quality.quality(Steps(tmp_path / "out"), inputs, result, Rules())
    exact = equal_images.equal_images(Steps(tmp_path / "out"), inputs, result, marked)
    assert len(pq.read_table(f"{exact.folder}/00000.parquet")) == 0
    assert sample_counts(inputs, Rules(), 10).images == 0


def test_measures_of_images_that_are_known():
    grey = measure(np.full((40, 30, 3), 100, np.uint8))
    assert (grey.height, grey.width, grey.contrast, grey.entropy) == (40, 30, 0, 0)
    assert (grey.brightness_p05, grey.brightness_p95, grey.sharpness) == (100, 100, 0)
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 200
    measures = measure(half)
    assert measures.entropy == 1 and measures.contrast == 100 and measures.saturation == 0
    assert (measures.brightness_p05, measures.brightness_p95) == (0, 200)
    red = np.zeros((64, 64, 3), np.uint8)
    red[..., 0] = 200
    assert measure(red).saturation == 1
    # an average over blocks of whole pixels changes no mean
    large = scene(1, 1200, 1500)
    light = np.asarray(Image.fromarray(large).convert("L"), float)
    assert abs(measure(large).contrast - light.std()) < 1


def test_channels_beyond_three_are_hashed_and_measured():
    many = np.random.default_rng(0).integers(0, 256, (50, 40, 5), np.uint8)
    other = many.copy()
    other[0, 0, 4] ^= 1
    assert measure(many).pixel_hash != measure(other).pixel_hash
    assert measure(many).contrast == measure(other).contrast


# ---- quality


def test_the_first_rule_that_fails_is_the_reason():
    values = {
        "side": [10, 40, 40, 40, 40, 40],
        "aspect": [9, 9, 1, 1, 1, 1],
        "entropy": [0, 0, 0, 7, 7, 7],
        "contrast": [0, 0, 0, 1, 50, 50],
        "brightness_p95": [0, 0, 0, 200, 20, 200],
        "brightness_p05": [0, 0, 0, 0, 10, 100],
        "sharpness": [0, 0, 0, 0, 500, 500],
    }
    values = {name: np.array(x, float) for name, x in values.items()} | {"edges": np.zeros(6)}
    errors = np.zeros(6, bool)
    rules = Rules(min_brightness=30, min_entropy=1.0)
    reason, rule, value = marks(errors, values, rules)
    assert reason.tolist() == ["too_small", "aspect", "flat", "flat", "flat", ""]
    names = ["min_side", "max_aspect", "min_entropy", "min_contrast", "min_brightness", ""]
    assert rule.tolist() == names and value.tolist() == [10, 9, 0, 1, 20, 0]
    off = Rules(0, 0, 0, 0, 0, 0, 0)
    assert set(marks(errors, values, off)[0]) == {""}
    assert set(marks(~errors, values, off)[0]) == {"undecodable"}


def flats(side):
    """Tiles, gradients, blank scans: what shows nothing, compressed or not."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] / side
    for n in range(3):
        yield np.full((side, side, 3), rng.integers(0, 256, 3), np.uint8)
        low, high = rng.integers(0, 256, (2, 3))
        angle = rng.uniform(0, 6.3)
        ramp = np.cos(angle) * x + np.sin(angle) * y
        ramp = (ramp - ramp.min()) / np.ptp(ramp)
        yield (low + (high - low) * ramp[..., None]).astype(np.uint8)
        yield (np.hypot(x - 0.5, y - 0.4)[..., None] * rng.integers(50, 300, 3)).astype(np.uint8)
        shade = 245 - 6 * n / 3 * x[..., None] + rng.normal(0, 1.5, (side, side, 3))
        yield shade.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 256, 600])
def test_planted_flats_are_all_marked(side):
    for tile in flats(side):
        for image in (encoded(tile), encoded(tile, "JPEG", quality=85)):
            measured = measure(decode_image(image))
            values = {
                name: np.array([float(getattr(measured, name))]) for name in quality._MEASURES
            }
            values = quality._derived(values)
            assert marks(np.zeros(1, bool), values, Rules())[0].tolist() == ["flat"]


def test_real_photos_pass(tmp_path, shared):
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))[::25]
    inputs, prints, _ = fingerprinted(tmp_path, [file.read_bytes() for file in files], 16)
    marked = quality.quality(Steps(tmp_path / "out"), inputs, prints, Rules())
    table = pq.read_table(f"{marked.folder}/00000.parquet")
    assert table.schema == QUALITY and set(table.column("reason").to_pylist()) == {""}
    cifar = inputs_of(shared / "data" / "cifar10" / "test-00000-of-00001.parquet")
    counts = sample_counts(cifar, Rules(), 500)
    assert counts.images == 500 and counts.rows == 10_000 and sum(counts.counts.values()) == 0
    assert "min_sharpness" in counts.lines()[4] and counts.quantiles["side"][0] == 32


def test_sample_counts_are_those_of_all_rows_where_the_sample_is_all(tmp_path):
    images = [encoded(scene(n)) for n in range(9)] + [encoded(scene(0, 20, 200)), b"", b"x"]
    images += [encoded(np.full((40, 40, 3), n, np.uint8)) for n in range(5)]
    inputs, prints, _ = fingerprinted(tmp_path, images)
    marked = quality.quality(Steps(tmp_path / "out"), inputs, prints, Rules()).accounts[0]["marked"]
    counts = sample_counts(inputs, Rules(), 100)
    assert counts.images == 17
    assert {name: count for name, count in counts.counts.items() if count} == marked
    assert marked == {"decode": 2, "min_side": 1, "min_contrast": 5}


# ---- equal images


def brute_force(rows, kinds):
    """Keeper of each row by id and method, by sorting groups of equal pixels."""
    groups = defaultdict(list)
    for n, row in enumerate(rows):
        groups[row["pixel_hash"]].append((kinds[n] != AS_IS, -row["bytes"], row["image_id"], n))
    keepers = {}
    for group in groups.values():
        best = min(group)
        for _, _, name, n in group:
            same = "bytes" if name == best[2] else "pixels"
            keepers[n] = (best[2], same)
    return keepers


@pytest.mark.long
@pytest.mark.parametrize("buckets", [8_000_000, 5, 1])
def test_equal_images_have_one_keeper(tmp_path, monkeypatch, buckets):
    """Planted: equal bytes, equal pixels in other files, as-is copies of pool images."""
    monkeypatch.setattr(equal_images, "BUCKET_ROWS", buckets)
    monkeypatch.setattr(read_rows, "FILE_GROUPS", 2)
    monkeypatch.setattr(read_rows, "FILE_GROUP_ROWS", 10)
    plain = [encoded(scene(n, 40, 50)) for n in range(6)]
    heavy = [encoded(scene(n, 40, 50), compress_level=0) for n in range(3)]
    shard(tmp_path / "in" / "pool.parquet", [*plain, plain[0], b"", *heavy, plain[5], plain[5]])
    shard(tmp_path / "in" / "seeds.parquet", [plain[1], plain[4], encoded(scene(9, 40, 50))])
    for order in ((("pool", POOL), ("seeds", AS_IS)), (("seeds", AS_IS), ("pool", POOL))):
        inputs = inputs_of(tmp_path / "in", *order)
        out = tmp_path / order[0][0]
        prints = fingerprint.fingerprint(Steps(out), inputs, Decoding())
        exact = equal_images.equal_images(Steps(out), inputs, prints)
        rows, kinds = [], []
        for file in inputs.files:
            rows += pq.read_table(f"{prints.folder}/{file.name}.parquet").to_pylist()
            kinds += [file.kind] * file.rows
        result = []
        for file in inputs.files:
            table = pq.read_table(f"{exact.folder}/{file.name}.parquet")
            assert table.schema == EXACT
            result += table.to_pylist()
        good = [row for row in rows if not row["error"]]
        assert [row["row"] for row in result] == [row["row"] for row in good]
        expected = brute_force(good, [kinds[row["row"]] for row in good])
        by_row = {row["row"]: row for row in rows}
        for n, row in enumerate(result):
            keeper = by_row[row["keeper"]]
            assert keeper["image_id"] == expected[n][0]
            kept = row["keeper"] == row["row"]
            assert row["method"] == ("" if kept else expected[n][1])
        kept = [by_row[r["row"]] for r in result if r["row"] == r["keeper"]]
        assert len(kept) == 7
        sizes = {row["image_id"]: row["source"].split("/")[0] for row in kept}
        # an as-is image stays though a heavier file has its pixels
        assert sizes[bytes.fromhex(image_id(plain[1]))] == "seeds"
        assert bytes.fromhex(image_id(heavy[0])) in sizes
        assert exact.total("copies_bytes") == 4 and exact.total("copies_pixels") == 4
        assert equal_images.kept_count(exact) == len(kept)


def test_marked_rows_are_left_out(tmp_path):
    images = [encoded(scene(0)), encoded(np.full((50, 50, 3), 9, np.uint8)), b"", encoded(scene(0))]
    inputs, prints, _ = fingerprinted(tmp_path, images)
    marked = quality.quality(Steps(tmp_path / "out"), inputs, prints, Rules())
    exact = equal_images.equal_images(Steps(tmp_path / "out"), inputs, prints, marked)
    table = pq.read_table(f"{exact.folder}/00000.parquet").to_pylist()
    assert [row["row"] for row in table] == [0, 3]
    assert len({row["keeper"] for row in table}) == 1
