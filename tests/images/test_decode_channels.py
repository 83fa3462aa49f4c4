"""decode_image for other channels than RGB: formulas for pictures, numpy itself for .npy files."""

from __future__ import annotations

import io
import struct
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from pipeline.images.decode import REASONS, BadImage, decode, decode_image, decode_rgb
from tests.images import hostile as h

PICTURE = h.pattern()
ALPHA = (np.add.outer(np.arange(48) * 3, np.arange(64) * 2) % 256).astype(np.uint8)
GREY = PICTURE[..., 1]


def refused(encoded: bytes, channels: int, **options: Any) -> BadImage:
    with pytest.raises(BadImage) as caught:
        decode_image(encoded, channels, **options)
    assert caught.value.reason in REASONS
    assert caught.value.detail
    return caught.value


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601-2 with weights in 1/65536, rounded: uint8 [..., 3] -> [..., 1]."""
    weighted = (rgb.astype(np.int64) * (19595, 38470, 7471)).sum(-1, keepdims=True)
    return ((weighted + 32768) >> 16).astype(np.uint8)


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return stream.getvalue()


def header(text: str, data: bytes = b"", length: int | None = None) -> bytes:
    """A numpy file of format 1.0 with any header."""
    encoded = text.encode("latin1")
    return b"\x93NUMPY\1\0" + struct.pack("<H", length or len(encoded)) + encoded + data


def about(shape: object, descr: str = "'|u1'", fortran: bool = False) -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}"


# ---- pictures


PICTURES = {
    "rgb.png": lambda: h.encode(PICTURE),
    "rgb.jpg": lambda: h.jpeg(),
    "rgba.png": lambda: h.encode(np.dstack([PICTURE, ALPHA])),
    "rgba.webp": lambda: h.encode(np.dstack([PICTURE, ALPHA]), "WEBP", lossless=True, exact=True),
    "la.png": lambda: h.encode(np.dstack([GREY, ALPHA])),
    "palette.png": lambda: h.encode(Image.fromarray(PICTURE).quantize(32)),
    "clear.png": lambda: h.encode(Image.fromarray(PICTURE).quantize(8), transparency=3),
    "cmyk.jpg": lambda: h.encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "key.png": lambda: h.png(
        [bytes([7, 9])], 2, 8, 0, ((b"tRNS", struct.pack(">H", 9)),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_one_channel_is_the_luminance_of_the_rgb_picture(name):
    encoded = PICTURES[name]()
    pixels, form = decode(encoded, channels=1)
    assert pixels.dtype == np.uint8 and pixels.flags.writeable and pixels.flags.c_contiguous
    assert form == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name[-4:].strip(".")]
    np.testing.assert_array_equal(pixels, luma(decode_rgb(encoded)))


@pytest.mark.parametrize("name", PICTURES)
def test_alpha_is_straight_and_opaque_where_there_is_none(name):
    encoded = PICTURES[name]()
    four, two = decode_image(encoded, 4), decode_image(encoded, 2)
    image = Image.open(io.BytesIO(encoded))
    if name in ("rgba.png", "rgba.webp"):
        np.testing.assert_array_equal(four, np.dstack([PICTURE, ALPHA]))
    elif name == "la.png":
        np.testing.assert_array_equal(four, np.dstack([GREY] * 3 + [ALPHA]))
    elif name == "clear.png":
        np.testing.assert_array_equal(four[..., 3], (np.asarray(image) != 3) * np.uint8(255))
        assert (four[..., 3] == 0).any()
    elif name == "key.png":
        assert four[0].tolist() == [[7, 7, 7, 255], [9, 9, 9, 0]]
    else:
        np.testing.assert_array_equal(four[..., :3], decode_rgb(encoded))
        assert (four[..., 3] == 255).all()
    assert two.shape == (*four.shape[:2], 2)
    np.testing.assert_array_equal(two[..., :1], luma(four[..., :3]))
    np.testing.assert_array_equal(two[..., 1], four[..., 3])


def test_grey_keeps_its_values_and_16_bits_their_high_byte():
    np.testing.assert_array_equal(decode_image(h.encode(GREY), 1)[..., 0], GREY)
    jpeg = h.encode(GREY, "JPEG", quality=90)
    np.testing.assert_array_equal(
        decode_image(jpeg, 1)[..., 0], np.asarray(Image.open(io.BytesIO(jpeg)))
    )
    deep = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    for form in ("PNG", "TIFF"):
        encoded = h.encode(Image.fromarray(deep), form)
        np.testing.assert_array_equal(decode_image(encoded, 1)[..., 0], deep >> 8)
        np.testing.assert_array_equal(decode_image(encoded, 4)[..., 2], deep >> 8)
        assert (decode_image(encoded, 2)[..., 1] == 255).all()


def test_orientation_and_limits_hold_for_every_number_of_channels():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = h.encode(PICTURE, exif=exif)
    for channels, mode in ((1, "L"), (2, "LA"), (4, "RGBA")):
        want = Image.fromarray(PICTURE).convert(mode).transpose(Image.Transpose.ROTATE_270)
        pixels = decode_image(turned, channels)
        np.testing.assert_array_equal(pixels, np.asarray(want).reshape(pixels.shape))
        assert refused(turned, channels, max_pixels=3071).reason == "too_large"
        assert refused(h.cut(turned, 0.8), channels).reason == "truncated"
        assert refused(b"", channels).reason == "empty"
        assert refused(b"a caption", channels).reason == "not_an_image"


@pytest.mark.parametrize("channels", [5, 6, 12])
def test_no_picture_has_more_than_four_channels(channels):
    error = refused(h.jpeg(), channels)
    assert error.reason == "undecodable"
    assert error.detail == f"JPEG cannot give {channels} channels, a .npy [H, W, {channels}] can"
    assert refused(h.bomb_png(), channels).reason == "too_large"
    assert refused(b"a caption", channels).reason == "not_an_image"


def test_a_tiff_of_six_bands_gives_six_channels_and_no_other_number():
    entries = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 200), (277, 3, 1, 6), (278, 3, 1, 2), (279, 4, 1, 24)]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )
    tiff = (b"II*\0" + struct.pack("<I", 8) + directory).ljust(200, b"\0") + bytes(24)
    assert decode_image(tiff, 6).shape == (2, 2, 6)
    for channels in (1, 3):
        error = refused(tiff, channels)
        assert error.reason == "undecodable"
        assert "TIFF of more than 4 bands" in error.detail
    uneven = (b"II*\0" + struct.pack("<I", 8) + directory).replace(
        struct.pack("<HHII", 258, 3, 1, 8), struct.pack("<HHHHHH", 258, 3, 2, 0, 8, 4)
    )
    detail = refused(uneven.ljust(200, b"\0") + bytes(24), 3).detail
    assert "bands" not in detail and "TIFF" in detail


# ---- numpy files


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2"])
def test_numpy_files_give_their_values(version, channels, dtype):
    values = np.random.default_rng(channels).integers(0, 65536, (7, 5, channels))
    array = (values >> 8 if dtype == "|u1" else values).astype(dtype)
    for order in "CF":
        pixels, form = decode(npy(np.array(array, order=order), version), channels=channels)
        assert form == "NPY" and pixels.dtype == np.uint8
        assert pixels.flags.writeable and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, values >> 8)


def test_two_dimensions_are_one_channel_and_the_rest_of_a_file_is_ignored():
    for array in (GREY, np.asfortranarray(GREY)):
        np.testing.assert_array_equal(decode_image(npy(array) + b"trailer", 1)[..., 0], GREY)
    error = refused(npy(GREY), 3)
    assert error.reason == "undecodable"
    assert error.detail == "uint8 [48, 64], expected uint8 or uint16 [H, W, 3]"
    # Files of Python 2 write longs; numpy reads them with a warning, which nobody needs.
    pixels = decode_image(header(about("(2L, 3L)"), bytes(range(6))), 1)
    np.testing.assert_array_equal(pixels[..., 0], [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("array", "channels", "named"),
    [
        (PICTURE, 6, "uint8 [48, 64, 3], expected uint8 or uint16 [H, W, 6]"),
        (PICTURE, 1, "uint8 [48, 64, 3], expected uint8 or uint16 [H, W, 1] or [H, W]"),
        (np.zeros((6, 4, 5), np.uint8), 6, "uint8 [6, 4, 5]"),  # planes first
        (np.zeros((4, 5, 6), np.float32), 6, "float32 [4, 5, 6]"),
        (np.zeros((4, 5, 6), np.int8), 6, "int8 [4, 5, 6]"),
        (np.zeros((4, 5, 6), bool), 6, "bool [4, 5, 6]"),
        (np.zeros((4, 5, 6), np.uint32), 6, "uint32 [4, 5, 6]"),
        (np.zeros((4, 5, 6, 1), np.uint8), 6, "uint8 [4, 5, 6, 1]"),
        (np.zeros((4, 0, 6), np.uint8), 6, "uint8 [4, 0, 6]"),
        (np.array(7, np.uint8), 1, "uint8 []"),
        (np.zeros(6, np.uint8), 6, "uint8 [6]"),
        (np.array([[{"a": 1}] * 3] * 3, object), 1, "object [3, 3]"),
        (np.zeros((4, 5), [("x", "u1")]), 1, "[('x', 'u1')] [4, 5]"),
    ],
)
def test_other_arrays_are_refused_by_what_they_are(array, channels, named):
    error = refused(npy(array), channels)
    assert error.reason == "undecodable"
    assert named in error.detail


class Payload:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled():
    evil = npy(np.array([[Payload()]], object))
    assert refused(evil, 1).reason == "undecodable"
    data = evil[evil.index(b"\n") + 1 :]  # a pickle is as good as any bytes where bytes belong
    assert decode_image(header(about("(1, 1)"), data), 1).item() == data[0]


def test_the_size_is_refused_by_the_header():
    for shape in ("(100000, 100000, 6)", f"({2**70}, 1, 6)", f"(1, {10**300}, 6)"):
        assert refused(header(about(shape)), 6).reason == "too_large"
    assert refused(header(about("(10, 11, 6)"), bytes(660)), 6, max_pixels=109).reason == (
        "too_large"
    )
    assert decode_image(header(about("(10, 11, 6)"), bytes(660)), 6, 110).shape == (10, 11, 6)


def test_every_early_end_is_truncated():
    whole = npy(np.zeros((4, 5, 6), np.uint16))
    for end in range(6, len(whole)):
        assert refused(whole[:end], 6).reason == "truncated", end
    assert refused(whole[:-1], 6).detail == f"{len(whole) - 1} of {len(whole)} bytes"
    assert refused(header(about("(2, 2)"), bytes(4), length=65_535), 1).reason == "truncated"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "(" * 9_000,
        "-" * 9_000 + "1",
        "[" * 5_000 + "]" * 5_000,
        "{'descr': " * 900,
        "1+" * 4_000 + "1",
        " " * 60_000,
        about("(0x" + "f" * 9_000 + ", 1)"),
        about("(" + "9" * 9_000 + ", 1)"),
        about("(-4, 5)"),
        about("(4, -5)"),
        about("(4.0, 5)"),
        about("[4, 5]"),
        about("4"),
        about("(4, 5)", "'nonsense'"),
        about("(4, 5)", "None"),
        about("(4, 5)", "('|u1', (3,))"),
        about("(4, 5)", "'|O'"),
        about("(4, 5)", "'|V1'"),
        about("(4, 5)", "__import__('os').getcwd()"),
        "\xff\xfe",
    ],
)
def test_a_hostile_header_is_undecodable(text):
    assert refused(header(text, bytes(100)), 1).reason in ("undecodable", "too_large")


def test_unknown_versions_are_named():
    whole = bytearray(npy(GREY))
    whole[6] = 4
    assert refused(bytes(whole), 1).detail == "numpy format 4.0 is not known"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_give_pixels_or_a_reason(data):
    whole = bytearray(npy(np.arange(120, dtype=np.uint8).reshape(4, 5, 6)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 90))
        whole[place] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(whole), 6, 1000).shape[2] == 6
    except BadImage as error:
        assert error.reason in REASONS
