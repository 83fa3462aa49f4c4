"""decode_rgb against pixels known beforehand, the PNG and Lab formulas, and Pillow."""

from __future__ import annotations

import io
import struct
import threading
import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image, ImageOps

from pipeline.images.decode import REASONS, BadImage, decode, decode_rgb
from tests.images import hostile as h

PICTURE = h.pattern()


def reason(encoded: bytes, **options) -> str:
    with pytest.raises(BadImage) as caught:
        decode_rgb(encoded, **options)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    return caught.value.reason


@pytest.fixture(autouse=True)
def no_warnings_and_no_output(capfd):
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert limit == Image.MAX_IMAGE_PIXELS
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_give_the_pixels_back(form):
    options = {"WEBP": {"lossless": True}, "JPEG2000": {"irreversible": False}}.get(form, {})
    pixels, name = decode(h.encode(PICTURE, form, **options))
    assert name == form
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, PICTURE)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff(compression):
    encoded = h.encode(PICTURE, "TIFF", compression=compression)
    np.testing.assert_array_equal(decode_rgb(encoded), PICTURE)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_equals_pillow(options):
    encoded = h.jpeg(**options)
    want = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(decode_rgb(encoded), want)
    assert np.abs(decode_rgb(encoded).astype(int) - PICTURE).mean() < 6


def test_grey_jpeg_has_three_equal_channels():
    grey = PICTURE[..., 1]
    pixels = decode_rgb(h.encode(grey, "JPEG", quality=95))
    assert pixels.shape == (48, 64, 3)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0].astype(int) - grey).mean() < 3


def test_one_bit_and_palette_and_low_depth():
    bits = PICTURE[..., 1] > 128
    pixels = decode_rgb(h.encode(Image.fromarray(bits)))
    np.testing.assert_array_equal(pixels, np.repeat(bits[..., None], 3, -1) * np.uint8(255))
    palette = Image.fromarray(PICTURE).quantize(64)
    want = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    np.testing.assert_array_equal(decode_rgb(h.encode(palette)), want)
    np.testing.assert_array_equal(decode_rgb(h.encode(palette, "GIF")), want)
    # Four values of 2 bits in a byte: 0, 1, 2, 3 are 0, 85, 170, 255 (PNG, section 13.12).
    pixels = decode_rgb(h.png([b"\x1b"], 4, 2, 0))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 85, 170, 255])


def test_sixteen_bits_lose_the_low_byte():
    values = np.array([[0, 255, 256, 511, 0x1234, 0x8000, 0xFF00, 0xFFFF]], np.uint16)
    want = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, -1)
    big, little = values.astype(">u2").tobytes(), values.astype("<u2")
    np.testing.assert_array_equal(decode_rgb(h.png([big], 8, 16, 0)), want)  # grey PNG
    np.testing.assert_array_equal(decode_rgb(h.encode(little, "TIFF")), want)
    pgm = b"P5 8 1 65535\n" + big
    np.testing.assert_array_equal(decode_rgb(pgm), want)
    np.testing.assert_array_equal(decode_rgb(h.encode(values, "JPEG2000")), want)
    rgb = np.stack([values, values // 2, values // 3], -1)
    pixels = decode_rgb(h.png([rgb.astype(">u2").tobytes()], 8, 16, 2))
    np.testing.assert_array_equal(pixels, (rgb >> 8).astype(np.uint8))
    with_alpha = np.stack([values, values, values, np.full_like(values, 65535)], -1)
    pixels = decode_rgb(h.png([with_alpha.astype(">u2").tobytes()], 8, 16, 6))
    np.testing.assert_array_equal(pixels, want)


def over_white(colour, alpha):
    """The definition of compositing, in real numbers."""
    share = np.asarray(alpha, np.float64)[..., None] / 255
    return np.asarray(colour, np.float64) * share + 255 * (1 - share)


def test_transparency_is_laid_over_white():
    alpha = PICTURE[..., 1]
    rgba = np.dstack([PICTURE, alpha])
    want = over_white(PICTURE, alpha)
    for form, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        pixels = decode_rgb(h.encode(rgba, form, **options))
        assert np.abs(pixels - want).max() <= 1, form
    assert (decode_rgb(h.encode(np.dstack([PICTURE, np.zeros_like(alpha)]))) == 255).all()
    grey = Image.merge("LA", [Image.fromarray(PICTURE[..., 0]), Image.fromarray(alpha)])
    want = over_white(np.repeat(PICTURE[..., :1], 3, -1), alpha)
    assert np.abs(decode_rgb(h.encode(grey)) - want).max() <= 1


def test_palette_and_colour_key_transparency():
    indices = np.array([[0, 1, 2, 1]], np.uint8)
    image = Image.frombytes("P", (4, 1), indices.tobytes())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    pixels = decode_rgb(h.encode(image, transparency=1))
    np.testing.assert_array_equal(
        pixels[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255], [255, 255, 255]]
    )
    pixels = decode_rgb(h.encode(image, transparency=bytes([255, 0, 128])))  # alpha per entry
    assert (
        np.abs(pixels[0].astype(int) - [[255] * 3, [255] * 3, [127, 127, 255], [255] * 3])[1:].max()
        <= 1
    )
    pixels = decode_rgb(h.encode(image, "GIF", transparency=2))
    np.testing.assert_array_equal(pixels[0, 2], [255, 255, 255])
    key = struct.pack(">HHH", 10, 20, 30)
    rows = [bytes([10, 20, 30, 40, 50, 60])]
    pixels = decode_rgb(h.png(rows, 2, 8, 2, ((b"tRNS", key),)))
    np.testing.assert_array_equal(pixels[0], [[255, 255, 255], [40, 50, 60]])
    pixels = decode_rgb(h.png([bytes([7, 9])], 2, 8, 0, ((b"tRNS", struct.pack(">H", 9)),)))
    np.testing.assert_array_equal(pixels[0], [[7, 7, 7], [255, 255, 255]])


@pytest.mark.parametrize("value", list(h.ORIENTED))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation(value, form):
    exif = Image.Exif()
    exif[0x0112] = value
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 90}}.get(form, {})
    stored = PICTURE
    if form == "JPEG":
        stored = np.asarray(Image.open(io.BytesIO(h.jpeg())))
    pixels = decode_rgb(h.encode(PICTURE, form, exif=exif, **options))
    np.testing.assert_array_equal(pixels, h.ORIENTED[value](stored))


def test_broken_exif_does_not_hurt_the_picture():
    plain = h.jpeg()
    entry = b"\x12\x01\x03\0" + b"\xff" * 8
    rotten = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + entry * 3
    segment = b"\xff\xe1" + struct.pack(">H", len(rotten) + 2) + rotten
    np.testing.assert_array_equal(decode_rgb(plain[:2] + segment + plain[2:]), decode_rgb(plain))


def test_cmyk_and_ycck_jpeg():
    rng = np.random.default_rng(0)
    ink = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 4), np.uint8), 16, 0), 16, 1)
    c, m, y, k = (ink[..., i].astype(np.float64) / 255 for i in range(4))
    want = np.stack([(1 - part) * (1 - k) * 255 for part in (c, m, y)], -1)
    encoded = h.encode(Image.frombytes("CMYK", (64, 64), ink.tobytes()), "JPEG", quality=100)
    assert b"Adobe" in encoded
    assert np.abs(decode_rgb(encoded)[8::16, 8::16] - want[8::16, 8::16]).max() <= 3
    # Adobe's transform flag 2: the same file read as YCCK gives CMY by the YCbCr formulas.
    at = encoded.index(b"Adobe") + 11
    pixels = decode_rgb(encoded[:at] + b"\x02" + encoded[at + 1 :])
    stored = 255 - ink.astype(np.float64)  # inverted in the file
    lum, cb, cr = stored[..., 0], stored[..., 1] - 128, stored[..., 2] - 128
    rgb = np.stack([lum + 1.402 * cr, lum - 0.344136 * cb - 0.714136 * cr, lum + 1.772 * cb], -1)
    # libjpeg: C = 255 - R, ...; Pillow turns those over, so that ink is 255 - (255 - R) = R ...
    inverted = np.clip(255 - rgb, 0, 255)
    want = inverted * stored[..., 3:] / 255
    assert np.abs(pixels[8::16, 8::16] - want[8::16, 8::16]).max() <= 4
    tiff = h.encode(Image.frombytes("CMYK", (64, 64), ink.tobytes()), "TIFF")  # not inverted
    want = np.stack([(1 - part) * (1 - k) * 255 for part in (c, m, y)], -1)
    assert np.abs(decode_rgb(tiff) - want).max() <= 1


def lab_to_srgb(lab):
    """CIE 15 from Lab (D50) to XYZ, Bradford to D65, IEC 61966-2-1 to sRGB; values 0 to 255."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    xyz = xyz * np.array([0.9642, 1.0, 0.8249])
    to_linear = np.array(  # XYZ (D50) to linear sRGB, Bradford included (Lindbloom)
        [
            [3.1338561, -1.6168667, -0.4906146],
            [-0.9787684, 1.9161415, 0.0334540],
            [0.0719453, -0.2289914, 1.4052427],
        ]
    )
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_lab_tiff():
    colours = [(50, 0, 0), (100, 0, 0), (0, 0, 0), (60, 30, -20), (70, -20, 40), (40, 10, 30)]
    # A TIFF keeps a and b as signed bytes (TIFF 6.0, section 23), and so does `frombytes`.
    stored = [(round(light * 2.55), a % 256, b % 256) for light, a, b in colours]
    image = Image.frombytes("LAB", (len(colours), 1), np.array(stored, np.uint8).tobytes())
    exact = np.array([[round(light * 2.55) / 2.55, a, b] for light, a, b in colours])
    pixels = decode_rgb(h.encode(image, "TIFF"))[0]
    assert np.abs(pixels - lab_to_srgb(exact)).max() <= 2


def test_animated_files_give_the_first_frame():
    frames = [Image.fromarray(h.pattern(seed=i * 60)) for i in range(3)]
    for form, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        encoded = h.encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode_rgb(encoded), np.asarray(frames[0]), err_msg=form)
    flat = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    gif = h.encode(flat[0], "GIF", save_all=True, append_images=flat[1:])
    assert (decode_rgb(gif) == [255, 0, 0]).all()


@pytest.mark.parametrize("kind", h.BROKEN_KINDS)
def test_broken_files_have_their_reason(kind):
    for seed in range(3):
        assert reason(h.broken(kind, seed)) == h.BROKEN_REASONS[kind]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_cut_files_are_not_accepted(form, part):
    whole = h.encode(PICTURE, form)
    assert reason(h.cut(whole, part)) in ("truncated", "undecodable")


def test_cut_anywhere_a_jpeg_or_png_is_truncated():
    for whole in (h.jpeg(), h.jpeg(progressive=True), h.encode(PICTURE)):
        # The last four bytes of a PNG are a check sum that no reader needs.
        for size in range(12, len(whole) - (4 if whole[0] == 0x89 else 0), 37):
            assert reason(whole[:size]) == "truncated", size


def test_a_preview_inside_does_not_hide_a_cut():
    exif = b"Exif\0\0" + h.jpeg(height=16, width=16)  # an end marker of its own
    whole = h.jpeg(exif=exif)
    decode_rgb(whole)
    assert reason(whole[: len(whole) // 2 + len(exif) // 2]) == "truncated"


def test_a_stereo_photo_gives_its_first_picture():
    second = Image.fromarray(h.pattern(seed=99))
    encoded = h.encode(PICTURE, "MPO", save_all=True, append_images=[second], quality=90)
    pixels, name = decode(encoded)
    assert name == "MPO"
    np.testing.assert_array_equal(pixels, decode_rgb(h.jpeg()))


def test_bytes_after_the_end_are_no_harm():
    whole = h.jpeg()
    np.testing.assert_array_equal(decode_rgb(whole + b"\xff\xda trailer"), decode_rgb(whole))


def test_bombs_are_refused_from_the_header():
    assert reason(h.bomb_png()) == "too_large"
    assert reason(h.bomb_gif()) == "too_large"
    assert reason(h.jpeg(), max_pixels=48 * 64 - 1) == "too_large"
    decode_rgb(h.jpeg(), max_pixels=48 * 64)


@pytest.mark.parametrize("limit", [1000, 2000])  # over it Pillow warns, over twice it raises
def test_pillows_own_limit_does_not_count(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        assert decode_rgb(h.encode(PICTURE, form)).shape == PICTURE.shape
    assert limit == Image.MAX_IMAGE_PIXELS


def test_32_bit_samples_are_refused():
    assert reason(h.encode(PICTURE[..., 0].astype(np.float32), "TIFF")) == "undecodable"
    assert reason(h.encode(PICTURE[..., 0].astype(np.int32), "TIFF")) == "undecodable"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_damage_gives_an_image_or_a_reason(form, damage):
    encoded = bytearray(WHOLE[form])
    for place, value in damage:
        encoded[place % len(encoded)] = value
    try:
        assert decode_rgb(bytes(encoded), max_pixels=10**6).shape[2] == 3
    except BadImage as bad:
        assert bad.reason in REASONS


WHOLE = {
    form: h.encode(PICTURE, form)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF")
}


def test_threads_agree_and_leave_the_settings_alone():
    files = [h.jpeg(i) for i in range(8)] + [h.encode(h.pattern(seed=i)) for i in range(8)]
    want = [decode_rgb(file) for file in files]
    wrong = []

    def work():
        for file, expected in zip(files, want, strict=True):
            if not np.array_equal(decode_rgb(file), expected):
                wrong.append(file)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_imagenet_samples_equal_pillow(shared: Path):
    files = sorted((shared / "data" / "imagenet-samples").glob("*.JPEG"))[::10]
    assert len(files) == 100
    for file in files:
        with Image.open(file) as image:
            want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(decode_rgb(file.read_bytes()), want, err_msg=file.name)
