"""A catalogue of hostile image files, and what must become of each: its pixels, or the reason.

`catalogue()` makes them all; nothing is read from outside. Where a file must be packed, `picture`
is what it shows: the known pattern, or for lossy formats what a whole file of the same bytes shows.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.images import hostile as h

PICTURE = h.pattern()
GREY = PICTURE[..., 1]
ALPHA = (np.add.outer(np.arange(48) * 3, np.arange(64) * 2) % 256).astype(np.uint8)
Array = np.ndarray[Any, Any]


class Kind(NamedTuple):
    """A file: its name, bytes, and either the reason or the picture that it must have."""

    name: str
    encoded: bytes
    reason: str = ""
    picture: Array | None = None
    form: str = ""
    tolerance: int = 0  # largest difference of a pixel


def shown(encoded: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def over_white(colour: Array, alpha: Array) -> Array:
    share = alpha[..., None] / 255
    return np.rint(colour * share + 255 * (1 - share)).astype(np.uint8)


def png_of(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(h.chunk(*chunk) for chunk in chunks)


def ihdr(height: int, width: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


def rows_of(picture: Array) -> bytes:
    return b"".join(b"\0" + row.tobytes() for row in picture)


def interlaced(picture: Array) -> bytes:
    """Adam7 (PNG, section 8.2)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1))  # fmt: skip
    parts = [rows_of(picture[top::down, left::right]) for top, left, down, right in passes]
    data = zlib.compress(b"".join(parts))
    return png_of((b"IHDR", ihdr(*picture.shape[:2], 8, 2, 1)), (b"IDAT", data), (b"IEND", b""))


def zeros(gigabytes: int, before: bytes = b"") -> bytes:
    """Some bytes and then gigabytes of zeros, deflated: one block that is repeated."""
    squeeze = zlib.compressobj(9)
    start = squeeze.compress(before) + squeeze.flush(zlib.Z_FULL_FLUSH)
    block = squeeze.compress(bytes(2**24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compress(b"")[2:-4]
    total = zlib.adler32(before)
    low, high = total & 0xFFFF, total >> 16
    high = (high + low * gigabytes * 2**30) % 65521  # Adler-32: zeros add `low` to it each time
    return start + block * (gigabytes * 64) + last + struct.pack(">HH", high, low)


def png_with(*extra: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    body = data or zlib.compress(rows_of(PICTURE))
    return png_of((b"IHDR", ihdr(48, 64)), *extra, (b"IDAT", body), (b"IEND", b""))


def tiff_of(entries: list[tuple[int, int, int, int]], data: bytes, following: int = 0) -> bytes:
    """Little-endian, one directory at 8, data at 512."""
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following)
    return head.ljust(512, b"\0") + data


def grey_tiff(height: int = 48, width: int = 64, following: int = 0, **more: Any) -> bytes:
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1)}
    entries |= {262: (3, 1, 1), 273: (4, 1, 512), 277: (3, 1, 1), 278: (4, 1, height)}
    entries |= {279: (4, 1, height * width)} | more.get("entries", {})
    listed = [(tag, *entry) for tag, entry in entries.items()]
    return tiff_of(listed, GREY.tobytes(), following)


def tiled_tiff() -> bytes:
    """A 16 x 16 grey picture as one tile, cut to 12 x 10."""
    tile = np.arange(256, dtype=np.uint8)
    entries = [(256, 4, 1, 10), (257, 4, 1, 12), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(277, 3, 1, 1), (322, 4, 1, 16), (323, 4, 1, 16), (324, 4, 1, 512)]
    return tiff_of([*entries, (325, 4, 1, 256)], tile.tobytes())


def bmp(
    height: int, width: int, bits: int, compression: int, data: bytes, colours: int = 0
) -> bytes:
    palette = b"".join(bytes([i, i, i, 0]) for i in range(colours))
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0,
                       colours, 0)  # fmt: skip
    offset = 14 + len(head) + len(palette)
    start = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return start + head + palette + data


def rle_bmp() -> bytes:
    """Two rows of 4, bottom first: 7 7 7 9, then 1 2 3 4 in absolute mode."""
    data = bytes([3, 7, 1, 9, 0, 0, 0, 4, 1, 2, 3, 4, 0, 0, 0, 1])
    return bmp(2, 4, 8, 1, data, 256)


def framed(encoded: bytes, marker: int = 0xC0, precision: int = 8, **size: int) -> bytes:
    """A JPEG whose frame header says something else."""
    at = encoded.index(b"\xff\xc0")
    height, width = struct.unpack_from(">HH", encoded, at + 5)
    frame = struct.pack(">BHH", precision, size.get("height", height), size.get("width", width))
    return (
        encoded[:at] + bytes([0xFF, marker]) + encoded[at + 2 : at + 4] + frame + encoded[at + 9 :]
    )


def with_segment(marker: int, content: bytes) -> bytes:
    whole = h.jpeg()
    return (
        whole[:2]
        + bytes([0xFF, marker])
        + struct.pack(">H", len(content) + 2)
        + content
        + whole[2:]
    )


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def jp2(height: int, width: int) -> bytes:
    """A JPEG 2000 file whose headers say another size."""
    whole = h.encode(PICTURE, "JPEG2000", irreversible=False)
    at, box = whole.index(b"\xff\x51"), whole.index(b"ihdr")
    size, sides = struct.pack(">II", width, height), struct.pack(">II", height, width)
    whole = whole[: box + 4] + sides + whole[box + 12 :]
    whole = whole[: at + 6] + size + whole[at + 14 : at + 22] + size + whole[at + 30 :]
    return whole


def wide_webp() -> bytes:
    """An extended WebP whose canvas is 16,384 x 16,384 and whose picture is 64 x 48."""
    rgba = np.dstack([PICTURE, ALPHA])
    whole = h.encode(rgba, "WEBP", lossless=True, exif=oriented(1))
    at = whole.index(b"VP8X") + 12
    return whole[:at] + b"\xff\x3f\0\xff\x3f\0" + whole[at + 6 :]


OTHERS = {  # by signature; none of them is a picture that is read
    "words.jpg": b"a caption, not a picture",
    "page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>',
    "paper.pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF",
    "film.mp4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(400),
    "icon.ico": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(400),
    "layers.psd": b"8BPS\0\1" + bytes(400),
    "vector.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "targa.tga": b"\0\0\2\0\0\0\0\0\0\0\0\0\2\0\2\0\x18\0" + bytes(12),
    "archive.zip": b"PK\3\4" + bytes(400),
    "program.png": b"\x7fELF\2\1\1" + bytes(400),
    "null.png": bytes(1000),
    "json.webp": b'{"error": "expired"}',
    "junk_before.jpg": b"junk" + h.jpeg(),
    "one_byte.gif": b"G",
    "riff.webp": b"RIFF\x10\0\0\0WAVEfmt \0\0\0\0",
}


def _jpegs() -> list[Kind]:
    whole, plain = h.jpeg(), shown(h.jpeg())
    kinds = [
        Kind("cmyk.jpg", (ink := h.encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG",
                                          quality=100)), "", PICTURE, "JPEG", 40),
        Kind("ycck.jpg", (ycck := ink.replace(b"Adobe\0\x64\0\0\0\0\0",
             b"Adobe\0\x64\0\0\0\0\2")), "", shown(ycck), "JPEG"),
        Kind("keep_rgb.jpg", h.encode(PICTURE, "JPEG", keep_rgb=True, quality=98), "", PICTURE,
             "JPEG", 40),
        Kind("progressive.jpg", h.jpeg(progressive=True), "", plain, "JPEG"),
        Kind("restarts.jpg", h.jpeg(restart_marker_blocks=1), "", plain, "JPEG"),
        Kind("jpeg.png", h.jpeg(71), "", shown(h.jpeg(71)), "JPEG"),
        Kind("no_extension", h.jpeg(72), "", shown(h.jpeg(72)), "JPEG"),
        Kind("junk_after.jpg", h.jpeg(73) + b"junk" * 999, "", shown(h.jpeg(73)), "JPEG"),
        Kind("page_after.jpg", h.jpeg(74) + b"<?php evil(); ?>", "", shown(h.jpeg(74)), "JPEG"),
        Kind("two_in_one.jpg", h.jpeg(75) + h.jpeg(76), "", shown(h.jpeg(75)), "JPEG"),
        Kind("stereo.mpo", h.encode(PICTURE, "MPO", save_all=True, quality=90,
                                    append_images=[Image.fromarray(h.pattern(seed=9))]), "",
             plain, "MPO"),
        Kind("broken_exif.jpg", with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"), "", plain,
             "JPEG"),
        Kind("exif_bomb.jpg", with_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + struct.pack(
            "<HHHII", 1, 0x010E, 2, 2**32 - 1, 8)), "", plain, "JPEG"),
        Kind("long_comment.jpg", with_segment(0xFE, b"c" * 65_000) , "", plain, "JPEG"),
        Kind("wide.jpg", (wide := h.jpeg(height=2, width=65_500)), "", shown(wide), "JPEG"),
        Kind("65535_square.jpg", framed(whole, height=65_535, width=65_535), "too_large"),
        Kind("no_height.jpg", framed(whole, height=0), "undecodable"),
        Kind("line_count_later.jpg", framed(whole, height=0)[:-2] + b"\xff\xdc\0\4\0\x30\xff\xd9",
             "undecodable"),
        Kind("12_bits.jpg", framed(whole, 0xC1, 12), "undecodable"),
        Kind("lossless.jpg", framed(whole, 0xC3), "undecodable"),
        Kind("hierarchical.jpg", framed(whole, 0xC5), "undecodable"),
        # As in the frames of films: the usual tables are meant.
        Kind("no_tables.jpg", whole.replace(b"\xff\xc4", b"\xff\xee"), "", plain, "JPEG"),
        Kind("no_quantisation.jpg", whole.replace(b"\xff\xdb", b"\xff\xee"), "undecodable"),
        Kind("header.jpg", h.broken_header(whole), "undecodable"),
        Kind("zero_tail.jpg", h.zero_tail(whole), "truncated"),
        Kind("start_only.jpg", b"\xff\xd8\xff", "truncated"),
        Kind("two_bytes.jpg", b"\xff\xd8", "not_an_image"),
    ]  # fmt: skip
    for tenth in range(1, 10):
        kinds.append(Kind(f"cut_{tenth}0.jpg", h.cut(h.jpeg(80 + tenth), tenth / 10), "truncated"))
    for value, turn in h.ORIENTED.items():
        seed = 60 + value
        picture = turn(shown(h.jpeg(seed)))
        kinds.append(Kind(f"turned_{value}.jpg", h.jpeg(seed, exif=oriented(value)), "", picture,
                          "JPEG"))  # fmt: skip
    for seed in range(6):  # in the entropy coded part, where every decoder reads on
        flipped = bytearray(h.jpeg(90 + seed, 96, 128))
        flipped[-200 - 40 * seed] ^= 0x10
        kinds.append(Kind(f"flip_{seed}.jpg", bytes(flipped), "", shown(bytes(flipped)), "JPEG"))
    return kinds


def _pngs() -> list[Kind]:
    rgba, palette = np.dstack([PICTURE, ALPHA]), Image.fromarray(PICTURE).quantize(64)
    colours = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    clear = colours.copy()
    clear[np.asarray(palette) == 3] = 255
    deep = (PICTURE.astype(np.uint16) << 8 | 77).astype(">u2")
    whole = png_with()
    row = np.arange(65_535, dtype=np.uint8)[None]
    frames = [Image.fromarray(h.pattern(seed=i * 60)) for i in range(3)]
    apng = h.encode(frames[0], save_all=True, append_images=frames[1:], duration=50)
    return [
        Kind("sixteen_bits.png", h.png([r.tobytes() for r in deep], 64, 16, 2), "", PICTURE, "PNG"),
        Kind("two_bits.png", h.png([b"\x1b"], 4, 2, 0), "",
             np.repeat(np.array([[[0], [85], [170], [255]]], np.uint8), 3, -1), "PNG"),
        Kind("interlaced.png", interlaced(PICTURE), "", PICTURE, "PNG"),
        Kind("one_pixel.png", h.encode(PICTURE[:1, :1]), "", PICTURE[:1, :1], "PNG"),
        Kind("one_column.png", h.encode(PICTURE[:, :1]), "", PICTURE[:, :1], "PNG"),
        Kind("one_row.png", h.encode(PICTURE[:1]), "", PICTURE[:1], "PNG"),
        Kind("65535_wide.png", h.encode(row), "", np.repeat(row[..., None], 3, -1), "PNG"),
        Kind("alpha.png", h.encode(rgba), "", over_white(PICTURE, ALPHA), "PNG", 1),
        Kind("palette.png", h.encode(palette), "", colours, "PNG"),
        Kind("clear_palette.png", h.encode(palette, transparency=3), "", clear, "PNG"),
        Kind("short_palette.png", png_of((b"IHDR", ihdr(1, 2, 8, 3)), (b"PLTE", bytes(3)),
             (b"IDAT", zlib.compress(b"\0\0\xff")), (b"IEND", b"")), "",
             np.zeros((1, 2, 3), np.uint8), "PNG", 255),
        Kind("animated.png", apng, "", np.asarray(frames[0]), "PNG"),
        Kind("png.jpg", h.encode(h.pattern(seed=31)), "", h.pattern(seed=31), "PNG"),
        Kind("long_text.png", png_with((b"tEXt", b"Comment\0" + b"x" * 500_000)), "", PICTURE,
             "PNG"),
        Kind("pixel_bomb.png", png_with(data=zeros(4, rows_of(PICTURE))), "",
             PICTURE, "PNG"),
        Kind("text_bomb.png", png_with((b"zTXt", b"Comment\0\0" + zeros(4))), "undecodable"),
        Kind("profile_bomb.png", png_with((b"iCCP", b"p\0\0" + zeros(4))), "undecodable"),
        Kind("xmp_bomb.png", png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros(4))),
             "undecodable"),
        Kind("header_bomb.png", h.bomb_png(), "too_large"),
        Kind("65535_square.png", h.bomb_png(65_535, 65_535), "too_large"),
        Kind("2_31_wide.png", h.bomb_png(2**31 - 1, 1), "too_large"),
        Kind("no_width.png", png_of((b"IHDR", ihdr(48, 0)), (b"IDAT", b""), (b"IEND", b"")),
             "undecodable"),
        Kind("no_header.png", png_of((b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")),
             "undecodable"),
        Kind("no_pixels.png", png_of((b"IHDR", ihdr(48, 64)), (b"IEND", b"")), "undecodable"),
        Kind("header_sum.png", whole[:29] + b"\1" + whole[30:], "undecodable"),
        # The sum over the pixels comes after them; the stream has one of its own.
        Kind("data_sum.png", whole[:-16] + b"0000" + whole[-12:], "", PICTURE, "PNG"),
        Kind("chunk_length.png", whole.replace(struct.pack(">I", 13) + b"IHDR",
             b"\xff\xff\xff\xffIHDR"), "truncated"),
        Kind("signature_only.png", whole[:8], "truncated"),
        *(Kind(f"cut_{tenth}0.png", h.cut(h.encode(h.pattern(seed=tenth)), tenth / 10), "truncated")
          for tenth in range(1, 10)),
    ]  # fmt: skip


def _other_formats() -> list[Kind]:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    red = np.asarray(frames[0])
    webps = [Image.fromarray(h.pattern(seed=i * 60)) for i in range(3)]
    rgba = np.dstack([PICTURE, ALPHA])
    three = np.repeat(GREY[..., None], 3, -1)
    empty_gif = bytearray(h.encode(frames[0], "GIF"))
    empty_gif[6:10] = bytes(4)
    lab = Image.frombytes("LAB", (6, 1), bytes([128, 0, 0] * 6))
    loop = grey_tiff(following=8)
    values = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    npy = io.BytesIO()
    np.save(npy, values)
    pickled = io.BytesIO()
    np.save(pickled, np.array([[{}]], object))
    webp = h.encode(PICTURE, "WEBP", lossless=True)
    gif = h.encode(Image.fromarray(GREY), "GIF")
    return [
        Kind("animated.gif", h.encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
             "", red, "GIF"),
        Kind("many_frames.gif", h.encode(frames[0], "GIF", save_all=True,
             append_images=(frames * 300)[1:]), "", red, "GIF"),
        Kind("no_size.gif", bytes(empty_gif), "", red, "GIF"),
        Kind("bomb.gif", h.bomb_gif(), "too_large"),
        Kind("cut.gif", h.cut(gif, 0.6), "truncated"),
        Kind("header.gif", gif[:13], "undecodable"),
        Kind("animated.webp", h.encode(webps[0], "WEBP", save_all=True, append_images=webps[1:],
             lossless=True), "", np.asarray(webps[0]), "WEBP"),
        Kind("lossless.webp", webp, "", PICTURE, "WEBP"),
        Kind("webp.gif", h.encode(h.pattern(seed=5), "WEBP", lossless=True), "",
             h.pattern(seed=5), "WEBP"),
        Kind("alpha.webp", h.encode(rgba, "WEBP", lossless=True, exact=True), "",
             over_white(PICTURE, ALPHA), "WEBP", 1),
        Kind("canvas_bomb.webp", wide_webp(), "undecodable"),
        Kind("cut.webp", h.cut(webp, 0.7), "truncated"),
        Kind("flip.webp", webp[:30] + bytes([webp[30] ^ 0xFF]) + webp[31:], "undecodable"),
        Kind("pages.tif", h.encode(webps[0], "TIFF", save_all=True, append_images=webps[1:]), "",
             np.asarray(webps[0]), "TIFF"),
        Kind("tiled.tif", tiled_tiff(), "", np.repeat(np.arange(256, dtype=np.uint8).reshape(
             16, 16)[:12, :10, None], 3, -1), "TIFF"),
        Kind("lab.tif", h.encode(lab, "TIFF"), "", np.full((1, 6, 3), 119, np.uint8), "TIFF", 2),
        Kind("sixteen_bits.tif", h.encode(GREY.astype(np.uint16) << 8, "TIFF"), "", three, "TIFF"),
        Kind("deflate.tif", h.encode(PICTURE, "TIFF", compression="tiff_adobe_deflate"), "",
             PICTURE, "TIFF"),
        Kind("turned.tif", h.encode(PICTURE, "TIFF", exif=oriented(6)), "", h.ORIENTED[6](PICTURE),
             "TIFF"),
        Kind("circle.tif", loop, "", three, "TIFF"),
        Kind("tag_bomb.tif", grey_tiff(entries={305: (2, 2**32 - 1, 400)}), "", three, "TIFF"),
        Kind("bomb.tif", grey_tiff(65_535, 65_535), "too_large"),
        Kind("65535_wide.tif", grey_tiff(48, 65_535), "truncated"),
        Kind("float.tif", h.encode(GREY.astype(np.float32), "TIFF"), "undecodable"),
        Kind("no_directory.tif", b"II*\0\xff\xff\xff\x7f", "undecodable"),
        Kind("cut.tif", h.cut(grey_tiff(), 0.6), "truncated"),
        Kind("run_length.bmp", rle_bmp(), "",
             np.repeat(np.array([[1, 2, 3, 4], [7, 7, 7, 9]], np.uint8)[..., None], 3, -1), "BMP"),
        Kind("top_down.bmp", bmp(-1, 1, 24, 0, bytes([3, 2, 1, 0])), "",
             np.array([[[1, 2, 3]]], np.uint8), "BMP"),
        Kind("bomb.bmp", bmp(2**31 - 1, 2**31 - 1, 24, 0, b""), "too_large"),
        Kind("cut.bmp", h.cut(h.encode(PICTURE, "BMP"), 0.6), "truncated"),
        Kind("header.bmp", b"BM" + b"\xff" * 60, "truncated"),
        Kind("bomb.ppm", b"P6 100000 100000 255\n" + bytes(99), "too_large"),
        Kind("words.pgm", b"P2 2 1 255 7 9\n", "",
             np.repeat(np.array([[[7], [9]]], np.uint8), 3, -1), "PPM"),
        Kind("cut.ppm", h.cut(h.encode(PICTURE, "PPM"), 0.6), "truncated"),
        Kind("sized.ppm", b"P6 " + b"9" * 50_000 + b" 1 255\n", "undecodable"),
        Kind("wavelet.jp2", h.encode(PICTURE, "JPEG2000", irreversible=False), "", PICTURE,
             "JPEG2000"),
        Kind("wavelet.j2k", h.encode(h.pattern(seed=3), "JPEG2000", irreversible=False,
             no_jp2=True), "", h.pattern(seed=3), "JPEG2000"),
        Kind("bomb.jp2", jp2(14_000, 14_000), "too_large"),
        Kind("small.avif", (avif := h.encode(PICTURE, "AVIF", quality=100)), "", shown(avif),
             "AVIF"),
        Kind("cut.avif", h.cut(avif, 0.6), "truncated"),
        Kind("values.npy", npy.getvalue(), "", values, "NPY"),
        Kind("pickled.npy", pickled.getvalue(), "undecodable"),
        Kind("cut.npy", npy.getvalue()[:-1], "truncated"),
    ]  # fmt: skip


@functools.cache
def catalogue() -> tuple[Kind, ...]:
    """All kinds; names and bytes are different, so nothing is taken for a duplicate."""
    kinds = [Kind("nothing.jpg", b"", "empty")]
    kinds += [Kind(name, encoded, "not_an_image") for name, encoded in OTHERS.items()]
    # known by its first bytes, with the optional package or without
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
    kinds.append(Kind("phone.heic", heic, "undecodable"))
    return (*kinds, *_jpegs(), *_pngs(), *_other_formats())
