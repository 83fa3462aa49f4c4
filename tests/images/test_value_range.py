"""Images of more than 8 bits: every bit that is used reaches the 256 levels, in each format."""

import io
import itertools
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.data import Data
from pipeline.evaluate.teacher import EvaluationSpec, read_images
from pipeline.images import pillow as pictures
from pipeline.images.bad_image import BadImage
from pipeline.images.decode import decode_image, decode_measured, image_size, value_span
from pipeline.images.value_range import (
    AUTO,
    FULL,
    Sample,
    Span,
    merged,
    range_alone,
    range_of,
    sentence,
    to_bytes,
)
from pipeline.pack.listing import list_source
from pipeline.pack.sorted_runs import PackSpec, write_runs
from pipeline.pack.sources import Reading, plan_tasks
from pipeline.shards.set_range import difference, ranged
from pipeline.shards.shards import open_shards
from tests.data import encoded as pillow
from tests.data import packed

SIDE = 48


def values(top, channels=0, seed=0, dtype="u2"):
    """Uniform whole numbers from 0 to `top`, both of which occur."""
    shape = (SIDE, SIDE, channels) if channels else (SIDE, SIDE)
    drawn = np.random.default_rng(seed).integers(0, top + 1, shape)
    drawn.flat[:8], drawn.flat[-8:] = 0, top
    return drawn.astype(dtype)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def png(array):
    """A PNG of 16 bits and several bands, which Pillow does not write."""

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, bands = array.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(array, **how):
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **how)
    return stream.getvalue()


def parts(array, low, high):
    """256 equal parts of whole numbers, by exact arithmetic."""
    return np.clip((array.astype(int) - low) * 256 // (high - low + 1), 0, 255)


def test_each_format_keeps_the_bits_that_are_used():
    flat = {"photometric": "minisblack", "planarconfig": "contig"}
    kinds = {
        "grey PNG, 10 bits": (pillow(values(1023), "PNG"), values(1023)[..., None], 1023),
        "grey TIFF, 12 bits": (pillow(values(4095), "TIFF"), values(4095)[..., None], 4095),
        "RGB PNG, 12 bits": (png(values(4095, 3)), values(4095, 3), 4095),
        "RGB TIFF, 14 bits": (
            tiff(values(16_383, 3), photometric="rgb", predictor=2, compression="zlib"),
            values(16_383, 3),
            16_383,
        ),
        "TIFF of 5 bands in tiles, the other order of bytes": (
            tiff(values(10_000, 5), tile=(32, 16), byteorder=">", **flat),
            values(10_000, 5),
            10_000,
        ),
        "TIFF of 4 planes": (
            tiff(np.moveaxis(values(4095, 4), 2, 0).copy(), photometric="minisblack",
                 planarconfig="separate", rowsperstrip=16),
            values(4095, 4),
            4095,
        ),
        "npy of 4 channels": (npy(values(10_000, 4)), values(10_000, 4), 10_000),
        "npy, big endian": (npy(values(4095, 2, dtype=">u2")), values(4095, 2), 4095),
    }  # fmt: skip
    for name, (encoded, truth, top) in kinds.items():
        channels = truth.shape[2]
        span = value_span(encoded, channels)
        assert span is not None and (span.low, span.high) == (0, top), name
        pixels = decode_image(encoded, channels, value_range=range_of([span]))
        np.testing.assert_array_equal(pixels, parts(truth, 0, top), name)
        assert len(np.unique(pixels)) == 256, name
        assert image_size(encoded, channels) == pixels.shape[:2], name
        np.testing.assert_array_equal(decode_image(encoded, channels), truth >> 8, name)


def test_signed_and_float_values_need_a_range_and_get_one():
    ct = values(4095).astype(np.int16) - 1024
    for name, array in {"int16": ct, "int32": ct.astype("i4"), "float": ct.astype("f4")}.items():
        for encoded in (npy(array), tiff(array)):
            span = value_span(encoded, 1)
            assert (span.low, span.high) == (-1024, 3071), name
            # of 16 bits a set finds its range; for others somebody has to name one
            assert (range_alone(span) == FULL) == (name != "int16"), name
            pixels = decode_image(encoded, 1, value_range=range_of([span]))[..., 0].astype(int)
            assert abs(pixels - parts(ct, -1024, 3071)).max() <= (name == "float"), name
            with pytest.raises(BadImage, match=r"data\.range=\[low,high\]"):
                decode_image(encoded, 1)
    holes = np.array([[np.nan, np.inf, -np.inf, 0.5]])
    assert to_bytes(holes, (0, 1)).tolist() == [[0, 255, 0, 128]]


def test_transparency_has_all_16_bits_and_colours_the_range():
    picture = values(4095, 4)
    picture[..., 3] = 65_535
    picture[0, 0, 3] = 0
    pixels = decode_image(png(picture), 4, value_range=(0, 4095))
    np.testing.assert_array_equal(pixels[..., :3], picture[..., :3] >> 4)
    assert pixels[0, 0, 3] == 0 and (pixels.reshape(-1, 4)[1:, 3] == 255).all()
    assert decode_image(png(picture), 3, value_range=(0, 4095))[0, 0].tolist() == [255] * 3


def test_what_has_8_bits_is_no_matter_of_the_range():
    grey = values(255, dtype="u1")
    for encoded in (pillow(grey, "PNG"), npy(grey[..., None]), pillow(grey, "JPEG")):
        assert value_span(encoded, 1) is None
        same = decode_image(encoded, 1, value_range=(0, 100)) == decode_image(encoded, 1)
        assert same.all()


def test_the_range_of_a_set():
    def used(low, high, bits=16):
        return Span(low, high, bits)

    assert range_of([]) == FULL
    assert range_of([used(0, 65_535)]) == range_of([used(20, 65_001)]) == FULL
    assert range_of([used(7, 4090)] * 20) == (0, 4095)  # whole bits where nearly all are used
    assert range_of([used(0, 10_000)]) == (0, 10_000)
    assert range_of([used(100, 3000), used(80, 2000)]) == (80, 3000)
    assert range_of([used(0, 4095)] * 200 + [used(0, 60_000)]) == (0, 4095)  # one odd image
    assert range_of([used(-1024, 3071, 0)]) == (-1024, 3071)
    assert range_of([used(5, 5, 0)]) == (5, 6) and range_of([used(0, 0)]) == FULL
    hot = values(4095)
    hot[3, 3] = 65_535
    assert range_of([value_span(pillow(hot, "PNG"), 1)]) == (0, 4095)


def test_the_sample_of_a_large_set_stays_small_and_a_deep_image_is_unpacked_once(monkeypatch):
    accounts = [
        {"spans": {f"{(977 * i) % 5000:032x}": {"low": 0, "high": i, "bits": 16}
                   for i in range(start, start + 250)}}
        for start in range(0, 5000, 250)
    ]  # fmt: skip
    every = {k: Span(**v) for account in accounts for k, v in account["spans"].items()}
    sample = Sample()
    for account in accounts:
        sample.take(account)
        assert len(sample.by_id) <= 256 and "spans" not in account
    assert sample.by_id == {k: every[k] for k in sorted(every)[:256]}
    assert Sample().range is None
    calls = []
    unpack = pictures.png_samples
    monkeypatch.setattr(pictures, "png_samples", lambda e: calls.append(0) or unpack(e))
    truth, encoded = values(4095, 3), png(values(4095, 3))
    for setting, mapped in ((AUTO, truth >> 4), (FULL, truth >> 8), ((0, 8191), truth >> 5)):
        calls.clear()
        pixels, form, span = decode_measured(encoded, 10**6, 3, setting)
        assert form == "PNG" and span == value_span(encoded) == Span(0, 4095, 16)
        np.testing.assert_array_equal(pixels, mapped)
        assert len(calls) == 2, setting  # one of them by value_span


def test_what_is_said():
    assert sentence(FULL, FULL) == ""
    assert "data.range=[0,4095]" in sentence((0, 4095), (0, 4095))
    assert "16 of 256 levels" in sentence((0, 4095), FULL)
    assert "differ" in sentence((0, 4095), (0, 1000))
    assert Data(range=(0, 4095)).range == (0, 4095) and Data().range == AUTO
    with pytest.raises(ValueError, match="low < high"):
        Data(range=(5, 5))


def test_packing_finds_one_range_whatever_the_tasks_and_their_order(tmp_path):
    source = tmp_path / "s"
    for i in range(40):
        place = source / f"{i % 3}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pillow(values(2000 + 10 * i, seed=i), "PNG"))
    listing = list_source(str(source))
    reading = Reading("image", "label", 2**20)
    (task,) = plan_tasks(str(source), listing, reading).tasks
    accounts = []
    for number, paths in enumerate((task.paths, task.paths[:13], task.paths[13:])):
        scratch = tmp_path / f"w{number}"
        (scratch / "runs").mkdir(parents=True)
        spec = PackSpec(
            *(str(source), str(source), "", str(scratch), reading, 10**6, 8, 2**20, ()),
            channels=1,
            value_range=AUTO,
        )
        accounts.append(write_runs(0, replace(task, paths=paths), spec))
        assert not accounts[-1]["bad"]
    whole, *halves = accounts
    for order in itertools.permutations(halves):
        assert range_of(merged(order)) == range_of(merged([whole])) == (0, 2390)


def eight_bits(tmp_path):
    """A pack of a plain JPEG: `full`, and no range that is used. Also what is said of it."""
    source, out = tmp_path / "plain", tmp_path / "p"
    source.mkdir()
    (source / "a.jpg").write_bytes(pillow(values(255, dtype="u1"), "JPEG"))
    report = packed(source, out)
    assert (report.value_range, report.used_range) == (FULL, None)
    assert sentence(None, (0, 4095)) == sentence(None, FULL) == ""
    manifest = json.loads((out / "shards" / "_manifest.json").read_text())
    assert (manifest["value_range"], manifest["used_range"]) == (FULL, None)
    stored = out / "work" / "report.json"
    assert packed(source, out) == report
    stored.write_text(stored.read_text().replace('"full"', "[1]"))  # edited: packed again
    again = packed(source, out)
    assert again.value_range == FULL
    return open_shards(str(out / "shards")), report


def test_a_set_is_read_with_the_range_that_packing_noted(tmp_path, tasks_here):
    def packed_from(name, top, **how):
        for i in range(8):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(pillow(values(top, seed=i), "PNG"))
        folder = tmp_path / f"{name}-{how.get('value_range', AUTO)}"
        report = packed(tmp_path / name, folder, channels=1, **how)
        return report, open_shards(str(folder / "shards"))

    report, shards = packed_from("deep", 4095)
    assert report.value_range == report.used_range == shards.value_range == (0, 4095)
    assert shards.columns.value_range == (0, 4095)
    # a single shard knows it, too, and a set of others is looked at
    alone = open_shards(str(tmp_path / f"deep-{AUTO}" / "shards" / "part-00000.parquet"))
    assert alone.value_range == (0, 4095)
    assert ranged(replace(shards, value_range=None), AUTO, 1).value_range == (0, 4095)
    assert ranged(shards, (0, 1000)).value_range == (0, 1000)
    assert ranged(shards, FULL).columns.value_range == FULL
    report, full = packed_from("deep", 4095, value_range=FULL)
    assert (report.value_range, report.used_range) == (FULL, (0, 4095))
    assert full.value_range == FULL and full.used_range == (0, 4095)
    report, whole = packed_from("whole", 65_535)
    assert report.value_range == report.used_range == whole.value_range == FULL
    assert sentence(report.used_range, report.value_range) == ""
    assert difference("queries", full, (0, 4095)) == "" and difference("queries", whole, FULL) == ""
    assert "data.range" in difference("the queries", whole, (0, 4095))
    plain, _ = eight_bits(tmp_path)
    for one in (plain, replace(plain, value_range=None), replace(plain, value_range=(0, 9))):
        assert one.used_range is None and difference("plain JPEGs", one, (0, 4095)) == ""
    # looked at where no used range is noted
    for one in (replace(shards, used_range=None), replace(shards, value_range=None)):
        assert "[0,4095]" in difference("queries", replace(one, used_range=None), (0, 65_000), 1)
    spec = EvaluationSpec(
        *(shards, None, None, SIDE, 1, 0.1, (0.5,), (0.5,), 4, 0, 10**6), channels=1
    )
    levels = {
        name: len(np.unique(np.concatenate([p.images for p in read_images(one, spec, None)])))
        for name, one in {"auto": shards, "full": full, "whole": whole}.items()
    }
    assert levels["full"] < 40  # 16, and what resizing makes between them
    assert min(levels["auto"], levels["whole"]) >= 250
