"""The fast road for JPEGs against Pillow: the header, every pixel, every refusal, every scale."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.images import decode as roads
from pipeline.images.decode import BadImage, decode, decode_image, decode_shrunk, image_size
from pipeline.images.jpeg import SHRINKS, exif_orientation, jpeg_header
from tests.images import hostile as h

PICTURE = h.pattern()


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010F] = "a maker of cameras"
    return exif


def by_simplejpeg(subsampling: str, height: int, width: int) -> bytes:
    return simplejpeg.encode_jpeg(h.pattern(height, width), 90, "RGB", subsampling)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


XMP = b"http://ns.adobe.com/xap/1.0/\0"


def with_segment(marker: int, content: bytes) -> bytes:
    whole = h.jpeg()
    return whole[:2] + segment(marker, content) + whole[2:]


PLAIN = {
    "4:4:4": lambda: h.jpeg(subsampling=0),
    "4:2:2": lambda: h.jpeg(subsampling=1),
    "4:2:0": lambda: h.jpeg(subsampling=2),
    "4:4:0": lambda: by_simplejpeg("440", 47, 63),
    "4:1:1": lambda: by_simplejpeg("411", 47, 63),
    "grey": lambda: h.encode(PICTURE[..., 1], "JPEG"),
    "grey, progressive": lambda: h.encode(PICTURE[..., 1], "JPEG", progressive=True),
    "progressive": lambda: h.jpeg(progressive=True),
    "optimised, bad quality": lambda: h.jpeg(optimize=True, quality=3),
    "restart markers": lambda: h.jpeg(restart_marker_blocks=3),
    "restart rows": lambda: h.jpeg(restart_marker_rows=1, progressive=True),
    "1 x 1": lambda: h.encode(PICTURE[:1, :1], "JPEG"),
    "1 x 64": lambda: h.encode(PICTURE[:1], "JPEG"),
    "48 x 1": lambda: h.encode(PICTURE[:, :1], "JPEG"),
    "odd": lambda: h.jpeg(height=37, width=51, subsampling=2),
    "wide": lambda: h.jpeg(height=9, width=3001),
    "profile, comment, dpi": lambda: h.jpeg(icc_profile=bytes(90_000), comment="x", dpi=(9, 9)),
    "exif": lambda: h.jpeg(exif=turned(1)),
    "exif, on its side": lambda: h.jpeg(exif=turned(6)),
    "exif, on its head": lambda: h.jpeg(exif=turned(3), height=33, width=41),
    "exif, mirrored": lambda: h.jpeg(exif=turned(5)),
    "bytes after the end": lambda: h.jpeg() + b"\xff\xda trailer",
    "orientation in XMP": lambda: with_segment(0xE1, XMP + b'<x tiff:Orientation="6"/>'),
    "no orientation in XMP": lambda: with_segment(0xE1, XMP + b"<tiff:Orientation>9<"),
    "orientation in both": lambda: (
        b"\xff\xd8"
        + segment(0xE1, XMP + b'<x tiff:Orientation="6"/>')
        + segment(0xE1, turned(3).tobytes())
        + h.jpeg()[2:]
    ),
    "preview": lambda: h.jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0" + h.jpeg(height=16, width=16)),
}


def by_pillow(encoded: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.fixture
def road(monkeypatch):
    """Counts what the fast road decodes."""
    taken: list[bool] = []
    fast = roads.decode_plain

    def spy(*args, **options):
        result = fast(*args, **options)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(roads, "decode_plain", spy)
    return taken


def outcome(encoded: bytes, channels: int = 3, max_pixels: int = 10**6):
    try:
        pixels, name = decode(encoded, max_pixels, channels)
    except BadImage as bad:
        return bad.reason, bad.detail
    return pixels.shape, pixels.tobytes(), name


def without_the_fast_road(encoded: bytes, channels: int = 3, max_pixels: int = 10**6):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roads, "decode_plain", lambda *args, **options: None)
        return outcome(encoded, channels, max_pixels)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_files_take_the_fast_road_to_pillows_pixels(name, road):
    encoded = PLAIN[name]()
    pixels = decode_image(encoded)
    assert road == [True]
    np.testing.assert_array_equal(pixels, by_pillow(encoded))
    assert pixels.flags.writeable and pixels.flags.c_contiguous and pixels.dtype == np.uint8
    assert image_size(encoded) == pixels.shape[:2]
    for channels in (1, 2, 4):
        assert outcome(encoded, channels) == without_the_fast_road(encoded, channels)
    assert road == [True] * 4


@pytest.mark.long
def test_all_samples_have_pillows_header_and_pixels(shared: Path, road):
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))
    assert len(files) == 1000
    for file in files:
        encoded = file.read_bytes()
        header = jpeg_header(encoded)
        with Image.open(file) as image:
            assert (header.width, header.height) == image.size
            assert {1: "L", 3: "RGB"}[header.components] == image.mode
            assert header.precision == image.bits
            assert header.adobe == image.info.get("adobe_transform")
            assert (header.process == 2) == ("progressive" in image.info)
            assert header.orientation in (None, image.getexif().get(0x0112, 1) or 1)
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(decode_image(encoded), pixels, err_msg=file.name)
        assert image_size(encoded) == pixels.shape[:2]
    assert all(road) and len(road) >= 980  # the others have broken EXIF blocks


NOT_PLAIN = {
    "CMYK": lambda: h.encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "RGB": lambda: h.encode(PICTURE, "JPEG", keep_rgb=True),
    "Adobe RGB": lambda: with_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"),
    "cut Adobe marker": lambda: with_segment(0xEE, b"Adobe\0"),
    "two EXIF blocks": lambda: b"\xff\xd8"
    + 2 * segment(0xE1, turned(3).tobytes())
    + h.jpeg()[2:],
    "broken EXIF": lambda: with_segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "cut JFIF": lambda: with_segment(0xE0, b"JFIF\0"),
    "cut profile": lambda: with_segment(0xE2, b"ICC_PROFILE\0\1"),
    "cut Photoshop block": lambda: with_segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
    "several pictures": lambda: h.encode(PICTURE, "MPO", save_all=True, append_images=[
        Image.fromarray(PICTURE)]),
    "junk between segments": lambda: h.jpeg()[:2] + b"junk" + h.jpeg()[2:],
    "fill bytes": lambda: h.jpeg()[:2] + b"\xff\xff" + h.jpeg()[2:],
    "12 bits": lambda: h.jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
    "arithmetic": lambda: h.jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc9\0\x11"),
    "lossless": lambda: h.jpeg().replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"),
    "no height": lambda: h.jpeg().replace(b"\xff\xc0\0\x11\x08\0\x30", b"\xff\xc0\0\x11\x08\0\0"),
    "two components": lambda: h.jpeg().replace(
        b"\xff\xc0\0\x11\x08\0\x30\0\x40\x03", b"\xff\xc0\0\x11\x08\0\x30\0\x40\x02"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_files_are_left_to_pillow(name, road):
    encoded = NOT_PLAIN[name]()
    assert not jpeg_header(encoded).plain
    ours = outcome(encoded)
    assert ours == without_the_fast_road(encoded)
    assert road == []
    if len(ours) == 3:
        assert image_size(encoded) == ours[0][:2]


def test_what_libjpeg_warns_about_is_read_as_pillow_reads_it(road):
    """Both take damaged entropy data as it comes; where they differ in how, Pillow is right."""
    whole = h.jpeg(height=200, width=200)
    at = whole.index(b"\xff\xda") + 400
    damaged = whole[:at] + bytes(40) + whole[at + 40 :]
    assert jpeg_header(damaged).plain
    ours = decode_image(damaged)
    assert road == [False]
    np.testing.assert_array_equal(ours, by_pillow(damaged))
    pixels, shrink = decode_shrunk(damaged, 4)
    assert shrink == 1
    np.testing.assert_array_equal(pixels, ours)


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """Up to three bits flipped or bytes lost, mostly in the header."""
    scan = whole.index(b"\xff\xda")
    changed = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(2, scan if rng.random() < 0.7 else len(whole) - 40)
        if rng.random() < 0.8:
            changed[place] ^= 1 << rng.randrange(8)
        else:
            del changed[place : place + rng.choice((1, 2, 30))]
    return bytes(changed)


def test_both_roads_agree_on_damaged_files(road):
    rng = random.Random(4)
    files = [make() for name, make in (PLAIN | NOT_PLAIN).items() if name != "wide"]
    scanned = [file for file in files if b"\xff\xda" in file]
    reasons = set()
    for case in range(1500):
        encoded = damaged(rng, rng.choice(scanned))
        channels, limit = rng.choice((1, 2, 3, 3, 4)), 4000
        ours = outcome(encoded, channels, limit)
        assert ours == without_the_fast_road(encoded, channels, limit), case
        if len(ours) == 3:
            assert image_size(encoded, channels, limit) == ours[0][:2]
        else:
            reasons.add(ours[0])
    assert reasons >= {"undecodable", "truncated", "too_large"}
    assert sum(road) > 200 and road.count(False) > 50


def test_both_roads_agree_on_the_limits():
    for encoded in (h.jpeg(), h.jpeg(exif=turned(6)), b"\xff\xd8\xff", b"\xff\xd8\xff\xda" * 9):
        for channels in (3, 5):
            for max_pixels in (48 * 64, 48 * 64 - 1):
                ours = outcome(encoded, channels, max_pixels)
                assert ours == without_the_fast_road(encoded, channels, max_pixels)


# ---- the header alone


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("value", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(form, value):
    encoded = h.encode(PICTURE, form, exif=turned(value))
    size_of = image_size(encoded)
    assert size_of == decode_image(encoded).shape[:2]
    if form not in ("JPEG2000", "AVIF"):  # which do not keep it, or turn by themselves
        assert size_of == ((64, 48) if value >= 5 else (48, 64))
    if form == "JPEG":
        header = jpeg_header(encoded)
        assert (header.orientation, header.upright_size) == (value, size_of)


@pytest.mark.parametrize("kind", h.BROKEN_KINDS)
def test_the_size_is_refused_for_the_reason_of_the_picture(kind):
    encoded = h.broken(kind)
    with pytest.raises(BadImage) as caught:
        image_size(encoded)
    assert caught.value.reason == h.BROKEN_REASONS[kind]
    with pytest.raises(BadImage) as whole:
        decode_image(encoded)
    assert (caught.value.reason, caught.value.detail) == (whole.value.reason, whole.value.detail)


def test_a_png_keeps_its_orientation_behind_the_pixels():
    whole = h.encode(PICTURE, exif=turned(6))
    at, end = whole.index(b"eXIf") - 4, whole.index(b"IEND") - 4
    length = 12 + int.from_bytes(whole[at : at + 4], "big")
    moved = whole[:at] + whole[at + length : end] + whole[at : at + length] + whole[end:]
    assert image_size(moved) == decode_image(moved).shape[:2] == (64, 48)


def test_orientation_is_read_only_where_it_is_clear():
    def block(entries: bytes, count: int, order: bytes = b"II*\0\x08\0\0\0") -> bytes:
        return order + struct.pack("<H", count) + entries + bytes(4)

    six = struct.pack("<HHII", 0x0112, 3, 1, 6)
    assert exif_orientation(block(six, 1)) == 6
    assert exif_orientation(block(b"", 0)) == 0
    assert exif_orientation(block(struct.pack("<HHII", 0x0112, 3, 1, 9), 1)) == 1
    big = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, 8, 0)
    assert exif_orientation(big) == 8
    for odd in (
        b"",
        b"II*\0",
        block(six, 2),  # fewer entries than it says
        block(six + six, 2),
        block(struct.pack("<HHII", 0x0112, 4, 1, 6), 1),  # not a SHORT
        block(struct.pack("<HHII", 0x0112, 3, 2, 6), 1),
        block(struct.pack("<HHII", 0x010F, 2, 99, 8) + six, 2),  # a text that is not there
        block(six, 1, b"II*\0\xff\xff\xff\xff"),
        block(six, 1, b"MM*\0\x08\0\0\0"),
    ):
        assert exif_orientation(odd) is None, odd


# ---- smaller


def smooth(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 200 // height, columns * 200 // width, 90 + 60 * np.sin(rows / 40)]
    return np.stack(planes, -1).astype(np.uint8)


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("size", [(256, 384), (251, 377), (16, 9), (33, 700)])
def test_a_smaller_picture_is_the_mean_of_the_whole(shrink, size):
    encoded = h.encode(smooth(*size), "JPEG", quality=98, subsampling=0)
    whole = decode_image(encoded)
    pixels, used = decode_shrunk(encoded, shrink)
    assert used == shrink
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    height, width = (side // shrink for side in size)
    assert pixels.shape == (-(-size[0] // shrink), -(-size[1] // shrink), 3)
    blocks = whole[: height * shrink, : width * shrink].reshape(height, shrink, width, shrink, 3)
    assert np.abs(pixels[:height, :width] - blocks.mean((1, 3))).mean() < 1


@pytest.mark.parametrize("shrink", SHRINKS)
@pytest.mark.parametrize("value", range(1, 9))
def test_a_smaller_picture_is_turned_as_the_whole(shrink, value):
    for size in ((48, 64), (251, 377)):
        stored = decode_shrunk(h.jpeg(1, *size), shrink)[0]
        pixels = decode_shrunk(h.jpeg(1, *size, exif=turned(value)), shrink)[0]
        np.testing.assert_array_equal(pixels, h.ORIENTED[value](stored))
        assert pixels.flags.writeable and pixels.flags.c_contiguous


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"progressive": True}, {}])
@pytest.mark.parametrize("shrink", SHRINKS)
def test_smaller_pictures_equal_pillows_draft(options, shrink):
    encoded = h.jpeg(height=300, width=201, **options)
    image = Image.open(io.BytesIO(encoded))
    image.draft("RGB", (201 // shrink, 300 // shrink))
    pixels, used = decode_shrunk(encoded, shrink)
    assert used == shrink
    np.testing.assert_array_equal(pixels, np.asarray(image))
    grey = h.encode(h.pattern(300, 201)[..., 1], "JPEG")
    image = Image.open(io.BytesIO(grey))
    image.draft("L", (201 // shrink, 300 // shrink))
    np.testing.assert_array_equal(decode_shrunk(grey, shrink, 1)[0][..., 0], np.asarray(image))


def test_other_files_come_whole_and_say_so():
    for form in ("PNG", "WEBP", "GIF", "TIFF"):
        encoded = h.encode(PICTURE, form)
        pixels, shrink = decode_shrunk(encoded, 8)
        assert shrink == 1
        np.testing.assert_array_equal(pixels, decode_image(encoded))
    tiny = h.encode(PICTURE[:3, :15], "JPEG")
    assert decode_shrunk(tiny, 8)[1] == 1
    with pytest.raises(BadImage):
        decode_shrunk(h.jpeg(), 8, max_pixels=48 * 64 - 1)  # of the whole
