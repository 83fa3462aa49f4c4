"""Makes image files of every kind that decoding must read right, and of every kind it must refuse.

Pictures are one known pattern (`pattern`), so a test can say what each pixel must be.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.data import encoded as encode


def pattern(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray[Any, Any]:
    """uint8[H, W, 3] without symmetry: ramps, and a block in a corner that shows orientation."""
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack(
        [rows * 255 // (height - 1), columns * 255 // (width - 1), (rows + columns + seed) % 256],
        -1,
    ).astype(np.uint8)
    picture[: height // 4, : width // 4] = (250, 20, 20 + seed % 200)
    return picture


def jpeg(seed: int = 0, height: int = 48, width: int = 64, **options: Any) -> bytes:
    return encode(pattern(height, width, seed), "JPEG", **{"quality": 90, **options})


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(
    rows: list[bytes],
    width: int,
    depth: int,
    colour: int,
    extra: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """A PNG written by hand, for what Pillow does not write (16 bits a channel, low depths)."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def bomb_png(width: int = 50_000, height: int = 50_000) -> bytes:
    """A few bytes whose header asks for 2.5 gigapixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def bomb_gif() -> bytes:
    small = bytearray(encode(Image.new("P", (4, 4)), "GIF"))
    small[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(small)


def cut(encoded: bytes, part: float = 0.5) -> bytes:
    return encoded[: int(len(encoded) * part)]


def zero_tail(encoded: bytes) -> bytes:
    """What a copy that was interrupted leaves: the right size, zeros at the end."""
    half = len(encoded) // 2
    return encoded[:half] + bytes(len(encoded) - half)


def broken_header(encoded: bytes) -> bytes:
    """The frame header of a JPEG overwritten, the rest whole."""
    at = encoded.index(b"\xff\xc0")
    return encoded[: at + 4] + b"\x00" * 15 + encoded[at + 19 :]


ORIENTED = {  # EXIF 2.32, table of tag 0x0112: what a viewer has to do with the stored rows
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}

BROKEN_KINDS = (
    "empty",
    "text",
    "html",
    "jpeg_cut",
    "jpeg_zero_tail",
    "png_cut",
    "webp_cut",
    "jpeg_header",
    "bomb_png",
    "noise",
)
BROKEN_REASONS = {
    "empty": "empty",
    "text": "not_an_image",
    "html": "not_an_image",
    "jpeg_cut": "truncated",
    "jpeg_zero_tail": "truncated",
    "png_cut": "truncated",
    "webp_cut": "truncated",
    "jpeg_header": "undecodable",
    "bomb_png": "too_large",
    "noise": "not_an_image",
}


def broken(kind: str, seed: int = 0) -> bytes:
    """A file of one of BROKEN_KINDS; another seed gives other bytes (but for `empty`)."""
    tag = f"{seed}".encode()
    files = {
        "empty": lambda: b"",
        "text": lambda: b"a caption, not a picture " + tag,
        "html": lambda: b"<!DOCTYPE html><title>404 Not Found</title>" + tag,
        "jpeg_cut": lambda: cut(jpeg(seed)),
        "jpeg_zero_tail": lambda: zero_tail(jpeg(seed)),
        "png_cut": lambda: cut(encode(pattern(seed=seed)), 0.8),
        "webp_cut": lambda: cut(encode(pattern(seed=seed), "WEBP"), 0.7),
        "jpeg_header": lambda: broken_header(jpeg(seed)),
        "bomb_png": lambda: bomb_png(50_000 + seed),
        "noise": lambda: np.random.default_rng(seed).bytes(500),
    }
    return files[kind]()
